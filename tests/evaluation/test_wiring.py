"""Every argument of a measurement, set to a value of its own, arrives in the decoder, the row and the score."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3llm_ray.decoding import DiffusionLLM, Output, decoder, decoding_settings
from d3llm_ray.evaluation.aup import aup
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.rows import EvaluatedSample, summarise
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import Problem, load_task

QUIET = Progress(quiet=True)


class Recorder(DiffusionLLM):
    """Answers "#### 2" to everything, in 3 forwards; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.engine = SimpleNamespace(decoder=decoder("d3llm"), max_batch_size=9)  # type: ignore[assignment]
        self.family = SimpleNamespace(name="family")  # type: ignore[assignment]
        self.tokenizer = None
        self.model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))  # type: ignore[assignment]

    def generate(self, prompts: Any, progress: Any = None, **options: Any) -> list[Output]:  # type: ignore[override]
        self.calls.append((list(prompts), {**options, "progress": progress}))
        return [Output("#### 2", [7] * 6, "length", 5, [1] * 5, 3, 2.0, [0], [0.0], [0.0], [7]) for _ in prompts]


def problems() -> Iterator[Problem]:
    for number in range(4):
        yield Problem(f"id-{number}", [{"role": "user", "content": str(number)}], str(number))


def test_every_argument_of_a_measurement_reaches_the_decoder_and_the_row() -> None:
    given: dict[str, Any] = {
        "llm": Recorder(), "task": load_task("arith"), "problems": list(problems()), "max_tokens": 24,
        "temperature": 0.3, "seed": 5, "progress": QUIET, "warmup": 2, "decoder": "dparallel",
        "top_p": 0.8,
    }  # fmt: skip
    assert [*given, "overrides"] == list(inspect.signature(evaluate).parameters)
    row = evaluate(**given, entropy_threshold=0.7)
    chosen = decoder("dparallel", entropy_threshold=0.7)
    options = {"max_tokens": 24, "temperature": 0.3, "seed": 5, "decoder": chosen, "errors": "return", "stop": ()}
    options["top_p"] = 0.8
    messages = [problem.messages for problem in problems()]
    assert given["llm"].calls == [
        (messages[:2], {**options, "progress": None}),
        (messages, {**options, "progress": QUIET}),
    ]
    expected = summarise(
        [
            EvaluatedSample(
                p.id, "#### 2", "2", p.reference or "", p.reference == "2", 6, 3, 5, "length", token_ids=(7,) * 6
            )
            for p in problems()
        ],
        row.seconds,
        model="family", decoder="dparallel", task="arith", settings=decoding_settings(chosen), max_tokens=24,
        temperature=0.3, top_p=0.8, seed=5, warmup=2, max_batch_size=9,
    )  # fmt: skip
    assert row == expected and row.samples == expected.samples
    assert (row.correct, row.problems, row.tokens, row.forwards, row.tpf) == (1, 4, 24, 12, 2.0)
    assert row.tps == 24 / row.seconds and row.accuracy == 25.0
    assert replace(row, aup=1.0).to_dict()["aup"] == 1.0


def test_every_argument_of_the_area_acts_by_hand() -> None:
    """Points (1, 80), (3, 76) and (5, 70) of a best accuracy of 80: 80 + ... by the formula of the docstring."""
    assert list(inspect.signature(aup).parameters) == ["points", "max_accuracy", "alpha", "offset"]
    points = [(5.0, 70.0), (1.0, 80.0), (3.0, 76.0)]
    assert aup(points, 80.0) == pytest.approx(80 + 80 + 76 * 0.860708)  # exp(-3 * 0.05); 70 is left out
    assert aup(points, 80.0, alpha=0.0) == 80 + 80 + 76
    assert aup(points, 80.0, alpha=0.0, offset=10.0) == 80 + 80 + 76 + 76 + 70
    assert aup(points, 100.0, alpha=1.0) == pytest.approx(80 + 80 * 0.818731 + 76 * 0.786628)
