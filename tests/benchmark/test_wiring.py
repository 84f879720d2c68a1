"""Every field of a benchmark's plan, set to a value of its own, arrives in what is measured."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3llm_ray.benchmark import distill, host, measure, refresh, run, step, workload
from d3llm_ray.benchmark import trajectories as of_trajectories
from d3llm_ray.benchmark.distill import DistillBenchmarkSettings
from d3llm_ray.benchmark.host_plan import HostPlan
from d3llm_ray.benchmark.machine import MACHINES, find_machine
from d3llm_ray.benchmark.plan import BenchmarkPlan
from d3llm_ray.benchmark.refresh_plan import RefreshPlan
from d3llm_ray.benchmark.settings import (
    BenchmarkSettings,
    HostBenchmarkSettings,
    PlanSettings,
    RefreshBenchmarkSettings,
    StepBenchmarkSettings,
)
from d3llm_ray.benchmark.step_plan import StepPlan
from d3llm_ray.benchmark.trajectories import TrajectoryBenchmarkSettings
from d3llm_ray.benchmark.workload import prepare
from d3llm_ray.config import build, parse
from d3llm_ray.decoding import Request, decoder
from d3llm_ray.decoding.selections import Scripted
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import load_task
from d3llm_ray.trajectories.settings import TrajectorySettings

QUIET = Progress(quiet=True)
DECODING: dict[str, Any] = {
    "model": None, "shape": "small", "task": None, "prompt_tokens": 9, "count": 5, "decoders": ("d3llm", "vanilla"),
    "suffixes": ("none", "cached"), "batch_sizes": (2, 3), "max_tokens": (16, 32),
    "decoder_settings": {"cache_delay": 2}, "scripted_tpf": 4.0, "rounds": 2,
    "machine": "h200", "dtype": "bfloat16", "device": "cpu", "seed": 7,
}  # fmt: skip
STEP: dict[str, Any] = {
    "model": None, "shape": "small", "micro_batch_size": 3, "prompt_tokens": 6, "answer_tokens": 16, "window": 8,
    "mask_ratio": 0.25, "complement": False, "lora_rank": 2, "precision": "mixed", "activation_checkpointing": False,
    "head_rows": 7, "accumulation": 2, "warmup_steps": 2, "steps": 4, "machine": "h200", "device": "cpu", "seed": 7,
}  # fmt: skip
HOST: dict[str, Any] = {
    "shape": "small", "decoder": "d3llm-nocache", "prompt_tokens": 9, "max_tokens": 16, "batch_sizes": (2, 3),
    "count": 5, "rounds": 2, "machine": "h200", "seed": 7,
}  # fmt: skip


REFRESH: dict[str, Any] = {
    "model": None, "shape": "small", "prompt_tokens": (9, 12), "block_sizes": (8,), "intervals": (3, 5),
    "max_tokens": 16, "tpf": 4.0, "batch_size": 2, "count": 3, "rounds": 2, "dtype": "bfloat16", "device": "cpu",
    "seed": 7,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings_class", "plan_class", "values", "runs", "measures"),
    [
        (BenchmarkSettings, BenchmarkPlan, DECODING, run.run, "benchmark"),
        (StepBenchmarkSettings, StepPlan, STEP, run.run_step, "measure_step"),
        (HostBenchmarkSettings, HostPlan, HOST, run.run_host, "measure_host"),
        (RefreshBenchmarkSettings, RefreshPlan, REFRESH, run.run_refresh, "measure_refresh"),
    ],
    ids=["decoding", "step", "host", "refresh"],
)
def test_the_settings_of_a_verb_are_the_plan_that_is_measured(
    settings_class: type[PlanSettings],
    plan_class: Any,
    values: dict[str, Any],
    runs: Any,
    measures: str,
    small_shape: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list(values) == [field.name for field in fields(plan_class)]
    measured: list[Any] = []
    kept: list[Any] = []
    monkeypatch.setattr(run, measures, lambda plan, *rest: measured.append((plan, *rest)) or "report")
    monkeypatch.setattr(run, "keep", lambda *given: kept.append(given))
    monkeypatch.setattr(run, "can_plot", lambda _: False)
    settings = build(settings_class, {**values, "output": tmp_path / "out"})
    runs(settings, *([QUIET] if measures != "measure_step" else []))
    plan = plan_class(**values)
    assert measured == [(plan, *([QUIET] if measures != "measure_step" else []))]
    assert kept == [("report", settings, tmp_path / "out")]


# --- decoding


def test_every_field_of_the_decoding_plan_arrives(small_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BenchmarkPlan(**DECODING)
    work = prepare(plan)
    assert (work.model_name, work.task_name, work.dtype, work.device) == (
        "small", "synthetic", torch.bfloat16, torch.device("cpu"),
    )  # fmt: skip
    bases = [decoder("d3llm", cache_delay=2, suffix=suffix) for suffix in ("none", "cached")] + [decoder("vanilla")]
    assert [(cell.decoder, cell.max_tokens, cell.batch_size) for cell in work.cells] == [
        (base.scripted(4.0), tokens, size) for base in bases for tokens in (16, 32) for size in (2, 3)
    ]
    assert isinstance(work.cells[0].decoder.selection, Scripted)
    assert [len(prompt) for prompt in work.prompts] == [9] * 5
    assert prepare(BenchmarkPlan(**DECODING)).prompts == work.prompts
    assert prepare(BenchmarkPlan(**{**DECODING, "seed": 8})).prompts != work.prompts
    cell = work.cells[3]
    assert work.requests(cell) == [
        Request(ids, cell.max_tokens, seed=7, decoder=cell.decoder, ignore_eos=True) for ids in work.prompts
    ]
    spoken = prepare(BenchmarkPlan(model="tiny-llada", task="arith-long", count=2, batch_sizes=(1,), max_tokens=(8,)))
    assert not spoken.requests(spoken.cells[0])[0].ignore_eos and spoken.task_name == "arith-long"
    questions = [problem.messages[-1]["content"] for problem in load_task("arith-long").problems("test", 2)]
    tokenizer = workload.load_tokenizer("tiny-llada", spoken.family)
    assert tokenizer is not None
    assert all(question in tokenizer.decode(ids) for question, ids in zip(questions, spoken.prompts, strict=True))

    made: list[Any] = []
    monkeypatch.setattr(workload, "random_model", lambda *given: made.append(given))
    work.load()
    monkeypatch.setattr(workload, "load_model", lambda *given: made.append(given) or (None, None))
    prepare(BenchmarkPlan(model="tiny-dream", dtype="float16", count=1, batch_sizes=(1,))).load()
    assert made == [
        (work.config, torch.bfloat16, torch.device("cpu"), 7),
        ("tiny-dream", "float16", torch.device("cpu")),
    ]


def test_every_cell_is_tried_once_and_measured_in_every_round(
    small_shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the named machine, with an engine that holds the largest batch; figures are medians of the rounds."""
    plan = BenchmarkPlan(**{**DECODING, "decoders": ("d3llm",), "suffixes": (), "max_tokens": (16,), "rounds": 3})
    sheets: list[Any] = []
    engines: list[dict[str, Any]] = []
    batches: list[tuple[int, int]] = []
    real, decode = measure.Engine, measure.decode
    monkeypatch.setattr(measure, "find_machine", lambda *given: sheets.append(given) or find_machine(*given))
    monkeypatch.setattr(measure, "Engine", lambda *rest, **options: engines.append(options) or real(*rest, **options))

    def watch(engine: Any, requests: Any, batch_size: int, *rest: Any) -> Any:
        batches.append((batch_size, len(requests)))
        return decode(engine, requests, batch_size, *rest)

    monkeypatch.setattr(measure, "decode", watch)
    report = measure.benchmark(plan, QUIET)
    assert sheets == [("h200", torch.device("cpu"), torch.bfloat16)] and report.roofline == MACHINES["h200"]
    (options,) = engines
    positions = 2 * 3 * (9 + 32)  # a canvas is one block of 32 at least
    assert options == {
        "max_batch_size": 3, "vocabulary_size": 128, "kv_positions": positions, "cuda_graphs": None,
    }  # fmt: skip
    trial = [(2, 2), (2, 5), (2, 5), (3, 3), (3, 5), (3, 5)]  # warm-up, phases, steps
    assert batches == trial + [(2, 5), (3, 5)] * 3
    for row in report.rows:
        assert len(row.rounds) == 3 and row.count == 5
        rates = sorted(one.tokens / one.seconds for one in row.rounds)
        assert (row.tps_low, row.tps, row.tps_high) == tuple(rates)
        assert row.seconds == sorted(one.seconds for one in row.rounds)[1]
        assert row.overhead_low <= row.overhead <= row.overhead_high


# --- a refresh


def test_every_field_of_the_refresh_plan_arrives(small_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = RefreshPlan(**REFRESH)
    workloads = list(plan.workloads())
    cells = [
        (decoder("d3llm-nocache", block_size=8).scripted(4.0), 2, 16),
        (decoder("d3llm", block_size=8, refresh_interval=3).scripted(4.0), 2, 16),
    ]
    for length, work in zip((9, 12), workloads, strict=True):
        assert [(cell.decoder, cell.batch_size, cell.max_tokens) for cell in work.cells] == cells
        assert [len(prompt) for prompt in work.prompts] == [length] * 3
        assert (work.dtype, work.device, work.plan.seed) == (torch.bfloat16, torch.device("cpu"), 7)
    made: list[Any] = []
    monkeypatch.setattr(refresh, "random_model", lambda *given: made.append(given))
    monkeypatch.setattr(refresh, "engine_for", lambda *given: made.append(given))
    costs = {"full": (3.0, 30.0), "cached": (1.0, 10.0)}
    monkeypatch.setattr(refresh, "_costs", lambda engine, work, cell: made.append(cell.decoder.name) or costs)
    report = refresh.measure_refresh(plan, QUIET)
    assert made[0] == (workloads[0].config, torch.bfloat16, torch.device("cpu"), 7)
    assert made.count("d3llm") == made.count("d3llm-nocache") == 2 * (1 + 2)  # lengths x (trial and rounds)
    assert [(len(row.rounds), row.intervals, row.flops.cached) for row in report.rows] == [(2, (3, 5), 10.0)] * 2


# --- an optimizer step


class Made(Exception):
    """All parts of a step have been made."""


def test_every_field_of_the_step_plan_arrives(small_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = StepPlan(**STEP)
    seen: dict[str, Any] = {}
    real_module, real_engine, real_lora = step.LossModule, step.torch_engine, step.add_lora
    shares: list[Any] = []

    def module(model: Any, objective: Any, **options: Any) -> Any:
        seen.update(objective=objective, **options)
        return real_module(model, objective, **options)

    def engine(made: Any, options: Any) -> Any:
        seen.update(engine=options)
        return real_engine(made, options)

    def lora(model: Any, **options: Any) -> Any:
        seen.update(lora=options, dtype={parameter.dtype for parameter in model.parameters()})
        return real_lora(model, **options)

    take = step.optimizer_step

    def watch(*given: Any, share: Any, **options: Any) -> torch.Tensor:
        shares.append(share)
        return take(*given, share=share, **options)

    sheets: list[Any] = []
    planned: list[dict[str, Any]] = []
    remembered = step.plan_memory
    monkeypatch.setattr(step, "LossModule", module)
    monkeypatch.setattr(step, "torch_engine", engine)
    monkeypatch.setattr(step, "add_lora", lora)
    monkeypatch.setattr(step, "optimizer_step", watch)
    monkeypatch.setattr(step, "recompute_layers", lambda _: seen.update(recomputed=True))
    monkeypatch.setattr(step, "find_machine", lambda *given: sheets.append(given) or find_machine(*given))
    monkeypatch.setattr(
        step, "plan_memory", lambda config, **options: planned.append(options) or remembered(config, **options)
    )
    (row,) = step.measure_step(plan).rows
    objective = seen["objective"]
    assert objective == plan.objective and objective.window_sizes == (8,) and objective.complement_weight == 0.0
    assert objective.noise_start == objective.noise_end == objective.noise_max == 0.25
    assert (seen["head_rows"], seen["autocast"]) == (7, True)
    chosen = seen["engine"]
    assert (chosen.micro_batch_size, chosen.accumulation, chosen.bfloat16) == (3, 2, False)
    assert (seen["lora"]["rank"], seen["lora"]["alpha"], seen["dtype"]) == (2, 2, {torch.float32})
    assert "recomputed" not in seen
    assert sheets == [("h200", torch.device("cpu"), torch.bfloat16)]
    assert len(shares) == 2 + 4 + 1 and len(row.seconds) == 4 and len(row.losses) == 7
    for share in shares:
        assert len(share) == 2 and all(micro.token_ids.size == 3 * (6 + 16) for micro in share)
        assert all(micro.labels.size == 3 * 2 for micro in share)  # a quarter of a window of 8
    asked = {
        "rank": 2, "precision": "mixed", "micro_batch_size": 3, "longest_row": 22, "rows_per_sample": 1,
        "supervised_rows": 6, "head_rows": 7, "activation_checkpointing": False,
    }  # fmt: skip
    assert {name: planned[0][name] for name in asked} == asked
    assert row.samples == 6

    other = StepPlan(
        **{**STEP, "precision": "bfloat16", "activation_checkpointing": True, "complement": True, "steps": 1}
    )
    step.measure_step(other)
    assert seen["recomputed"] and seen["dtype"] == {torch.bfloat16} and seen["engine"].bfloat16
    assert not seen["autocast"] and seen["objective"].complement_weight == 0.25 and planned[1]["rows_per_sample"] == 2
    again = len(shares)
    step.measure_step(StepPlan(**{**STEP, "steps": 1}))
    step.measure_step(StepPlan(**{**STEP, "steps": 1, "seed": 8}))
    repeated, reseeded = shares[again], shares[again + 4]
    first, same, other = (share[0].token_ids.tolist() for share in (shares[0], repeated, reseeded))
    assert same == first and other[:6] != first[:6]  # the prompt, of which nothing is masked


# --- the host's share


def test_every_field_of_the_host_plan_arrives(small_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = HostPlan(**HOST)
    engines: list[tuple[Any, dict[str, Any]]] = []
    passes: list[tuple[int, Any]] = []
    real, decode = host.Engine, host.decode

    def engine(*rest: Any, **options: Any) -> Any:
        engines.append((rest[2], options))
        return real(*rest, **options)

    def watch(made: Any, requests: Any, batch_size: int, *rest: Any) -> Any:
        passes.append((batch_size, requests))
        return decode(made, requests, batch_size, *rest)

    monkeypatch.setattr(host, "Engine", engine)
    monkeypatch.setattr(host, "decode", watch)
    limits: list[Any] = []
    roof = host.roofline
    monkeypatch.setattr(host, "roofline", lambda *given: limits.append(given) or roof(*given))
    report = host.measure_host(plan, QUIET)
    assert engines == [
        (
            decoder("d3llm-nocache"),
            {"max_batch_size": size, "kv_positions": 2 * size * (9 + 16), "cuda_graphs": True},
        )
        for size in (2, 3)
    ]
    assert [size for size, _ in passes] == [2, 3] * 2 + [2, 3]  # two rounds, and the pass for the phases
    requests = passes[0][1]
    assert [len(request.prompt_ids) for request in requests] == [9] * 5
    assert {(request.max_tokens, request.ignore_eos) for request in requests} == {(16, True)}
    assert [row.batch_size for row in report.rows] == [2, 3] and report.roofline == MACHINES["h200"]
    assert all(given[0].hidden_size == 32 and given[3] == MACHINES["h200"] for given in limits)
    again = host.measure_host(HostPlan(**{**HOST, "seed": 8, "rounds": 1}), QUIET)
    assert passes[6][1][0].prompt_ids != requests[0].prompt_ids and again.rows


# --- jobs


def test_a_measured_distillation_has_the_settings_of_the_benchmark() -> None:
    words = ["--config", "dream", "--workers", "4", "--seed", "9", "--keep", "correct", "--max-steps", "40"]
    settings, _ = parse(DistillBenchmarkSettings, words)
    job = settings.of_job("rows", "student", 2)
    changed = {"trajectories": "rows", "output": "student", "workers": 2}
    assert type(job) is DistillSettings
    for name in DistillSettings.model_fields:
        assert getattr(job, name) == changed.get(name, getattr(settings, name)), name
    plain = build(DistillSettings, changed)
    assert len([name for name in DistillSettings.model_fields if getattr(job, name) != getattr(plain, name)]) > 8


def test_a_teacher_decodes_as_many_rows_as_the_steps_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[TrajectorySettings] = []
    monkeypatch.setattr(distill, "write_trajectories", lambda settings, _: asked.append(settings))
    values = {
        "teacher": "tiny-dream",
        "batch_size": 6,
        "micro_batch_size": 2,
        "workers": 1,
        "max_steps": 10,
        "epochs": 3,
    }
    settings = build(DistillBenchmarkSettings, values)
    assert distill._decode(settings, tmp_path / "rows", QUIET) == str(tmp_path / "rows")
    assert asked == [
        build(TrajectorySettings, {"teacher": "tiny-dream", "count": 24, "output": str(tmp_path / "rows")})
    ]


def test_a_measured_trajectory_job_has_the_settings_of_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "teacher": "tiny-dream", "prompts": "arith-long", "count": 7, "max_tokens": 32, "seed": 9, "actors": 4,
        "attempts": 2, "temperatures": (0.1, 0.2), "max_batch_size": 3, "keep": "correct", "rows_per_block": 5,
        "decoder": "vanilla", "decoder_settings": {"steps": 8}, "split": "test", "output": str(tmp_path),
    }  # fmt: skip
    settings = build(TrajectoryBenchmarkSettings, values)
    asked: list[TrajectorySettings] = []

    def job(given: TrajectorySettings, progress: Progress) -> None:
        asked.append(given)
        Path(given.output).mkdir()
        (Path(given.output) / "summary.json").write_text('{"seconds": 2.5}')

    rows = [{"response_ids": [1, 2], "reveal_step": [0, 1], "forwards": 2}]
    monkeypatch.setattr(of_trajectories, "write_trajectories", job)
    monkeypatch.setattr(
        of_trajectories, "read_trajectories", lambda output, columns: SimpleNamespace(to_pylist=lambda: rows)
    )
    found = of_trajectories._job(settings, str(tmp_path / "job"), 3, QUIET)
    assert found == (2.5, [([1, 2], [0, 1], 2)])
    changed = {"output": str(tmp_path / "job"), "actors": 3, "keep": "all"}
    for name in TrajectorySettings.model_fields:
        assert getattr(asked[0], name) == changed.get(name, getattr(settings, name)), name
    teachers: list[Any] = []

    class FakeTeacher:
        def __init__(self, given: TrajectorySettings, task: Any) -> None:
            teachers.append((given.max_batch_size, given.teacher, task))

        def rows(self, prompts: Any) -> list[dict[str, Any]]:
            teachers.append(len(prompts))
            return rows * len(prompts)

    monkeypatch.setattr(of_trajectories, "Teacher", FakeTeacher)
    source: Any = SimpleNamespace(task="task")
    _, decoded = of_trajectories._loop(settings, source, ["a", "b", "c"], 2)  # type: ignore[list-item]
    assert teachers == [(2, "tiny-dream", "task"), 1, 3] and len(decoded) == 3
