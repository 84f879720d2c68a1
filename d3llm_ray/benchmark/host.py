"""The host's share of a step: planning, layouts, selections and updates around a model that costs nothing.

On a GPU this time passes while the device waits, unless it hides behind the forward before. It is measured on the
processor alone, with the real engine grouped and padded as on CUDA; only the model's arithmetic is left out, and its
statistics are drawn in advance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.benchmark.host_plan import HostPlan
from d3llm_ray.benchmark.machine import MACHINES, Machine
from d3llm_ray.benchmark.measure import count_tokens, decode
from d3llm_ray.benchmark.profile import PHASES, profiled
from d3llm_ray.benchmark.report import BenchmarkReport, Columns, between
from d3llm_ray.benchmark.roofline import roofline
from d3llm_ray.benchmark.shapes import SHAPES, random_model
from d3llm_ray.benchmark.workload import synthetic_prompts
from d3llm_ray.decoding import Engine, Event, Request, decoder
from d3llm_ray.decoding.batch import Grouping, ModelCall, StepBatch
from d3llm_ray.decoding.presets import default_decoder
from d3llm_ray.decoding.runners import EagerRunner
from d3llm_ray.decoding.scoring import GREEDY_STATS, Stat
from d3llm_ray.decoding.static import Shape, StaticRunner
from d3llm_ray.decoding.statistics import TokenStatistics, unpack
from d3llm_ray.models import Family, ModelConfig, Work
from d3llm_ray.models.families import read_family
from d3llm_ray.progress import Progress

MEAN_ENTROPY = 3.0  # nats: at the published thresholds it reveals about eight tokens a forward
DRAWN = 1 << 14  # more than a step of 32 requests scores

COUNTING = {
    "ms": "wall clock of a step on the processor: planning, grouping, laying out, packing and copying the batch, "
    "reading the statistics, selection and update; the model, the LM head and the statistics' arithmetic are left out; "
    "median of all steps, with their quartiles",
    "cpu_ms": "the same in processor time of the thread, which other processes do not lengthen",
    "phases_ms": "means of a pass of its own, with a clock read between the phases",
    "static": "share of the steps that run in static shapes, as CUDA graphs do",
    "tpf": "tokens / forwards: how much there is to select and to update",
    "forward_ms": "roofline of the same windows in bfloat16 on the named machine, of the shape's real size",
    "hidden": "ms / forward_ms: below 1 the host is ready before the device",
}


@dataclass(frozen=True)
class HostRow:
    """One batch size; times in milliseconds a step."""

    batch_size: int
    steps: int
    ms: float
    ms_low: float
    ms_high: float
    cpu_ms: float
    phases_ms: dict[str, float]
    static: float
    tpf: float
    forward_ms: float

    @property
    def hidden(self) -> float:
        return self.ms / self.forward_ms

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hidden": self.hidden}


COLUMNS: Columns[HostRow] = (
    ("batch", lambda row: str(row.batch_size)),
    ("ms a step", lambda row: between(row.ms, row.ms_low, row.ms_high, 3)),
    ("CPU ms", lambda row: f"{row.cpu_ms:.3f}"),
    *((f"{phase} ms", lambda row, phase=phase: f"{row.phases_ms[phase]:.3f}") for phase in PHASES),
    ("static", lambda row: f"{100 * row.static:.0f} %"),
    ("TPF", lambda row: f"{row.tpf:.2f}"),
    ("forward ms", lambda row: f"{row.forward_ms:.2f}"),
    ("share of it", lambda row: f"{100 * row.hidden:.0f} %"),
)


class _Drawn:
    """Statistics that a model might have said, from a store that is read round and round."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        store = np.zeros((GREEDY_STATS, DRAWN), dtype=np.float32)
        store[Stat.ARGMAX] = rng.integers(vocabulary // 2, size=DRAWN)
        store[Stat.ENTROPY] = rng.exponential(MEAN_ENTROPY, DRAWN)
        store[Stat.LOGPROB] = -store[Stat.ENTROPY] / 2
        self._store, self._at = torch.from_numpy(store), 0

    def take(self, rows: int) -> Tensor:
        """[GREEDY_STATS, rows], a view."""
        begin = self._at if self._at + rows <= DRAWN else 0
        self._at = begin + rows
        return self._store[:, begin : begin + rows]


class CostlessEager(EagerRunner):
    """Lays the batch out as ever, and leaves the model out."""

    drawn: _Drawn

    def compute(self, calls: Sequence[ModelCall]) -> Tensor:
        return self.drawn.take(sum(len(call.scored) for call in calls))

    def statistics(self, batch: StepBatch, computed: Tensor) -> TokenStatistics:
        return unpack(computed.numpy())


class CostlessStatic(StaticRunner):
    """Packs and copies the batch as ever, and leaves the replay out."""

    drawn: _Drawn
    steps = 0

    def compute(self, shape: Shape) -> Tensor:
        return self.drawn.take(shape.scored)

    def statistics(self, batch: StepBatch, computed: Tensor) -> TokenStatistics:
        self.steps += self.padded
        return super().statistics(batch, computed)


def measure_host(plan: HostPlan, progress: Progress | None = None) -> BenchmarkReport[HostRow]:
    """Measure every batch size, round by round; no GPU, no files.

    Raises:
        InputError: a prompt and canvas that exceed the shape's context, or a decoder that cannot decode the family.
    """
    progress = progress or Progress()
    config, family = read_family(SHAPES[plan.shape], {})
    engines = {size: _engine(plan, config, family, size) for size in plan.batch_sizes}
    prompts = synthetic_prompts(family, config.vocab_size, plan.count, plan.prompt_tokens, plan.seed)
    requests = [Request(ids, plan.max_tokens, ignore_eos=True) for ids in prompts]
    times: dict[int, list[tuple[float, float]]] = {size: [] for size in plan.batch_sizes}
    with progress.stage("host", plan.rounds * len(engines), "pass"):
        for number in range(plan.rounds):
            for place, (size, engine) in enumerate(engines.items()):
                times[size] += list(_timed_steps(engine, requests, size))
                progress.update(number * len(engines) + place + 1)
    machine = MACHINES[plan.machine]
    rows = tuple(_row(engine, config, machine, requests, size, times[size]) for size, engine in engines.items())
    return BenchmarkReport(
        benchmark="host",
        plan=asdict(plan),
        rows=rows,
        ratios=(),
        columns=COLUMNS,
        counting=COUNTING,
        roofline=machine,
    )


def _engine(plan: HostPlan, config: ModelConfig, family: Family, batch_size: int) -> Engine:
    """An engine whose model has the shape's vocabulary and context, and next to no width."""
    narrow = dataclasses.replace(config, hidden_size=2, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=1)
    length = plan.prompt_tokens + plan.max_tokens
    engine = Engine(
        random_model(narrow, torch.float32, torch.device("cpu"), plan.seed),
        family,
        decoder(plan.decoder or default_decoder(family)),
        max_batch_size=batch_size,
        kv_positions=2 * batch_size * length,
        cuda_graphs=True,
    )
    engine.grouping = Grouping.on(torch.device("cuda"))
    eager = CostlessEager(engine.model, engine.eager.cache, engine.vocabulary_size, family.mask_token_id)
    static = CostlessStatic(eager, capture=False)
    eager.drawn = static.drawn = _Drawn(config.vocab_size, plan.seed)
    engine.runner = static
    return engine


def _timed_steps(engine: Engine, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[float, float]]:
    """(seconds, processor seconds) of every step of one pass."""
    taken: list[tuple[float, float]] = []

    def step(engine: Engine) -> list[Event]:
        began, cpu = perf_counter(), thread_time()
        events = engine.step()
        taken.append((perf_counter() - began, thread_time() - cpu))
        return events

    for _ in decode(engine, requests, batch_size, step):
        yield taken.pop()


def _row(
    engine: Engine,
    config: ModelConfig,
    machine: Machine,
    requests: Sequence[Request],
    batch_size: int,
    times: Sequence[tuple[float, float]],
) -> HostRow:
    static = engine.runner
    assert isinstance(static, CostlessStatic)
    before, steps = static.steps, engine.steps
    with profiled(engine) as profile:
        completions = [done for finished in decode(engine, requests, batch_size, profile.step) for done in finished]
    steps = engine.steps - steps
    work = profile.work
    mean = Work(work.tokens // steps, work.attended // steps, work.keys // steps, work.scored // steps)
    low, middle, high = (1e3 * np.quantile([wall for wall, _ in times], (0.25, 0.5, 0.75))).tolist()
    return HostRow(
        batch_size=batch_size,
        steps=len(times),
        ms=middle,
        ms_low=low,
        ms_high=high,
        cpu_ms=1e3 * median(cpu for _, cpu in times),
        phases_ms={phase: 1e3 * seconds / steps for phase, seconds in profile.seconds.items()},
        static=(static.steps - before) / steps,
        tpf=count_tokens(completions) / sum(completion.forwards for completion in completions),
        forward_ms=1e3 * roofline(config, torch.bfloat16, [mean], machine).seconds,
    )
