"""What an optimizer step reached: its row, how the figures are counted, and what the table shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from d3llm_ray.benchmark.report import Columns, between
from d3llm_ray.benchmark.rows import spread
from d3llm_ray.benchmark.step_flops import StepFlops
from d3llm_ray.distillation.lora import Coverage
from d3llm_ray.models import Work

COUNTING = {
    "seconds": "median of the timed optimizer steps, each with the device synchronised: batches put on the device, "
    "forward, backward, clipping and AdamW; corruption and packing are done beforehand",
    "tokens": "forwarded tokens of a step, prompt and masked canvas: accumulation x micro_batch_size x views x row "
    "length, with 2 views of a row where there is a complement",
    "samples_per_second": "rows of a step / seconds; a row counts once, however many views it has",
    "flops": "matrices 2 x weights x tokens in a forward, with the adapters'; as much for the gradients of inputs and "
    "again for those of trained weights; LM head on the supervised rows; attention 4 x layers x hidden size x pairs in "
    "a forward, twice that in a backward pass; recomputed: the layers' forward again with activation checkpointing; "
    "the optimizer's are left out",
    "mfu": "(forward + backward) flops / seconds / peak",
    "hfu": "(forward + backward + recomputed) flops / seconds / peak",
    "phases_ms": "of one more step, with the device synchronised between the phases",
    "memory": "bytes; planned, and peak: of PyTorch's allocations in the timed steps on a GPU, otherwise of the whole "
    "process",
}
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepRow:
    """A step of one plan. `seconds` of each timed step, `phases` in seconds of one more, `losses` of all steps."""

    model: str
    samples: int  # rows of a step
    peak_flops: float  # of the machine, a second
    coverage: Coverage
    work: Work  # of a step
    flops: StepFlops
    seconds: tuple[float, ...]
    phases: dict[str, float]
    losses: tuple[float, ...]

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: what has to be computed, over what the machine could have."""
        return self.flops.model / spread(self.seconds)[0] / self.peak_flops

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: likewise, recomputed activations included."""
        return self.flops.hardware / spread(self.seconds)[0] / self.peak_flops

    @property
    def tokens_per_second(self) -> float:
        return self.work.tokens / spread(self.seconds)[0]

    @property
    def samples_per_second(self) -> float:
        return self.samples / spread(self.seconds)[0]

    def to_dict(self) -> dict[str, Any]:
        median, low, high = spread(self.seconds)
        return {
            "model": self.model,
            "seconds": median,
            "seconds_low": low,
            "seconds_high": high,
            "tokens": self.work.tokens,
            "tokens_per_second": self.tokens_per_second,
            "samples_per_second": self.samples_per_second,
            "flops": asdict(self.flops),
            "mfu": self.mfu,
            "hfu": self.hfu,
            "phases_ms": {phase: 1e3 * seconds for phase, seconds in self.phases.items()},
            "losses": self.losses,
            "trained": asdict(self.coverage),
        }


COLUMNS: Columns[StepRow] = (
    ("model", lambda row: row.model),
    ("step ms", lambda row: between(*spread([1e3 * seconds for seconds in row.seconds]))),
    ("tokens", lambda row: str(row.work.tokens)),
    ("tokens/s", lambda row: f"{row.tokens_per_second:.0f}"),
    ("samples/s", lambda row: f"{row.samples_per_second:.2f}"),
    ("TFLOP", lambda row: f"{row.flops.hardware / 1e12:.4g}"),
    ("MFU", lambda row: f"{100 * row.mfu:.1f} %"),
    ("HFU", lambda row: f"{100 * row.hfu:.1f} %"),
    *((f"{phase} ms", lambda row, phase=phase: f"{1e3 * row.phases[phase]:.1f}") for phase in PHASES),
)
