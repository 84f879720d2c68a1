"""Decode the same prompts in every cell, round by round, and set the bare model's time beside each step.

All cells share one engine, and rounds interleave them (A B A B): what slows a machine down for a while slows all of
them down, so that ratios between cells are steadier than the figures themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from itertools import chain
from operator import add, methodcaller

import numpy as np
import torch

from d3llm_ray.benchmark.decoding_report import COLUMNS, COUNTING
from d3llm_ray.benchmark.machine import Machine, find_machine
from d3llm_ray.benchmark.plan import BenchmarkPlan
from d3llm_ray.benchmark.profile import CapturingRunner, profiled
from d3llm_ray.benchmark.ratios import decoding_ratios
from d3llm_ray.benchmark.report import BenchmarkReport
from d3llm_ray.benchmark.roofline import roofline
from d3llm_ray.benchmark.rows import BenchmarkRow, Round, spread
from d3llm_ray.benchmark.workload import Cell, Workload, prepare
from d3llm_ray.decoding import Completion, Engine, Event, Request
from d3llm_ray.decoding.batch import ModelCall
from d3llm_ray.device import peak_memory, timed
from d3llm_ray.errors import DecodingError
from d3llm_ray.models import Transformer, Work
from d3llm_ray.progress import Progress


@dataclass(frozen=True)
class Trial:
    """What an untimed pass over a cell tells: counts, phases and overhead."""

    completions: list[Completion]
    steps: list[Work]
    overheads: list[float]  # of every step: engine over bare model
    phases: dict[str, float]  # seconds, summed over the steps


@dataclass(frozen=True)
class Measurement:
    """A cell with its trial and its rounds."""

    cell: Cell
    trial: Trial
    rounds: list[Round]


def benchmark(plan: BenchmarkPlan, progress: Progress | None = None) -> BenchmarkReport[BenchmarkRow]:
    """Measure every cell of the plan; no files, no Ray.

    Raises:
        InputError: a plan that cannot be carried out, before any weight is read or made.
    """
    workload = prepare(plan)
    progress = progress or Progress()
    model = workload.load()
    machine = find_machine(plan.machine, workload.device, workload.dtype)
    engine = engine_for(workload, model)
    progress.start("benchmark", len(workload.cells) * (1 + plan.rounds), "pass")
    rows = tuple(decoding_row(workload, machine, taken) for taken in measure(workload, engine, progress))
    progress.finish()
    memory = engine.memory_plan()
    return BenchmarkReport(
        benchmark="decoding",
        plan=asdict(plan),
        rows=rows,
        ratios=tuple(decoding_ratios(rows, plan.full_length)),
        columns=COLUMNS,
        counting=COUNTING,
        roofline=machine,
        memory={**asdict(memory), "peak": peak_memory(workload.device)},
        lines=memory.lines(),
    )


def engine_for(workload: Workload, model: Transformer, *, cuda_graphs: bool | None = None) -> Engine:
    """An engine that decodes every cell of the workload without ever waiting for memory."""
    return Engine(
        model,
        workload.family,
        workload.cells[0].decoder,
        max_batch_size=max(workload.plan.batch_sizes),
        vocabulary_size=workload.vocabulary_size,
        kv_positions=workload.kv_positions,
        cuda_graphs=cuda_graphs,
    )


def measure(workload: Workload, engine: Engine, progress: Progress) -> list[Measurement]:
    """A trial of every cell, then the plan's rounds over all of them."""
    taken: list[Measurement] = []
    for cell in workload.cells:
        taken.append(Measurement(cell, _try(engine, workload.requests(cell), cell, workload.device), []))
        progress.update(len(taken))
    done = len(taken)
    for _ in range(workload.plan.rounds):
        for cell_taken in taken:
            cell = cell_taken.cell
            cell_taken.rounds.append(_round(engine, workload.requests(cell), cell, workload.device))
            done += 1
            progress.update(done, tps=cell_taken.rounds[-1].tps)
    return taken


def decode(
    engine: Engine,
    requests: Sequence[Request],
    batch_size: int,
    step: Callable[[Engine], list[Event]] = methodcaller("step"),
) -> Iterator[list[Completion]]:
    """Decode all requests, `batch_size` at a time whatever the engine could hold; yields what each step completed.

    Raises:
        DecodingError: a request failed; figures of the others would not be those of the plan.
    """
    pending = deque(requests)
    while pending or engine.active:
        while pending and engine.active + engine.waiting < batch_size:
            engine.submit(pending.popleft())
        events = step(engine)
        for event in events:
            if event.error is not None:
                raise DecodingError(event.error)
        yield [event.completion for event in events if event.completion is not None]


def replay(model: Transformer, calls: Iterable[ModelCall]) -> None:
    """The model alone on the same windows: forward and LM head on the same scored rows."""
    with torch.inference_mode():
        for call in calls:
            model.logits(model(*call))


def _try(engine: Engine, requests: Sequence[Request], cell: Cell, device: torch.device) -> Trial:
    list(decode(engine, requests[: cell.batch_size], cell.batch_size))  # allocation, compilation: nobody's forward
    phases = _phases(engine, requests, cell.batch_size)
    completions: list[Completion] = []
    work: list[Work] = []
    overheads: list[float] = []
    steps = decode(engine, requests, cell.batch_size)
    runner = engine.runner
    while True:
        # The bare model right behind each step: both see the machine in the same state, and the cache stays the same.
        engine.runner = captured = CapturingRunner(engine.eager)
        seconds, finished = timed(device, partial(next, steps, None))
        engine.runner = runner
        if finished is None:
            return Trial(completions, work, overheads, phases)
        replayed, _ = timed(device, partial(replay, engine.model, captured.calls))
        completions += finished
        overheads.append(seconds / replayed)
        work.append(reduce(add, (call.layout.work(len(call.scored)) for call in captured.calls)))


def _round(engine: Engine, requests: Sequence[Request], cell: Cell, device: torch.device) -> Round:
    steps = decode(engine, requests, cell.batch_size)
    seconds, finished = timed(device, lambda: list(chain.from_iterable(steps)))
    return Round(count_tokens(finished), seconds)


def count_tokens(completions: Iterable[Completion]) -> int:
    """Tokens of all answers."""
    return sum(len(completion.token_ids) for completion in completions)


def _phases(engine: Engine, requests: Sequence[Request], batch_size: int) -> dict[str, float]:
    """Seconds that one pass spends in each phase; waiting for the device between them slows it down a little."""
    with profiled(engine) as profile:
        list(decode(engine, requests, batch_size, profile.step))
    return profile.seconds


def decoding_row(workload: Workload, machine: Machine, taken: Measurement) -> BenchmarkRow:
    """The figures of a cell, set against what `machine` can do."""
    cell, trial, rounds = taken.cell, taken.trial, taken.rounds
    limit = roofline(workload.config, workload.dtype, trial.steps, machine)
    steps, tokens = len(trial.steps), count_tokens(trial.completions)
    forwards = sum(completion.forwards for completion in trial.completions)
    seconds, _, _ = spread([run.seconds for run in rounds])
    tps, tps_low, tps_high = spread([run.tps for run in rounds])
    overhead_low, overhead, overhead_high = np.quantile(trial.overheads, (0.25, 0.5, 0.75)).tolist()
    return BenchmarkRow(
        model=workload.model_name,
        decoder=cell.decoder.name,
        task=workload.task_name,
        settings={"decoder": cell.decoder.name, **cell.decoder.settings()},
        batch_size=cell.batch_size,
        max_tokens=cell.max_tokens,
        prompt_tokens=sum(map(len, workload.prompts)) / len(workload.prompts),
        count=len(workload.prompts),
        tokens=tokens,
        forwards=forwards,
        steps=steps,
        tpf=tokens / forwards,
        tps=tps,
        tps_low=tps_low,
        tps_high=tps_high,
        seconds=seconds,
        ms=1e3 * seconds / steps,
        phases_ms={phase: 1e3 * total / steps for phase, total in trial.phases.items()},
        window=sum(step.tokens for step in trial.steps) / forwards,
        flops=limit.flops / steps,
        bytes=limit.bytes / steps,
        compute_bound=limit.compute_bound / steps,
        roofline_ms=1e3 * limit.seconds / steps,
        roofline_tps=tokens / limit.seconds,
        roofline_percent=100 * limit.seconds / seconds,
        overhead=overhead,
        overhead_low=overhead_low,
        overhead_high=overhead_high,
        rounds=tuple(rounds),
    )
