"""A real language model as the oracle: SmolLM2-135M-Instruct, decoded by transformers, by lm-eval's `hf` and by us.

Half a gigabyte of float32 weights and minutes of computing: `pytest -m real`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.settings import ReplicaSettings
from d3llm_ray.tasks import load_task
from tests.harness.lm_eval_runs import local_task, run
from tests.harness.smollm2 import smollm2

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]

GSM8K = Path(__file__).parents[3] / "shared" / "benchmarks" / "gsm8k_test.jsonl"
COUNT, TOKENS, BATCH = 100, 48, 25
MARGIN = 1e-3  # logits that are this close may change places between two ways of adding up in float32
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Russia": "Moscow",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return smollm2()


def questions() -> list[str]:
    """The shortest of GSM8K's test questions; sums of our own where they are not here."""
    if not GSM8K.is_file():
        return [f"Tom has {number} apples and buys {number % 7 + 2} more. How many?" for number in range(COUNT)]
    rows = [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]
    return sorted(rows, key=len)[:COUNT]


def test_autoregressive_is_the_greedy_generation_of_transformers(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    llm = DiffusionLLM.from_pretrained(checkpoint, max_batch_size=BATCH)
    assert llm.decoder().name == "autoregressive" and llm.tokenizer is not None
    prompts = [llm.tokenizer.encode(f"Question: {question}\nAnswer:") for question in questions()]
    outputs = llm.generate(prompts, max_tokens=TOKENS)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    end, differing = llm.family.eos_token_id, 0
    for begin in range(0, COUNT, BATCH):
        batch = prompts[begin : begin + BATCH]
        width = max(map(len, batch))
        padded = torch.tensor([[end] * (width - len(ids)) + ids for ids in batch])
        seen = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        with torch.inference_mode():
            answers = model.generate(
                input_ids=padded, attention_mask=seen, max_new_tokens=TOKENS, do_sample=False, pad_token_id=end
            )
        for ids, row, output in zip(batch, answers[:, width:].tolist(), outputs[begin : begin + BATCH], strict=True):
            expected = row[: row.index(end)] if end in row else row
            if expected != output.token_ids:
                differing += 1
                assert gap(model, ids, expected, output.token_ids) < MARGIN
    print(f"{COUNT - differing} of {COUNT} token for token")
    assert differing <= 1


def gap(model: Any, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far apart the logits of the first two tokens that differ are, alone in their batch."""
    place = next(place for place, (a, b) in enumerate(zip([*one, -1], [*other, -1], strict=False)) if a != b)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + one[:place]])).logits[0, -1]
    ends = [model.config.eos_token_id]
    return abs(float(logits[[*one, *ends][place]] - logits[[*other, *ends][place]]))


def test_lm_evals_own_model_gives_the_same(checkpoint: Path, tmp_path: Path) -> None:
    shots = "Q: What is the capital of Belgium?\nA: Brussels\n\n"
    names = list(CAPITALS.values())
    rows = [
        {
            "question": f"{shots}Q: What is the capital of {country}?\nA:",
            "answer": city,
            "choices": [city, names[number - 1], names[number - 2]],
        }
        for number, (country, city) in enumerate(CAPITALS.items())
    ]
    generation = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    word = [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]
    task = local_task(tmp_path, rows, generation_kwargs=generation, filter_list=[{"name": "word", "filter": word}])
    theirs_args = {"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 10}
    ours_args = {"pretrained": str(checkpoint), "batch_size": 10}
    theirs, their_answers = run("hf", theirs_args, task)
    ours, our_answers = run("d3llm", ours_args, task)
    assert our_answers == their_answers and len(our_answers) == 20
    assert ours["exact_match,word"] == theirs["exact_match,word"] > 0.5

    choices = local_task(
        tmp_path,
        rows,
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target=0,
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    theirs, their_scores = run("hf", theirs_args, choices)
    ours, our_scores = run("d3llm", ours_args, choices)
    assert ours["acc,none"] == theirs["acc,none"] > 0.5
    for one, other in zip(our_scores, their_scores, strict=True):
        assert [score for score, _ in one] == pytest.approx([float(score) for score, _ in other], abs=2e-3)
        assert [greedy for _, greedy in one] == [bool(greedy) for _, greedy in other]


def test_text_of_multi_byte_characters_is_streamed_whole(checkpoint: Path) -> None:
    """Emoji and Chinese are several tokens a character: a piece never ends within one."""
    prompts = ["😀 😃 😄 😀 😃 😄 😀 😃", "你好，世界。你好，世界。你好，世界。你好", "αβγ δεζ αβγ δεζ αβγ δεζ αβγ"]
    settings = ReplicaSettings(model=str(checkpoint), max_batch_size=4, max_tokens=32, max_tokens_limit=64)
    many = 0
    with serve_locally(settings) as url:
        for prompt in prompts:
            for max_tokens in (23, 24, 25, 26):  # some of which end within a character
                body = {"model": checkpoint.name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
                whole = requests.post(f"{url}/v1/completions", json=body, timeout=300).json()["choices"][0]["text"]
                with requests.post(
                    f"{url}/v1/completions", json={**body, "stream": True}, timeout=300, stream=True
                ) as reply:
                    frames = [line.removeprefix("data: ") for line in reply.content.decode().splitlines() if line]
                assert frames.pop() == "[DONE]"
                pieces = [json.loads(frame)["choices"][0]["text"] for frame in frames]
                pieces = [piece for piece in pieces if piece]
                assert "".join(pieces) == whole
                assert all("\ufffd" not in piece for piece in pieces[:-1])
                assert "\ufffd" not in pieces[-1].rstrip("\ufffd")
                many += sum(len(letter.encode()) > 1 for piece in pieces for letter in piece)
    assert many > 100


@pytest.mark.skipif(not GSM8K.is_file(), reason="the benchmarks' data are not here (../shared/benchmarks)")
def test_humaneval_runs_through_the_sandbox_to_the_end(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3LLM_RAY_DATA", str(GSM8K.parent))
    task = load_task("humaneval")
    problems = list(task.load("test", 5))
    llm = DiffusionLLM.from_pretrained(checkpoint, max_batch_size=5)
    row = evaluate(llm, task, problems, max_tokens=48, warmup=0)
    assert len(row.samples) == 5 and row.errors == 0
    for sample, problem in zip(row.samples, problems, strict=True):
        assert sample.tokens and sample.correct == task.is_correct(sample.text, str(problem.reference))
    print(f"{row.accuracy:g} % of HumanEval's first five with 48 tokens")
