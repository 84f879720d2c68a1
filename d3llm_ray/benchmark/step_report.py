"""The report of a step benchmark: a table for people, and one line of JSON for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from d3llm_ray.benchmark.machine import Machine
from d3llm_ray.benchmark.rows import spread
from d3llm_ray.benchmark.step_flops import StepFlops
from d3llm_ray.distillation.lora import Coverage
from d3llm_ray.distillation.memory import TrainingMemoryPlan
from d3llm_ray.models import Work
from d3llm_ray.report import WrittenReport, machine, table, versions

if TYPE_CHECKING:
    from d3llm_ray.benchmark.step import StepPlan

# How every figure is counted, in every report: a number without its rule cannot be compared.
COUNTING = {
    "seconds": "median of the timed optimizer steps, each with the device synchronised: batches put on the device, "
    "forward, backward, clipping and AdamW; corruption and packing are done beforehand",
    "tokens": "forwarded tokens of a step, prompt and masked canvas: accumulation x rows x views x row length, with 2 "
    "views of a row where there is a complement",
    "samples_per_second": "rows of a step / seconds; a row counts once, however many views it has",
    "flops": "matrices 2 x weights x tokens in a forward, with the adapters'; as much for the gradients of inputs and "
    "again for those of trained weights; LM head on the supervised rows; attention 4 x layers x hidden size x pairs in "
    "a forward, twice that in a backward pass; recomputed: the layers' forward again with activation checkpointing; "
    "the optimizer's are left out",
    "mfu": "(forward + backward) flops / seconds / peak",
    "hfu": "(forward + backward + recomputed) flops / seconds / peak",
    "phases_ms": "of one more step, with the device synchronised between the phases",
    "memory": "GiB; peak: of PyTorch's allocations in the timed steps on a GPU, otherwise of the whole process",
}


@dataclass(frozen=True)
class StepReport(WrittenReport):
    """What was measured. `seconds` of each timed step, `phases` in seconds of one more, `losses` of all steps."""

    plan: StepPlan
    machine: Machine
    coverage: Coverage
    memory_plan: TrainingMemoryPlan
    peak_gib: float
    work: Work  # of a step
    flops: StepFlops
    seconds: tuple[float, ...]
    phases: dict[str, float]
    losses: tuple[float, ...]

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: what has to be computed, over what the machine could have."""
        return self.flops.model / spread(self.seconds)[0] / self.machine.flops

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: likewise, recomputed activations included."""
        return self.flops.hardware / spread(self.seconds)[0] / self.machine.flops

    def to_dict(self) -> dict[str, Any]:
        median, low, high = spread(self.seconds)
        return {
            "seconds": median,
            "seconds_low": low,
            "seconds_high": high,
            "tokens": self.work.tokens,
            "tokens_per_second": self.work.tokens / median,
            "samples_per_second": self.plan.rows * self.plan.accumulation / median,
            "flops": asdict(self.flops),
            "mfu": self.mfu,
            "hfu": self.hfu,
            "phases_ms": {phase: 1e3 * seconds for phase, seconds in self.phases.items()},
            "losses": self.losses,
            "memory": {"planned": self.memory_plan.total / 2**30, "peak": self.peak_gib},
            "trained": asdict(self.coverage),
            "plan": asdict(self.plan),
            "peak": asdict(self.machine),
            "machine": machine(),
            "versions": versions(),
            "counting": COUNTING,
        }

    def to_markdown(self) -> str:
        found = self.to_dict()
        rate = f"{self.machine.flops / 1e12:.4g} TFLOP/s"
        lines = [str(self.coverage), str(self.memory_plan), f"peak memory {self.peak_gib:.3f} GiB"]
        lines.append(f"peak ({self.machine.name}): {rate}\n\n")
        header = ["step ms", "tokens", "tokens/s", "samples/s", "TFLOP", "MFU", "HFU"]
        header += [f"{phase} ms" for phase in self.phases]
        cells = [
            f"{1e3 * found['seconds']:.1f} ({1e3 * found['seconds_low']:.1f} - {1e3 * found['seconds_high']:.1f})",
            str(found["tokens"]),
            f"{found['tokens_per_second']:.0f}",
            f"{found['samples_per_second']:.2f}",
            f"{self.flops.hardware / 1e12:.4g}",
            f"{100 * self.mfu:.1f} %",
            f"{100 * self.hfu:.1f} %",
            *(f"{ms:.1f}" for ms in found["phases_ms"].values()),
        ]
        return "\n".join(lines) + table(header, [cells], left=0)
