"""Every benchmark is a verb, and every verb leaves the same report."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from d3llm_ray.cli import VERBS, main

PACKAGE = Path(__file__).parents[2] / "d3llm_ray"
SKELETON = {"benchmark", "rows", "ratios", "roofline", "memory", "plan", "machine", "versions", "counting"}


@pytest.mark.parametrize("old", ["distill benchmark", "trajectories benchmark"])
def test_an_old_verb_is_refused_with_the_new_name(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    new = " ".join(reversed(old.split()))
    assert new in VERBS and old not in VERBS
    assert main([*old.split(), "--count", "3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert repr(old) in captured.err and repr(new) in captured.err


@pytest.mark.parametrize(("flag", "new"), [("--requests", "count"), ("--repeats", "rounds")])
def test_an_old_setting_is_refused_with_the_new_name(flag: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", flag, "3"]) == 2
    assert new in capsys.readouterr().err


def test_the_step_verb_leaves_the_report_that_all_benchmarks_leave(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--micro-batch-size 1 --prompt-tokens 4 --answer-tokens 8 --window 4 --lora-rank 2 --steps 1"
    command = f"benchmark step --model {tiny_checkpoint} {sizes} --warmup-steps 1 --precision float32"
    assert main([*command.split(), "--output", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == SKELETON and found["benchmark"] == "step"
    assert found["rows"][0]["tokens"] == 2 * 12 and found["plan"]["window"] == 4
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert "micro_batch_size: 1" in (tmp_path / "out" / "benchmark.yaml").read_text()
    assert main(["benchmark", "step", "--micro-batch-size", "0"]) == 2
    assert "micro_batch_size: got 0" in capsys.readouterr().err


def test_nothing_measures_but_benchmarks() -> None:
    """The rooms that are measured do not know that they are; nor do two of its modules import each other."""
    importing: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d3llm_ray.benchmark."):
                importing.setdefault(name, set()).add(node.module or "")
    assert all(name.startswith("d3llm_ray.benchmark.") for name in importing)
    assert not [(a, b) for a, names in importing.items() for b in names if a in importing.get(b, set())]
