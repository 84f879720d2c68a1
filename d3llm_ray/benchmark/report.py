"""The report: tables for people, and one line of JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from d3llm_ray.benchmark.machine import Machine
from d3llm_ray.benchmark.plan import Plan
from d3llm_ray.benchmark.ratios import ratios
from d3llm_ray.benchmark.rows import Row
from d3llm_ray.decoding.profile import PHASES
from d3llm_ray.report import WrittenReport, machine, table, versions

# How every figure is counted, in every report: a number without its rule cannot be compared.
COUNTING = {
    "tokens": "tokens before the first stop token, summed over all requests; with synthetic prompts or a scripted TPF "
    "stop tokens mean nothing and every answer fills its canvas",
    "forwards": "model forwards in which a request took part, prefill and refresh included, summed over all requests",
    "steps": "batched forwards, each of all active requests; ms, phases_ms, flops, bytes and roofline_ms are means "
    "over these",
    "tpf": "tokens / forwards",
    "tps": "tokens / seconds; seconds is the wall clock of one pass over all requests at most batch_size at a time, "
    "prefill included, device synchronised, median of the rounds after an untimed pass",
    "phases_ms": "from the untimed pass, with the device synchronised between the phases",
    "flops": "2 x body weights x computed positions + 2 x LM head weights x scored rows + 4 x layers x hidden size x "
    "window x keys, masked pairs included",
    "bytes": "weights once a forward, keys and values of every attended position once, logits written and read once",
    "roofline_percent": "100 x roofline_ms / ms; roofline_ms is max(flops / peak, bytes / bandwidth) of each forward",
    "overhead": "time of an engine step / time of the bare model (forward and LM head on the scored rows) run on the "
    "same windows right behind it; median, first and third quartile of all steps of a pass",
    "ratios": "of tokens/s: median, least and greatest over the rounds, each of two figures from the same round",
}


@dataclass(frozen=True)
class Report(WrittenReport):
    """The measured rows with all that is needed to read them. `memory` is in bytes."""

    plan: Plan
    machine: Machine
    memory_plan: Sequence[str]
    memory: dict[str, Any]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [row.to_dict() for row in self.rows],
            "ratios": [asdict(ratio) for ratio in ratios(self.rows, self.plan.full_length)],
            "roofline": asdict(self.machine),
            "memory": self.memory,
            "plan": asdict(self.plan),
            "machine": machine(),
            "versions": versions(),
            "counting": COUNTING,
        }

    def to_markdown(self) -> str:
        peak = self.memory["peak"] / 2**30
        limit = f"{self.machine.flops / 1e12:.4g} TFLOP/s, {self.machine.bandwidth / 1e9:.4g} GB/s"
        lines = [*self.memory_plan, f"peak memory {peak:.2f} GiB", f"roofline ({self.machine.name}): {limit}"]
        tables = [table(_HEADER, map(_cells, self.rows), left=1)]
        found = ratios(self.rows, self.plan.full_length)
        cells = ([one.name, one.what, f"{one.value:.2f}", f"{one.low:.2f} - {one.high:.2f}"] for one in found)
        tables.append(table(["ratio", "of", "median", "spread"], cells, left=2))
        return "\n".join(["\n".join(lines) + "\n", *tables])


_HEADER = [
    "decoder",
    "batch",
    "canvas",
    "tokens/s",
    "TPF",
    "ms/forward",
    *(f"{phase} ms" for phase in PHASES),
    "window",
    "GFLOP",
    "GB",
    "roofline",
]


def _cells(row: Row) -> list[str]:
    return [
        row.label,
        str(row.batch_size),
        str(row.max_tokens),
        f"{row.tps:.1f} ({row.tps_low:.1f} - {row.tps_high:.1f})",
        f"{row.tpf:.2f}",
        f"{row.ms:.2f}",
        *(f"{row.phases_ms[phase]:.2f}" for phase in PHASES),
        f"{row.window:.0f}",
        f"{row.flops / 1e9:.4g}",
        f"{row.bytes / 1e9:.4g}",
        f"{row.roofline_percent:.1f} %",
    ]
