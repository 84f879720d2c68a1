"""Validation by decoding: its figures by hand, and a problem without an answer."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3llm_ray.distillation.training import validation
from d3llm_ray.distillation.training.validation import Validator
from d3llm_ray.metrics import _DISTILL_GAUGES
from d3llm_ray.tasks import Task
from tests.evaluation.fakes import FakeLLM, problem


def test_accuracy_is_in_percent_and_a_bad_problem_costs_its_own_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = FakeLLM({"a": ("#### 1", 9, 3), "b": ("#### 2", 1, 1), "c": "not finite", "d": ("#### 4", 2, 2)})
    asked: list[Any] = []
    problems = [problem("a", "1"), problem("b", "1"), problem("c", "1"), problem("d", "4")]
    task = Task("own", lambda split, count: asked.append((split, count)) or problems)
    monkeypatch.setattr(validation, "load_task", lambda name: asked.append(name) or task)
    monkeypatch.setattr(validation, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(validation, "transformer_of", lambda model: model)
    monkeypatch.setattr(validation, "Engine", lambda model, family, chosen, **_: asked.append(chosen))
    monkeypatch.setattr(validation, "DiffusionLLM", lambda *_: llm)
    settings = SimpleNamespace(
        val_task="own",
        val_count=4,
        val_max_tokens=24,
        val_decoder="dparallel",
        val_decoder_settings={"entropy_threshold": 0.9},
        teacher="t",
    )
    module: Any = SimpleNamespace(model=None)
    nothing: Any = None
    device = torch.device("cpu")
    validator = Validator(settings, module, nothing, nothing, [], lambda _: None, Path("x"), device)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        line = validator._decode()
    assert line == {"val_accuracy": 50.0, "val_errors": 1, "val_tpf": 2.0}
    assert "1 of 4 without an answer, the first: problem 3: not finite" in caplog.text
    assert asked == ["own", validation.read_decoder("dparallel", entropy_threshold=0.9), ("validation", 4)]
    ((number, options),) = llm.calls
    assert (number, options) == (4, {"max_tokens": 24, "errors": "return"})
    assert "Percent" in _DISTILL_GAUGES["val_accuracy"]
    llm.answers = dict.fromkeys("abcd", "not finite")
    assert validator._decode() == {"val_accuracy": 0.0, "val_errors": 4, "val_tpf": 0.0}
