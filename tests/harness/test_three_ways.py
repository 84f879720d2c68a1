"""lm-eval with the model `d3llm`, lm-eval against the served endpoint, and this project's own evaluation: the same
answers and the same score. Skipped where lm-eval is absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from d3llm_ray.decoding import DiffusionLLM, WholePrompt
from d3llm_ray.errors import InputError, WorkError
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.harness.__main__ import main
from d3llm_ray.harness.scoring import LikelihoodScorer, ScoredText
from d3llm_ray.models import resolve_model
from d3llm_ray.models.chat import encode_text
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.settings import ReplicaSettings
from d3llm_ray.tasks import Problem, load_task
from tests.harness.lm_eval_runs import OFFLINE, local_task, run

pytestmark = pytest.mark.clients

MODEL = "tiny-llada"
TOKENS = 64
SETTINGS = {"entropy_threshold": 0.9}  # high enough for wrong answers, so that a score says something
OURS = {"pretrained": MODEL, "decoder": "d3llm", "batch_size": 8, **SETTINGS}
GENERATION = {"until": ["\n\n"], "max_gen_toks": TOKENS, "do_sample": False, "temperature": 0.0}
ANSWER = {"function": "regex", "regex_pattern": r"#### (-?\d+)"}
FILTERS = [{"name": "answer", "filter": [ANSWER, {"function": "take_first"}]}]
WORDS = ["#### 7", "#### 12", "Tom has 7 pens now."]


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return list(load_task("arith").load("test", 12))


@pytest.fixture(scope="module")
def llm() -> DiffusionLLM:
    return DiffusionLLM.from_pretrained(MODEL, "d3llm", **SETTINGS)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    settings = ReplicaSettings(model=MODEL, decoder="d3llm", decoder_settings=SETTINGS, max_batch_size=4)
    with serve_locally(settings) as address:
        yield address


@pytest.fixture
def rows(problems: list[Problem]) -> list[dict[str, Any]]:
    return [
        {"question": one.messages[-1]["content"], "answer": one.reference, "choices": WORDS, "gold": 1}
        for one in problems
    ]


@pytest.fixture
def task(tmp_path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return local_task(tmp_path, rows, generation_kwargs=GENERATION, filter_list=FILTERS)


def served(url: str, route: str, **options: Any) -> dict[str, Any]:
    return {"model": MODEL, "base_url": f"{url}/v1/{route}", "num_concurrent": 4, "max_retries": 1, **options}


def test_conversations(llm: DiffusionLLM, url: str, task: dict[str, Any], problems: list[Problem]) -> None:
    metrics, answers = run("d3llm", OURS, task, apply_chat_template=True)
    chat = served(url, "chat/completions")
    over_http, http_answers = run("local-chat-completions", chat, task, apply_chat_template=True)
    row = evaluate(llm, load_task("arith"), problems, max_tokens=TOKENS)
    assert answers == http_answers == [[sample.text] for sample in row.samples]
    assert 0 < row.accuracy < 100
    for found in (metrics, over_http):
        assert 100 * found["exact_match,answer"] == pytest.approx(row.accuracy)


def test_texts_without_a_template(llm: DiffusionLLM, url: str, task: dict[str, Any], rows: list[Any]) -> None:
    metrics, answers = run("d3llm", OURS, task)
    tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": str(resolve_model(MODEL))}
    over_http, http_answers = run("local-completions", served(url, "completions", **tokenizer), task)
    outputs = llm.generate([WholePrompt(row["question"]) for row in rows], TOKENS, stop=["\n\n"])
    assert answers == http_answers == [[output.text] for output in outputs]
    assert metrics["exact_match,answer"] == over_http["exact_match,answer"]


def test_choices_are_the_scorers(llm: DiffusionLLM, tmp_path: Path, rows: list[Any]) -> None:
    task = local_task(
        tmp_path,
        rows[:2],
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="gold",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    _, found = run("d3llm", {**OURS, "mc_num": 6, "seed": 3}, task)
    assert llm.tokenizer is not None
    texts = []
    for row in rows[:2]:
        context = encode_text(llm.tokenizer, row["question"], control=True)
        wholes = [encode_text(llm.tokenizer, f"{row['question']} {choice}", control=True) for choice in WORDS]
        texts += [ScoredText(context, whole[len(context) :]) for whole in wholes]
    scores = dict(LikelihoodScorer(llm, batch_size=8, samples=6, seed=3).score(texts))
    assert found == [[tuple(scores[3 * number + place]) for place in range(3)] for number in range(2)]


def test_perplexity_is_over_windows_of_the_context(llm: DiffusionLLM, tmp_path: Path, rows: list[Any]) -> None:
    texts = [rows[0]["question"], " ".join(row["question"] for row in 2 * rows)]
    task = local_task(
        tmp_path,
        [{"question": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    _, found = run("d3llm", {**OURS, "mc_num": 2}, task)
    assert llm.tokenizer is not None
    short, long = (encode_text(llm.tokenizer, text, control=True) for text in texts)
    begin = llm.tokenizer.bos_token_id
    room = llm.engine.context - 1  # tokens scored in a window, behind one of context
    assert room < len(long) < 2 * room
    rest = len(long) - room
    windows = [
        ScoredText([begin], short),
        ScoredText([begin], long[:room]),
        ScoredText(long[-room - 1 : -rest], long[-rest:]),
    ]
    scores = dict(LikelihoodScorer(llm, batch_size=8, samples=2).score(windows))
    assert found[0] == [pytest.approx(scores[0].logprob)]
    assert found[1] == [pytest.approx(scores[1].logprob + scores[2].logprob)]


def test_the_command_line(task: dict[str, Any], tmp_path: Path, llm: DiffusionLLM, problems: list[Problem]) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(yaml.safe_dump(task))
    words = ["--model", "d3llm", "--model_args", f"pretrained={MODEL},decoder=d3llm,entropy_threshold=0.9"]
    words += ["--batch_size", "8", "--tasks", "local", "--include_path", str(tmp_path / "tasks"), "--limit", "4"]
    words += ["--apply_chat_template", "--log_samples", "--output_path", str(tmp_path / "results")]
    command = [sys.executable, "-m", "d3llm_ray.harness", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, **OFFLINE}, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())
    row = evaluate(llm, load_task("arith"), problems[:4], max_tokens=TOKENS)
    assert 100 * results["results"]["local"]["exact_match,answer"] == pytest.approx(row.accuracy)
    assert results["config"]["decoder_settings"]["entropy_threshold"] == 0.9


@pytest.mark.parametrize("error, code", [(InputError("decoder: no"), 2), (WorkError("NaN"), 1)])
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    command_line = pytest.importorskip("lm_eval.__main__")

    def fail() -> None:
        raise error

    monkeypatch.setattr(command_line, "cli_evaluate", fail)
    assert main() == code
    assert capsys.readouterr().err == f"d3llm_ray.harness: {error}\n"
