"""What refreshing a cache costs, by the length of the prompt and the size of a block, and where it breaks even.

Counted (FLOPs) and measured (ms): a forward over everything without a cache, one that writes the cache anew (a
refresh), and one of the window alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

from d3llm_ray.benchmark.decoding_report import COUNTING as DECODING
from d3llm_ray.benchmark.measure import decode, engine_for
from d3llm_ray.benchmark.profile import profiled
from d3llm_ray.benchmark.refresh_plan import RefreshPlan
from d3llm_ray.benchmark.report import BenchmarkReport, Columns, between
from d3llm_ray.benchmark.rows import spread
from d3llm_ray.benchmark.shapes import random_model
from d3llm_ray.benchmark.workload import Cell, Workload
from d3llm_ray.decoding import Engine, Event
from d3llm_ray.errors import WorkError
from d3llm_ray.models import Work
from d3llm_ray.progress import Progress

COUNTING = {
    "ms": "of a forward of the batch, with planning, statistics and update, the device synchronised between them: the "
    "mean of a round's forwards of a kind; median, least and greatest of the rounds",
    "full": "a forward over prompt and canvas without a cache",
    "refresh": "likewise with a cache, which it writes anew; prefill and stabilising forwards are such",
    "cached": "a forward of the window alone, with the cache of what stands before it",
    "flops": DECODING["flops"],
    "added": "what a refresh every k forwards adds to a forward, in percent: (refresh / cached - 1) / k; it pays where "
    "it raises tokens per forward by more",
    "break_even": "refresh interval from which a forward with a cache costs less than one without: (refresh - cached) "
    "/ (full - cached); null where it never does",
}


@dataclass(frozen=True)
class ForwardCosts:
    """What a forward of each kind costs, in ms or FLOPs."""

    full: float
    refresh: float
    cached: float

    def added(self, interval: int) -> float:
        """Percent that a refresh every `interval` forwards adds to a mean forward."""
        return 100 * (self.refresh / self.cached - 1) / interval

    @property
    def break_even(self) -> float | None:
        """The least interval at which a mean forward costs no more than one without a cache; never less than 1."""
        if self.cached >= self.full:
            return None
        return max(1.0, (self.refresh - self.cached) / (self.full - self.cached))


@dataclass(frozen=True)
class RefreshRow:
    """One length and block size. `rounds`: ms of each round; `flops`: of a mean forward of each kind."""

    model: str
    prompt_tokens: int
    max_tokens: int
    block_size: int
    intervals: tuple[int, ...]
    rounds: tuple[ForwardCosts, ...]
    flops: ForwardCosts

    @property
    def ms(self) -> ForwardCosts:
        """The median of each kind."""
        return ForwardCosts(*(spread([getattr(each, kind) for each in self.rounds])[0] for kind in KINDS))

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "ms": asdict(self.ms),
            "added": {str(each): self.ms.added(each) for each in self.intervals},
            "added_flops": {str(each): self.flops.added(each) for each in self.intervals},
            "break_even": self.ms.break_even,
            "break_even_flops": self.flops.break_even,
        }


KINDS = {"full": "without cache ms", "refresh": "refresh ms", "cached": "cached ms"}


def columns(intervals: Sequence[int]) -> Columns[RefreshRow]:
    """Of a table with these refresh intervals."""

    def of_kind(row: RefreshRow, kind: str) -> str:
        return between(*spread([getattr(each, kind) for each in row.rounds]), digits=2)

    def or_never(interval: float | None) -> str:
        return "never" if interval is None else f"{interval:.1f}"

    return (
        ("prompt", lambda row: str(row.prompt_tokens)),
        ("block", lambda row: str(row.block_size)),
        *((title, lambda row, kind=kind: of_kind(row, kind)) for kind, title in KINDS.items()),
        ("refresh / cached FLOPs", lambda row: f"{row.flops.refresh / row.flops.cached:.2f}"),
        *((f"added at {each}", lambda row, each=each: f"{row.ms.added(each):+.0f} %") for each in intervals),
        ("break-even", lambda row: or_never(row.ms.break_even)),
        ("by FLOPs", lambda row: or_never(row.flops.break_even)),
    )


def measure_refresh(plan: RefreshPlan, progress: Progress | None = None) -> BenchmarkReport[RefreshRow]:
    """Decode every length by turns of cells and rounds; no files, no Ray.

    Raises:
        InputError: a plan that cannot be carried out, before any weight is made.
        WorkError: a decoder that reuses nothing of its cache at these sizes, so that there is nothing to compare.
    """
    workloads = list(plan.workloads())
    progress = progress or Progress()
    first = workloads[0]
    model = random_model(first.config, first.dtype, first.device, plan.seed)
    progress.start("benchmark", len(workloads) * len(first.cells) * (1 + plan.rounds), "pass")
    rows: list[RefreshRow] = []
    done = 0
    for workload in workloads:
        engine = engine_for(workload, model)
        passes = []
        for _ in range(1 + plan.rounds):
            costs = []
            for cell in workload.cells:
                costs.append(_costs(engine, workload, cell))
                progress.update(done := done + 1)
            pairs = zip(plan.block_sizes, costs[::2], costs[1::2], strict=True)
            passes.append([_compared(plan, *pair) for pair in pairs])
        rounds = passes[1:]  # in the first, allocation and compilation are nobody's
        for block_size, compared in zip(plan.block_sizes, zip(*rounds, strict=True), strict=True):
            ms, flops = zip(*compared, strict=True)  # FLOPs are the same in every round
            given = (workload.model_name, len(workload.prompts[0]), plan.max_tokens, block_size, plan.intervals)
            rows.append(RefreshRow(*given, rounds=ms, flops=flops[0]))
    progress.finish()
    return BenchmarkReport(
        benchmark="refresh",
        plan=asdict(plan),
        rows=tuple(rows),
        ratios=(),
        columns=columns(plan.intervals),
        counting=COUNTING,
    )


def _compared(
    plan: RefreshPlan, block_size: int, plain: dict[str, tuple[float, float]], cached: dict[str, tuple[float, float]]
) -> tuple[ForwardCosts, ForwardCosts]:
    """(ms, FLOPs) of the forwards without a cache and with one."""
    if "cached" not in cached:
        raise WorkError(
            f"block_sizes: with blocks of {block_size} in a canvas of {plan.max_tokens} every forward is a full one"
        )
    ms, flops = (ForwardCosts(*costs) for costs in zip(plain["full"], cached["full"], cached["cached"], strict=True))
    return ms, flops


def _costs(engine: Engine, workload: Workload, cell: Cell) -> dict[str, tuple[float, float]]:
    """Mean (ms, FLOPs) of a forward over everything (`full`) and of one with a cache (`cached`), where there are."""
    taken: dict[str, list[tuple[float, Work]]] = {}

    def step(engine: Engine) -> list[Event]:
        with profiled(engine) as profile:
            events = profile.step(engine)
        kind = "full" if profile.work.tokens == profile.work.keys else "cached"
        taken.setdefault(kind, []).append((sum(profile.seconds.values()), profile.work))
        return events

    list(decode(engine, workload.requests(cell), cell.batch_size, step))
    return {
        kind: (
            1e3 * sum(seconds for seconds, _ in steps) / len(steps),
            workload.config.flops(reduce(add, (work for _, work in steps))) / len(steps),
        )
        for kind, steps in taken.items()
    }
