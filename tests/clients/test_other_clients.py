"""Clients that others have written, as they are, against a served model: their answers are the offline API's.

Each is skipped where its package is absent; `make clients` installs them. Nothing leaves this machine.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.decoding import DiffusionLLM

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "OPENAI_API_KEY": "none",
}
QUESTION = "Tom has 5 apples and buys 7 more. How many apples does Tom have?"
MORE = ["3 + 4 ?", "Ann has 9 pens and loses 2. How many now?", "1 + 1 ?"]


@pytest.fixture(autouse=True)
def offline_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


def answers(offline: DiffusionLLM, prompts: list[Any], max_tokens: int = 32) -> list[str]:
    return [output.text for output in offline.generate(prompts, max_tokens=max_tokens)]


# --- curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("stream", [False, True])
def test_curl(served: str, offline: DiffusionLLM, stream: bool) -> None:
    body = {"model": "tiny-random", "messages": [{"role": "user", "content": QUESTION}], "stream": stream}
    command = [
        "curl",
        "-sSN",
        "--fail-with-body",
        f"{served}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
    ]
    done = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=True)
    if stream:
        *frames, last = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
        assert last == "[DONE]"
        text = "".join(json.loads(frame)["choices"][0]["delta"].get("content", "") for frame in frames)
    else:
        text = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert [text] == answers(offline, [QUESTION])
    refused = subprocess.run([*command, "-d", "{"], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 22 and json.loads(refused.stdout)["error"]["code"] == "invalid_json"


# --- LangChain


@pytest.mark.clients
def test_langchain(served: str, offline: DiffusionLLM) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat(model="tiny-random", base_url=f"{served}/v1", api_key="none", max_retries=0, temperature=0, seed=1)
    (expected,) = answers(offline, [QUESTION])
    message = model.invoke(QUESTION)
    assert message.content == expected and message.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == expected
    assert [answer.content for answer in model.batch(MORE)] == answers(offline, MORE)
    history = [("human", QUESTION), message, ("human", "And 2 more?")]
    roles = {"human": "user", "ai": "assistant"}
    messages = [{"role": roles["human"], "content": QUESTION}, {"role": roles["ai"], "content": expected}]
    assert [model.invoke(history).content] == answers(
        offline, [[*messages, {"role": "user", "content": "And 2 more?"}]]
    )
    longer = model.bind(max_tokens=48, extra_body={"diffusion": {"entropy_threshold": 1.0}})
    assert longer.invoke(QUESTION).content == offline.generate([QUESTION], max_tokens=48, entropy_threshold=1.0)[0].text


# --- LiteLLM


@pytest.mark.clients
def test_litellm(served: str, offline: DiffusionLLM) -> None:
    litellm = pytest.importorskip("litellm")
    litellm.telemetry = False
    options = {
        "model": "openai/tiny-random",
        "api_base": f"{served}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": QUESTION}],
        "num_retries": 0,
    }
    (expected,) = answers(offline, [QUESTION])
    whole = litellm.completion(**options)
    assert whole.choices[0].message.content == expected and whole.usage.completion_tokens > 0
    streamed = litellm.completion(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
    with pytest.raises(litellm.BadRequestError, match="max_tokens: got 1000000"):
        litellm.completion(**options, max_tokens=10**6)
    with pytest.raises(litellm.NotFoundError, match="is not served here"):
        litellm.completion(**{**options, "model": "openai/other"})


# --- lm-eval


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """A task of three questions in a local file."""
    rows = [{"question": question, "answer": "#### 7"} for question in MORE]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "tiny_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 32, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}],
    }


def evaluated(model: str, url: str, task: dict[str, Any], **options: Any) -> list[str]:
    """What lm-eval got for each question, in order."""
    harness = pytest.importorskip("lm_eval")
    results = harness.simple_evaluate(
        model=model,
        model_args={"model": "tiny-random", "base_url": url, "max_retries": 1, "num_concurrent": 2, **options},
        tasks=[task],
        log_samples=True,
        apply_chat_template=model == "local-chat-completions",
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["tiny_questions"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


@pytest.mark.clients
def test_lm_eval_chat(served: str, offline: DiffusionLLM, task: dict[str, Any]) -> None:
    got = evaluated("local-chat-completions", f"{served}/v1/chat/completions", task)
    assert got == [text.split("\n\n\n")[0] for text in answers(offline, MORE)]


@pytest.mark.clients
@pytest.mark.parametrize("token_ids", [False, True], ids=["texts", "token ids"])
def test_lm_eval_completions(
    served: str, offline: DiffusionLLM, task: dict[str, Any], tiny_checkpoint: Path, token_ids: bool
) -> None:
    tokenizer = offline.tokenizer
    assert tokenizer is not None
    got = evaluated(
        "local-completions",
        f"{served}/v1/completions",
        task,
        tokenizer_backend="huggingface",
        tokenizer=str(tiny_checkpoint),
        tokenized_requests=token_ids,
    )
    prompts = [tokenizer.encode(question, add_special_tokens=False) for question in MORE]
    outputs = offline.generate(prompts, max_tokens=32)
    assert got == [output.text.split("\n\n\n")[0] for output in outputs]


@pytest.mark.clients
def test_lm_eval_is_told_why_there_is_no_loglikelihood(
    served: str, task: dict[str, Any], tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scored = {name: value for name, value in task.items() if name not in ("generation_kwargs", "metric_list")}
    scored |= {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}]}
    tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": str(tiny_checkpoint)}
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="400"):
        evaluated("local-completions", f"{served}/v1/completions", scored, num_concurrent=1, **tokenizer)
    assert "echo" in caplog.text and "logprobs" in caplog.text
