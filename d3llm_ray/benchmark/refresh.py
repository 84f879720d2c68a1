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

from d3llm_ray.benchmark.measure import decode, engine_for
from d3llm_ray.benchmark.profile import profiled
from d3llm_ray.benchmark.refresh_plan import RefreshPlan
from d3llm_ray.benchmark.report import BenchmarkReport, Columns, between
from d3llm_ray.benchmark.rows import spread
from d3llm_ray.benchmark.shapes import random_model
from d3llm_ray.benchmark.workload import Cell, Workload
from d3llm_ray.decoding import Engine
from d3llm_ray.errors import WorkError
from d3llm_ray.models import Work
from d3llm_ray.progress import Progress

COUNTING = {
    "ms": "of a forward of the batch, with planning, statistics and update, the device synchronised between them: the "
    "mean of a round's forwards of a kind; median, least and greatest of the rounds",
    "full": "a forward over prompt and canvas without a cache",
    "refresh": "likewise with a cache, which it writes anew; prefill and stabilising forwards are such",
    "cached": "a forward of the window alone, with the cache of what stands before it",
    "flops": "2 x body weights x computed positions + 2 x LM head weights x scored rows + 4 x layers x hidden size x "
    "window x keys, masked pairs included",
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


KINDS = ("full", "refresh", "cached")
_TITLES = {"full": "without cache ms", "refresh": "refresh ms", "cached": "cached ms"}


def columns(intervals: Sequence[int]) -> Columns[RefreshRow]:
    """Of a table with these refresh intervals."""

    def of_kind(row: RefreshRow, kind: str) -> str:
        return between(*spread([getattr(each, kind) for each in row.rounds]), digits=2)

    def or_never(interval: float | None) -> str:
        return "never" if interval is None else f"{interval:.1f}"

    return (
        ("prompt", lambda row: str(row.prompt_tokens)),
        ("block", lambda row: str(row.block_size)),
        *((_TITLES[kind], lambda row, kind=kind: of_kind(row, kind)) for kind in KINDS),
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
        for cell in workload.cells:  # allocation and compilation are nobody's
            _costs(engine, workload, cell)
            progress.update(done := done + 1)
        rounds: list[list[dict[str, tuple[float, float]]]] = []
        for _ in range(plan.rounds):
            rounds.append([])
            for cell in workload.cells:
                rounds[-1].append(_costs(engine, workload, cell))
                progress.update(done := done + 1)
        for place, block_size in enumerate(plan.block_sizes):
            pairs = [(each[2 * place], each[2 * place + 1]) for each in rounds]
            rows.append(_row(plan, workload, block_size, pairs))
    progress.finish()
    return BenchmarkReport(
        benchmark="refresh",
        plan=asdict(plan),
        rows=tuple(rows),
        ratios=(),
        columns=columns(plan.intervals),
        counting=COUNTING,
    )


def _row(
    plan: RefreshPlan,
    workload: Workload,
    block_size: int,
    pairs: Sequence[tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]],
) -> RefreshRow:
    """`pairs`: of each round, what forwards cost without a cache and with one."""
    length = len(workload.prompts[0])
    for _, cached in pairs:
        if "cached" not in cached:
            raise WorkError(
                f"block_sizes: with blocks of {block_size} in a canvas of {plan.max_tokens} every forward is a full one"
            )
    costs = [
        [ForwardCosts(plain["full"][unit], cached["full"][unit], cached["cached"][unit]) for plain, cached in pairs]
        for unit in (0, 1)
    ]
    given = (workload.model_name, length, plan.max_tokens, block_size, plan.intervals)
    return RefreshRow(*given, rounds=tuple(costs[0]), flops=costs[1][0])  # FLOPs are the same in every round


def _costs(engine: Engine, workload: Workload, cell: Cell) -> dict[str, tuple[float, float]]:
    """Mean (ms, FLOPs) of a forward over everything (`full`) and of one with a cache (`cached`), where there are."""
    taken: dict[str, list[tuple[float, Work]]] = {}
    with profiled(engine) as profile:
        before, work_before = 0.0, Work(0, 0, 0, 0)
        for _ in decode(engine, workload.requests(cell), cell.batch_size, profile.step):
            after, work = sum(profile.seconds.values()), profile.work
            computed, keys = work.tokens - work_before.tokens, work.keys - work_before.keys
            step = Work(computed, work.attended - work_before.attended, keys, work.scored - work_before.scored)
            taken.setdefault("full" if computed == keys else "cached", []).append((after - before, step))
            before, work_before = after, work
    config = workload.config
    return {
        kind: (
            1e3 * sum(seconds for seconds, _ in steps) / len(steps),
            config.flops(reduce(add, (step for _, step in steps))) / len(steps),
        )
        for kind, steps in taken.items()
    }
