"""The host's share of a step: the engine's own work, and nothing of the model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from d3llm_ray.benchmark.host import COUNTING, measure_host
from d3llm_ray.benchmark.host_plan import HostPlan
from d3llm_ray.cli import main
from d3llm_ray.errors import InputError
from d3llm_ray.models import Transformer
from d3llm_ray.progress import Progress

SMALL = {"prompt_tokens": 12, "max_tokens": 64, "batch_sizes": (1, 4), "count": 8, "rounds": 2}


def test_no_model_is_run_and_every_canvas_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("the model was run")

    monkeypatch.setattr(Transformer, "forward", refuse)
    monkeypatch.setattr(Transformer, "logits", refuse)
    report = measure_host(HostPlan(**SMALL), Progress(quiet=True))
    alone, together = report.rows
    assert (alone.batch_size, together.batch_size) == (1, 4)
    # 8 canvases of 64 in 2 rounds: as many steps as tokens over TPF, where one request decodes at a time.
    assert alone.steps == pytest.approx(2 * 8 * 64 / alone.tpf, rel=0.1) and together.steps < alone.steps
    assert 2 < alone.tpf < 64
    assert alone.static == 1.0  # windows of a single request fit a graph
    for row in report.rows:
        assert 0 < row.ms_low <= row.ms <= row.ms_high and row.cpu_ms > 0
        assert set(row.phases_ms) == {"plan", "forward", "statistics", "update"} and min(row.phases_ms.values()) > 0
    # An H100 reads LLaDA-8B's 15 GB in 4.5 ms, however short the windows.
    assert alone.forward_ms == pytest.approx(4.5, abs=0.1)


def test_the_verb_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--prompt-tokens 8 --max-tokens 32 --batch-sizes 2 --count 2 --rounds 1 --shape dream-7b"
    assert main(["benchmark", "host", *flags.split(), "--output", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert found["benchmark"] == "host" and found["counting"] == COUNTING
    assert found["plan"]["shape"] == "dream-7b" and found["rows"][0]["batch_size"] == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "llada-9b"}, "shape: unknown value 'llada-9b'; accepted: dream-7b, llada-8b"),
        ({"machine": "measured"}, "machine: unknown value 'measured'"),
        ({"batch_sizes": (0,)}, "batch_sizes: got 0"),
        ({"count": 4, "batch_sizes": (8,)}, "count: got 4; accepted: at least the largest batch size, 8"),
    ],
)
def test_bad_plans_are_named(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HostPlan(**values)
