"""The GPU check without a GPU: how it resumes and stops, what it writes, and that each part finds what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3llm_ray.benchmark import gpu_check, gpu_check_attention, gpu_check_engine, gpu_check_kernel, gpu_check_speed
from d3llm_ray.benchmark.gpu_check import MOST_TRIES, Records, run_parts
from d3llm_ray.benchmark.gpu_check_base import CheckFailed, CheckPart, Target, Unavailable
from d3llm_ray.benchmark.gpu_check_report import GpuCheckReport, facts_of
from d3llm_ray.benchmark.gpu_check_switches import switched
from d3llm_ray.benchmark.machine import data_sheet
from d3llm_ray.decoding import scoring, static, statistics
from d3llm_ray.decoding.batch import StepBatch
from d3llm_ray.decoding.scoring import Stat
from d3llm_ray.errors import InputError
from d3llm_ray.models.attention import sdpa_attention

ROOT = Path(__file__).parents[2]
QUICK = Target(torch.device("cpu"), quick=True)


class Clock:
    """Seconds that only parts spend."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def part(clock: Clock) -> Callable[..., CheckPart]:
    """`part(name, estimate, ends=figures or an exception)` is a part that takes as long as its estimate."""

    def make(name: str, estimate: float, ends: Any = None) -> CheckPart:
        def run(_target: Target) -> Any:
            clock.now += estimate
            if isinstance(ends, BaseException):
                raise ends
            return ends or {"rows": 1}

        return CheckPart(name, "section", estimate, run)

    return make


def names(parts: list[CheckPart]) -> list[str]:
    return [part.name for part in parts]


def statuses(records: Records, parts: list[CheckPart]) -> dict[str, str]:
    return {record["part"]: record["status"] for record in records.of(parts)}


def test_calls_complete_the_check_under_a_limit(part: Callable[..., CheckPart], clock: Clock, tmp_path: Path) -> None:
    parts = [part("a", 300.0), part("b", 200.0), part("c", 100.0), part("d", 500.0)]
    records, said = Records(tmp_path, "key"), []
    left = run_parts(parts, QUICK, records, 480.0, say=said.append, clock=clock)
    assert names(left) == ["b", "d"] and said == ["a: passed", "c: passed"]  # c still fits behind a
    left = run_parts(parts, QUICK, records, 480.0, say=said.append, clock=clock)
    assert names(left) == ["d"] and said[2:] == ["b: passed"]
    assert not run_parts(parts, QUICK, records, 480.0, say=said.append, clock=clock)  # too long, but nothing before it
    assert said[3:] == ["d: passed"]
    assert not run_parts(parts, QUICK, records, 480.0, say=said.append, clock=clock) and len(said) == 4
    assert names(run_parts(parts, QUICK, Records(tmp_path, "other sources"), 0.0, say=said.append, clock=clock))
    assert not list(tmp_path.glob("*.started"))


def test_what_goes_wrong_is_recorded_and_stops_nothing(
    part: Callable[..., CheckPart], clock: Clock, tmp_path: Path
) -> None:
    ends = [CheckFailed("wrong", {"rows": 3}), torch.cuda.OutOfMemoryError("no room\nmore"), Unavailable("no flash")]
    parts = [part(f"p{number}", 1.0, end) for number, end in enumerate(ends)] + [part("sound", 1.0)]
    records = Records(tmp_path, "key")
    assert not run_parts(parts, QUICK, records, 100.0, say=lambda _: None, clock=clock)
    assert statuses(records, parts) == {"p0": "failed", "p1": "failed", "p2": "skipped", "sound": "passed"}
    first, second, third, _ = records.of(parts)
    assert (first["reason"], first["figures"], first["seconds"]) == ("wrong", {"rows": 3}, 1.0)
    assert second["reason"] == "OutOfMemoryError: no room" and third["reason"] == "no flash"
    said: list[str] = []
    run_parts(parts, QUICK, records, 100.0, say=said.append, clock=clock)
    assert said == ["p2: skipped - no flash"]  # it may be installed by now; a failure stays one


def test_a_part_that_takes_the_process_with_it_comes_last_and_then_has_failed(
    part: Callable[..., CheckPart], clock: Clock, tmp_path: Path
) -> None:
    parts, records = [part("killer", 1.0, KeyboardInterrupt()), part("sound", 1.0)], Records(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        run_parts(parts, QUICK, records, 100.0, clock=clock)
    with pytest.raises(KeyboardInterrupt):
        run_parts(parts, QUICK, records, 100.0, clock=clock)
    assert statuses(records, parts) == {"sound": "passed"} and records.tries(parts[0]) == MOST_TRIES
    assert not run_parts(parts, QUICK, records, 100.0, clock=clock)
    assert statuses(records, parts)["killer"] == "failed"


def test_a_lost_device_ends_the_call(
    part: Callable[..., CheckPart], clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_check, "synchronise", lost)
    parts = [part("a", 1.0, RuntimeError("CUDA error")), part("b", 1.0)]
    records = Records(tmp_path, "key")
    assert names(run_parts(parts, QUICK, records, 100.0, clock=clock)) == ["b"]
    assert statuses(records, parts) == {"a": "failed"}


def record(name: str, section: str, **content: Any) -> dict[str, Any]:
    return {"part": name, "section": section, "status": "passed", "seconds": 2.0, **content}


def cell(switch: str, tps: float) -> dict[str, Any]:
    phases = {"plan": 0.1, "forward": 5.0, "statistics": 0.2, "update": 0.3}
    figures = {"shape": "llada-8b", "batch": 8, "switch": switch, "attention": "sdpa", "tps": tps, "tps_low": tps}
    figures |= {"tps_high": tps, "tpf": 9.1, "ms": 5.6, "phases_ms": phases, "peak_memory": 20 * 2**30}
    figures |= {"roofline_percent": {"data sheet": 61.24, "measured": 70.0}, "machines": {"measured": "900 TFLOP/s"}}
    return record(f"speed-{switch}", gpu_check_speed.SPEED, figures=figures)


def test_the_report_in_markdown() -> None:
    step = {"model": "llada-8b", "seconds": 0.5, "seconds_low": 0.4, "seconds_high": 0.6, "tokens": 3072}
    step |= {"tokens_per_second": 6144.0, "mfu": 0.412, "hfu": 0.5, "memory": {"peak": 2**35, "planned": 2**34}}
    parts = [
        record("kernel-float32", "statistics kernel against float64", figures={"rows": 70, "error": 0.0123456}),
        record("graphs-tiny-ar", "CUDA graphs", status="failed", reason="tokens differ | in 1"),
        cell("all on", 200.0),
        cell("no CUDA graphs", 100.0),
        record("step", gpu_check_speed.STEP, figures=step),
    ]
    facts = {**facts_of(QUICK), "card": "NVIDIA H200", "driver": "570.1", "commit": "abc", "date": "2030-01-02T03:04"}
    report = GpuCheckReport({**facts, "quick": False}, parts, ["speed-x"])
    text = report.to_markdown()
    for expected in (
        "**NVIDIA H200**, driver 570.1, 2030-01-02, commit abc",
        f"torch {torch.__version__}",
        "**1 parts are left**: speed-x.",
        "| kernel-float32 | statistics kernel against float64 | passed | rows 70, error 0.0123 | 2 |",
        "| graphs-tiny-ar | CUDA graphs | failed | tokens differ / in 1 | 2 |",
        "| llada-8b | no CUDA graphs | sdpa | 8 | 100.0 (100.0 - 100.0) | 0.50 | 9.10 | 5.60 | 0.10 | 5.00 | 0.20 |",
        "| 0.20 | 0.30 | 61.2 % | 70.0 % | 20.0 |",
        "| llada-8b | 500.0 (400.0 - 600.0) | 3072 | 6144 | 41.2 % | 50.0 % | 32.00 | 16.00 |",
    ):
        assert expected in text
    found = json.loads(report.to_json())
    assert found["card"] == "NVIDIA H200" and found["left"] == ["speed-x"] and len(found["parts"]) == 5
    assert {"triton", "torch", "transformers", "flash-attn"} <= set(found["versions"])


def plain_kernel(error: float) -> Any:
    """The kernel in plain torch, but for an error in the entropy."""

    def score(logits: torch.Tensor, mask_id: int | None, sampling: Any) -> torch.Tensor:
        wide = logits.float().clone()
        packed = scoring.score(wide, mask_id, margins=True)
        if sampling is not None:
            packed = torch.cat((packed, packed[:1], packed[1:2].exp(), packed[2:3]))
            packed = scoring.draw(wide, mask_id, packed, sampling)
        packed[2] += error
        return packed

    return SimpleNamespace(score=score)


@pytest.mark.parametrize("dtype", gpu_check_kernel.DTYPES)
def test_the_kernel_check_accepts_plain_torch_and_no_error(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    import d3llm_ray.decoding as decoding

    for error in (0.0, 1e-3):
        monkeypatch.setitem(sys.modules, "d3llm_ray.decoding.kernels", plain_kernel(error))
        monkeypatch.setattr(decoding, "kernels", plain_kernel(error), raising=False)
        if error:
            with pytest.raises(CheckFailed, match="float64"):
                gpu_check_kernel.check_kernel(QUICK, dtype)
        else:
            figures = gpu_check_kernel.check_kernel(QUICK, dtype)
            assert figures["wrong_ids"] == 0 and figures["error_over_tolerance"] < 1


def test_static_shapes_that_change_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu_check_engine.check_static("random-llada", False, QUICK)["different"]
    forward = static.StaticRunner.forward

    def wrong(runner: static.StaticRunner, batch: StepBatch) -> Any:
        packed = forward(runner, batch).clone()
        packed[Stat.ARGMAX] = (packed[Stat.ARGMAX] + 1) % 500
        return packed

    monkeypatch.setattr(static.StaticRunner, "forward", wrong)
    with pytest.raises(CheckFailed, match="tokens differ") as caught:
        gpu_check_engine.check_static("random-llada", False, QUICK)
    assert caught.value.figures["cases"] == 1
    monkeypatch.setattr(static.StaticRunner, "_shapes", lambda *_: None)
    with pytest.raises(CheckFailed, match="no step ran in a static shape"):
        gpu_check_engine.check_static("random-llada", False, QUICK)
    with pytest.raises(Unavailable, match="CUDA"):
        gpu_check_engine.check_static("random-llada", True, QUICK)


def test_every_decoder_with_a_cache_is_checked() -> None:
    labels = {
        name: [
            gpu_check_engine._label(decoder)
            for decoder in gpu_check_engine.subject(name, "float32", QUICK).decoders(False)
        ]
        for name in ("tiny-llada", "random-dream", "tiny-fast-dllm-v2", "tiny-ar")
    }
    masked = ["fast-dllm-prefix", "fast-dllm-dual", "d2f"]
    d3llm = [f"d3llm ({suffix})" for suffix in ("recompute", "cached", "none")]
    assert labels == {
        "tiny-llada": masked + d3llm,
        "random-dream": [*masked, "fast-dllm-v2", *d3llm],
        "tiny-fast-dllm-v2": ["fast-dllm-v2"],
        "tiny-ar": ["autoregressive"],
    }


def test_attention_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check_attention, "choose_attention", lambda *_: sdpa_attention)
    figures = gpu_check_attention.check_flash(QUICK)
    assert figures["flash_attn"] == figures["sdpa"] > 0
    monkeypatch.setattr(gpu_check_attention, "choose_attention", lambda *_: lambda *a: 1.1 * sdpa_attention(*a))
    with pytest.raises(CheckFailed):
        gpu_check_attention.check_flash(QUICK)
    monkeypatch.undo()
    with pytest.raises(Unavailable, match="flash-attn is not installed"):
        gpu_check_attention.check_flash(QUICK)


def test_a_step_without_peft_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check_speed.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(Unavailable, match="pip install peft"):
        gpu_check_speed.measure_distillation(QUICK)


def test_switches_are_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "fused_score", lambda _: "kernel")
    monkeypatch.setattr(static, "fused_score", lambda _: "kernel")
    with switched(triton=False):
        assert statistics.fused_score("cuda") is static.fused_score("cuda") is None
    assert statistics.fused_score("cuda") == static.fused_score("cuda") == "kernel"


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L4", None),
    ],
)
def test_a_card_is_recognised_by_its_name(name: str, sheet: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    machine = data_sheet(torch.device("cuda"))
    assert (machine and machine.name) == sheet
    assert data_sheet(torch.device("cpu")) is None


BARE = """
import runpy, sys
for name in ("ray", "pydantic", "pydantic_settings", "pyarrow", "matplotlib", "deepspeed", "tensorboardX", "psutil"):
    sys.modules[name] = None  # not installed
sys.argv = ["gpu_check.py", *sys.argv[1:]]
runpy.run_path("jobs/gpu_check.py", run_name="__main__")
"""


def script(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BARE, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_machine_without_a_gpu_is_bad_input(tmp_path: Path) -> None:
    done = script("--output", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "device" in done.stderr and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--quick"):
        gpu_check.check("cpu", quick=False, output=tmp_path / "out", limit_s=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_script_on_a_bare_machine(tmp_path: Path) -> None:
    quick = ("--device", "cpu", "--quick", "--output", str(tmp_path))
    done = script(*quick, "--limit-s", "0")
    assert done.returncode == 3, done.stderr
    assert "parts are left" in done.stdout
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("kernel-*.json")}
    assert before
    done = script(*quick)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    by_status: dict[str, list[str]] = {}
    for entry in found["parts"]:
        by_status.setdefault(entry["status"], []).append(entry["part"])
    assert not found["left"] and set(by_status) == {"passed", "skipped"}
    assert sorted(by_status["skipped"]) == [
        "flash-attn",
        "graphs-random-llada",
        "graphs-tiny-llada",
        "speed-tiny-llada-batch-2-sdpa",
    ]
    text = (tmp_path / "gpu_check.md").read_text()
    assert "Toy sizes" in text and "| tiny-llada | all on |" in text and "| MFU |" in text
