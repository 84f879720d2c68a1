"""The whole verb, on a shape and on a checkpoint small enough for a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import reduce
from itertools import chain
from operator import add
from pathlib import Path
from statistics import median
from time import sleep

import pytest
import torch
import yaml

from d3llm_ray.benchmark.decoding_report import COUNTING
from d3llm_ray.benchmark.measure import benchmark, decode, measure, replay
from d3llm_ray.benchmark.plan import BenchmarkPlan
from d3llm_ray.benchmark.profile import CapturingRunner, profiled
from d3llm_ray.benchmark.report import BenchmarkReport
from d3llm_ray.benchmark.rows import BenchmarkRow
from d3llm_ray.benchmark.shapes import SHAPES
from d3llm_ray.benchmark.workload import prepare
from d3llm_ray.cli import main
from d3llm_ray.decoding import Engine
from d3llm_ray.progress import Progress
from tests.benchmark.conftest import SMALL

SMALL_PLAN = {"prompt_tokens": 20, "max_tokens": (64,), "count": 4, "batch_sizes": (1, 4), "rounds": 2}


@pytest.fixture(scope="module")
def report() -> BenchmarkReport[BenchmarkRow]:
    plan = BenchmarkPlan(
        shape="small", scripted_tpf=8.0, decoders=("d3llm-nocache", "d3llm"), suffixes=("cached",), **SMALL_PLAN
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "small", SMALL)
        return benchmark(plan, Progress(quiet=True))


def test_the_last_line_is_json_with_every_figure(report: BenchmarkReport[BenchmarkRow]) -> None:
    found = json.loads(str(report).splitlines()[-1])
    assert set(found) == {
        "benchmark",
        "rows",
        "ratios",
        "roofline",
        "memory",
        "plan",
        "machine",
        "versions",
        "counting",
    }
    assert found["counting"] == COUNTING and found["versions"]["torch"] == torch.__version__
    assert found["plan"]["scripted_tpf"] == 8.0
    assert {"weights", "kv_pool", "activations", "peak"} <= set(found["memory"])
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        assert row["tokens"] == 4 * 64 and row["task"] == "synthetic" and row["model"] == "small"
        assert row["tpf"] == row["tokens"] / row["forwards"]
        assert row["steps"] == row["forwards"] / row["batch_size"]  # equal requests stay in step
        assert set(row["phases_ms"]) == {"plan", "forward", "statistics", "update"}
        assert sum(row["phases_ms"].values()) > 0 and len(row["rounds"]) == 2
        assert row["tps_low"] <= row["tps"] <= row["tps_high"]
        assert row["ms"] == pytest.approx(1e3 * row["seconds"] / row["steps"])
        assert row["roofline_percent"] == pytest.approx(100 * row["roofline_ms"] / row["ms"])
        assert row["roofline_ms"] == pytest.approx(
            1e3 * max(row["flops"] / found["roofline"]["flops"], row["bytes"] / found["roofline"]["bandwidth"]), rel=0.5
        )
    names = [ratio["name"] for ratio in found["ratios"]]
    assert {name: names.count(name) for name in names} == {"overhead": 4, "cache": 2, "batching": 2}


def test_the_tables_show_every_row_and_ratio(report: BenchmarkReport[BenchmarkRow]) -> None:
    text = report.to_markdown()
    for expected in ("memory plan on cpu", "roofline (measured)", "| d3llm (cached) | 4 | 64 |", "| d3llm-nocache | 1"):
        assert expected in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + 4 + 2 + 8


def test_a_script_sets_the_pace_and_the_cache_the_window(report: BenchmarkReport[BenchmarkRow]) -> None:
    rows = {(row.decoder, row.batch_size): row for row in report.rows}
    for row in report.rows:
        assert row.tpf == pytest.approx(8.0, rel=0.1)
    plain, cached = rows["d3llm-nocache", 4], rows["d3llm", 4]
    assert plain.window == 20 + 64 > cached.window
    assert plain.flops > cached.flops


def test_what_is_captured_is_what_the_engine_counted(small_shape: str) -> None:
    workload = prepare(BenchmarkPlan(shape=small_shape, **SMALL_PLAN))
    engine = Engine(workload.load(), workload.family, workload.cells[0].decoder, max_batch_size=4)
    engine.runner = captured = CapturingRunner(engine.eager)
    with profiled(engine) as profile:
        steps = decode(engine, workload.requests(workload.cells[1]), 3, profile.step)
        completions = list(chain(*steps))
    assert [len(completion.token_ids) for completion in completions] == [64] * 4
    work = [call.layout.work(len(call.scored)) for call in captured.calls]
    assert len(work) == profile.forwards
    assert max(len(call.layout.lengths) for call in captured.calls) == 3  # never above the batch size
    assert reduce(add, work) == profile.work
    assert all(seconds > 0 for seconds in profile.seconds.values())
    seen: list[int] = []
    engine.model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    replay(engine.model, captured.calls)
    assert seen == [call.scored for call in work]


def test_overhead_is_the_time_outside_the_model(small_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BenchmarkPlan(shape=small_shape, scripted_tpf=8.0, **{**SMALL_PLAN, "batch_sizes": (4,), "rounds": 1})
    workload = prepare(plan)
    engine = Engine(workload.load(), workload.family, workload.cells[0].decoder, max_batch_size=4)
    progress = Progress(quiet=True)
    (quick,) = measure(workload, engine, progress)
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (sleep(0.1), step())[1])
    (slow,) = measure(workload, engine, progress)
    assert median(slow.trial.overheads) > 2 * median(quick.trial.overheads) > 1


def test_a_failed_request_ends_the_measurement(small_shape: str) -> None:
    workload = prepare(BenchmarkPlan(shape=small_shape, **SMALL_PLAN))
    model = workload.load()
    model.norm.weight.fill_(float("nan"))
    engine = Engine(model, workload.family, workload.cells[0].decoder, max_batch_size=4)
    with pytest.raises(RuntimeError, match="request 0"):
        list(decode(engine, workload.requests(workload.cells[0]), batch_size=1))


def test_the_verb_on_a_checkpoint_and_a_task(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"benchmark --model {tiny_checkpoint} --count 4 --batch-sizes 2,4 --max-tokens 16,32 --rounds 1"
    assert main([*command.split(), "--output", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(row["batch_size"], row["max_tokens"]) for row in found["rows"]} == {(2, 16), (4, 16), (2, 32), (4, 32)}
    assert {row["task"] for row in found["rows"]} == {"arith"}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert yaml.safe_load((tmp_path / "out" / "benchmark.yaml").read_text())["max_tokens"] == [16, 32]
    assert (tmp_path / "out" / "tokens_per_second.png").read_bytes().startswith(b"\x89PNG")
    assert "| decoder | batch |" in (tmp_path / "out" / "report.md").read_text()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_causal_shape_decodes_one_token_a_forward(small_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 128, "eos_token_id": 127}
    monkeypatch.setitem(SHAPES, "causal", {**SHAPES["qwen2.5-7b"], **sizes, "num_attention_heads": 4})
    plan = BenchmarkPlan(shape="causal", prompt_tokens=9, max_tokens=(12,), count=2, batch_sizes=(2,), rounds=1)
    (row,) = benchmark(plan, Progress(quiet=True)).rows
    assert (row.decoder, row.tokens, row.forwards, row.tpf) == ("autoregressive", 24, 24, 1.0)
    assert row.window == pytest.approx((9 + 11) / 12)  # the prompt at once, then a token at a time


BARE = """
import sys
for name in ("pydantic", "pydantic_settings", "ray", "matplotlib", "psutil"):
    sys.modules[name] = None  # not installed
from d3llm_ray.benchmark.measure import benchmark
from d3llm_ray.benchmark.plan import BenchmarkPlan
print(benchmark(BenchmarkPlan(prompt_tokens=8, max_tokens=[16], count=1, batch_sizes=[1], scripted_tpf=4, rounds=1)))
"""


def test_a_bare_machine_needs_no_edge_packages() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"][0]["tpf"] == 4.0
