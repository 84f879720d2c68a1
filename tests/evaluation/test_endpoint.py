"""`evaluate --url`: rows through a served endpoint are those of the engine, and what the server refuses is named."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.clients import batch
from d3llm_ray.config import build
from d3llm_ray.decoding import PRESETS, decoder
from d3llm_ray.errors import IncompleteError, InputError, WorkError
from d3llm_ray.evaluation import run as verb
from d3llm_ray.evaluation.endpoint import overrides
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.settings import ReplicaSettings
from d3llm_ray.tasks import Problem, Task, load_task
from tests.clients.conftest import Answer, Scripted, refusal, scripted
from tests.wiring import Notes

__all__ = ["scripted"]  # the fixture
QUESTION = "Tom has {} apples. Tom buys 2 more. How many apples does Tom have now?"
Start = Callable[..., Scripted]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once; no key of this machine is sent anywhere; no picture is drawn."""
    monkeypatch.setattr(batch, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(verb, "can_plot", lambda *_: False)
    for name in ("D3LLM_RAY_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[str]:
    """A random model, whose operator has set another threshold and block size than the preset's."""
    settings = ReplicaSettings(
        model=str(tiny_checkpoint),
        decoder="d3llm",
        decoder_settings={"entropy_threshold": 1.5, "block_size": 8},
        max_batch_size=4,
        max_tokens_limit=64,
    )
    with serve_locally(settings) as url:
        yield url


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION.format(number)}]


def problems(_split: str, count: int) -> list[Problem]:
    """Chats, chats whose answer has begun, raw prompts, raw prompts whose answer has begun."""
    kinds: list[dict[str, Any]] = [{}, {"prefix": "Tom has"}, {"text": "Tom has 5"}, {"text": "Tom", "prefix": " has"}]
    return [Problem(f"id{n}", messages(n), str(n + 2), f"q{n}", **kinds[n % 4]) for n in range(count)]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Task:
    task = Task("own", problems, stop=("ap", "un"))
    monkeypatch.setattr(verb, "load_task", lambda *_: task)
    return task


def settings(output: Path, **values: Any) -> EvaluateSettings:
    common: dict[str, Any] = {
        "decoders": ["d3llm", "vanilla"], "decoder_settings": {"block_size": 16}, "tasks": ["own"], "count": 8,
        "max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 5, "output": output,
    }  # fmt: skip
    return build(EvaluateSettings, common | values)


def comparable(row: EvaluationRow) -> EvaluationRow:
    """Without what is measured, what only one of the two knows, and sums of forwards, for which samples are asked."""
    unlike: dict[str, Any] = {"seconds": 1.0, "tps": 1.0, "forwards": 1, "tpf": 1.0}
    return replace(row, **unlike, max_batch_size=None, endpoint=None, concurrency=None)


@pytest.mark.parametrize("block_size", [16, None])
def test_rows_are_those_of_the_engine_token_for_token(
    server: str, tiny_checkpoint: Path, tasks: Task, tmp_path: Path, block_size: int | None
) -> None:
    """Whatever the server's operator has set: what differs from it goes with each request."""
    given: dict[str, Any] = {} if block_size else {"decoder_settings": {}, "decoders": ["d3llm"], "count": 4}
    expected = verb.run(settings(tmp_path / "here", models=[str(tiny_checkpoint)], **given), Notes())
    notes = Notes()
    report = verb.run(
        settings(tmp_path / "there", models=["tiny-random"], url=server, concurrency=3, warmup=2, **given), notes
    )
    assert len({sample.text for row in expected.rows for sample in row.samples}) > 3
    reasons = Counter(sample.finish_reason for row in expected.rows for sample in row.samples)
    assert set(reasons) == {"stop", "length"}, reasons
    for here, there in zip(expected.rows, report.rows, strict=True):
        assert (there.endpoint, there.concurrency, there.max_batch_size, there.warmup) == (server, 3, None, 2)
        assert comparable(there) == replace(comparable(here), warmup=2)
        for ours, theirs in zip(here.samples, there.samples, strict=True):
            raw = ours.problem_id in ("id2", "id3", "id6", "id7")
            chat = ours.problem_id in ("id0", "id4")
            # A server may have begun another forward when it finds a stop string.
            more = theirs.forwards - ours.forwards if ours.finish_reason == "stop" else 0
            known = replace(ours, token_ids=None if chat else ours.token_ids, prompt=theirs.prompt)
            known = replace(known, forwards=ours.forwards + max(more, 0))
            assert theirs == known and (theirs.prompt is None) == (not raw)
    (said,) = [note for note in notes.said if note.startswith("the first prompt")]
    files = [next((tmp_path / name / "prompts").iterdir()).read_text() for name in ("here", "there")]
    assert files[0] == files[1] == said.split("\n", 1)[1] and "<|eot_id|>" in files[1]
    shown = (tmp_path / "there" / "report.md").read_text()
    assert f"known: tiny-random: {server}, 3 requests at a time" in shown
    row = json.loads((tmp_path / "there" / "report.json").read_text())["rows"][0]
    assert (row["endpoint"], row["max_batch_size"]) == (server, None)
    silent = Notes()
    verb.run(settings(tmp_path / "there", models=["tiny-random"], url=server, concurrency=3, warmup=2, **given), silent)
    assert silent.said == []  # kept


def test_a_problem_that_the_server_refuses_costs_its_own_answer(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [messages(1), [{"role": "user", "content": "5 " * 300}], [{"role": "user", "content": "cut \ud83d"}]]
    begun = replace(problems("", 2)[1], messages=rows[2])
    task = Task("own", lambda *_: [*(Problem(f"id{n}", row, "3") for n, row in enumerate(rows)), begun])
    monkeypatch.setattr(verb, "load_task", lambda *_: task)
    given = settings(tmp_path / "r", models=["tiny-random"], decoders=["d3llm"], url=server)
    with pytest.raises(IncompleteError) as caught:
        verb.run(given, Notes())
    line = str(caught.value)
    assert "missing: 3" in line and "problem 2: " in line and "exceed the model's context" in line
    assert "problem 3: " in line and "problem 4 ('q1'): " in line and "valid Unicode" in line
    (row,) = verb.run(given, Notes(), "return").rows
    assert [sample.error is None for sample in row.samples] == [True, False, False, False]


@pytest.mark.parametrize(
    ("change", "stop", "message"),
    [
        ({"models": ["gpt-9"]}, (), "models: unknown value 'gpt-9'; accepted: tiny-random"),
        (
            {"decoders": ["autoregressive"], "decoder_settings": {}},
            (),
            "decoders: unknown value 'autoregressive'; accepted: .*vanilla",
        ),
        ({"max_tokens": 65}, (), "max_tokens: got 65; accepted: at most 64 at http"),
        ({"temperature": 2.5}, (), "temperature: got 2.5; accepted: at most 2 with url"),
        ({}, tuple("abcde"), "tasks: own: stop: got .*; accepted: with url at most 4 strings"),
        ({}, ("a" * 257,), "at most 256 characters"),
        ({"actors": 2}, (), "actors: got 2; accepted: nothing beside url"),
        ({"dtype": "bfloat16"}, (), "dtype: got 'bfloat16'; accepted: nothing beside url"),
        ({"max_batch_size": 8}, (), "max_batch_size: got 8"),
        ({"url": "ftp://here"}, (), "url: got 'ftp://here'; accepted: http"),
        ({"url": None, "api_key_file": "key"}, (), "api_key_file: got 'key'; accepted: only with url"),
        ({"api_key_file": "no/such/key"}, (), "api_key_file: cannot read"),
    ],
)
def test_what_the_server_would_refuse_is_named_before_anything_is_asked(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, stop: Any, message: str
) -> None:
    monkeypatch.setattr(verb, "load_task", lambda *_: Task("own", problems, stop=stop))
    monkeypatch.setattr("d3llm_ray.evaluation.endpoint.ask_all", lambda *_: pytest.fail("asked"))
    with pytest.raises(InputError, match=message):
        verb.run(settings(tmp_path / "r", **{"models": ["tiny-random"], "url": server} | change), Notes())
    assert not (tmp_path / "r").exists()


def test_only_what_differs_is_sent() -> None:
    plain = PRESETS["d3llm"].settings()
    card: dict[str, Any] = {
        "decoder": "d3llm",
        "decoders": ["d3llm", "vanilla", "dparallel"],
        "settings_by_decoder": {
            "d3llm": plain | {"block_size": 8, "refresh_interval": 5},
            "vanilla": PRESETS["vanilla"].settings() | {"block_size": 32, "steps": 4},
        },
    }
    assert overrides(card, decoder("d3llm", refresh_interval=5, block_size=8)) == {}
    assert overrides(card, decoder("d3llm", refresh_interval=5)) == {"block_size": 32}  # the family's own
    assert overrides(card, decoder("d3llm", entropy_threshold=0.3, block_size=8)) == {
        "entropy_threshold": 0.3,
        "refresh_interval": plain["refresh_interval"],
    }
    with pytest.raises(InputError, match="vanilla: steps: got None; accepted: 4, what the server has set"):
        overrides(card, decoder("vanilla"))


CARD: dict[str, Any] = {
    "id": "scripted",
    "created": 0,
    "max_tokens_limit": 64,
    "decoder": "d3llm",
    "decoders": ["d3llm"],
    "settings_by_decoder": {"d3llm": PRESETS["d3llm"].settings()},
}
TOLD: dict[str, Any] = {
    "choices": [{"message": {"content": "#### 7"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 6, "prompt_tokens": 9, "forwards": 3},
}


@pytest.fixture
def asked(scripted: Start, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    """A server that says it is ours and answers as a test tells it; /tokenize and /detokenize as they should be."""

    def start(script: Callable[[int, dict[str, Any]], Answer], key: str | None = None) -> Scripted:
        def answer(number: int, body: dict[str, Any]) -> Answer:
            if "tokens" in body:
                return 200, {}, {"prompt": "shown"}
            return (200, {}, {"tokens": [1]}) if "max_tokens" not in body else script(number, body)

        return scripted(answer, key, {"/v1/models": {"data": [CARD]}, "/version": {"version": "1"}})

    return start


def test_settings_arrive_in_the_requests(asked: Start, tmp_path: Path) -> None:
    answers: Counter[str] = Counter()

    def script(_: int, body: dict[str, Any]) -> Answer:
        said = body["messages"][0]["content"]
        answers[said] += 1
        time.sleep(0.02)
        return (503, {}, {"error": {"message": "no room"}}) if answers[said] == 1 else (200, {}, TOLD)

    key = tmp_path / "key"
    key.write_text("secret\n")
    there = asked(script, "secret")
    given = settings(
        tmp_path / "r", models=["scripted"], decoders=["d3llm"], tasks=["arith"], count=6, warmup=1, url=there.url,
        api_key_file=key, concurrency=2, retries=1, decoder_settings={"entropy_threshold": 0.25},
    )  # fmt: skip
    (row,) = verb.run(given, Notes()).rows
    assert (row.tokens, row.forwards, row.tpf, row.problems) == (36, 18, 2.0, 6)
    decoded = [body for body in there.asked if "max_tokens" in body]
    assert len(decoded) == 2 + 6 + 5  # the warm-up's problem twice, and all problems, each refused once in all
    body = {name: value for name, value in decoded[0].items() if name != "messages"}
    assert body == {
        "model": "scripted", "max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 5, "stop": [],
        "diffusion": {"decoder": "d3llm", "entropy_threshold": 0.25},
    }  # fmt: skip
    assert there.most_at_once == 2
    assert {headers["Authorization"] for headers in there.headers} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (refusal(400, "seed: too large"), InputError, "url: http.* refuses what is asked: seed: too large"),
        (refusal(403, "not yours"), InputError, "api_key_file: .* not yours"),
        (refusal(503, "no room"), WorkError, "url: http.* answers 503 and takes no request; what is finished is kept"),
    ],
)
def test_what_every_request_is_refused_for_ends_the_run(
    asked: Start, tmp_path: Path, answer: Answer, kind: type[Exception], message: str
) -> None:
    there = asked(lambda *_: answer)
    given = settings(tmp_path / "r", models=["scripted"], decoders=["d3llm"], tasks=["arith"], url=there.url, retries=1)
    with pytest.raises(kind, match=message):
        verb.run(given.model_copy(update={"decoder_settings": {}}), Notes())
    assert list((tmp_path / "r" / "samples").iterdir()) == []


def test_an_answer_that_takes_too_long_or_fails_costs_itself_alone(asked: Start, tmp_path: Path) -> None:
    contents = [problem.messages[0]["content"] for problem in load_task("arith").problems("test", 4)]

    def script(_: int, body: dict[str, Any]) -> Answer:
        place = contents.index(body["messages"][0]["content"])
        time.sleep(2.5 if place == 2 else 0)
        return refusal(500, "NaN logits", "decoding_failed") if place == 1 else (200, {}, TOLD)

    there = asked(script)
    given = settings(
        tmp_path / "r", models=["scripted"], decoders=["d3llm"], tasks=["arith"], url=there.url, decoder_settings={},
        count=4, timeout_s=1.5,
    )  # fmt: skip
    (row,) = verb.run(given, Notes(), "return").rows
    assert [sample.error for sample in row.samples] == [None, "NaN logits", "timeout: no answer within timeout_s", None]
    assert (row.tokens, row.forwards, row.errors) == (12, 6, 2)


def test_a_kept_row_is_that_of_a_server_as_it_is(asked: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = asked(lambda *_: (200, {}, TOLD))
    given = settings(
        tmp_path / "r", models=["scripted"], decoders=["d3llm"], tasks=["arith"], url=there.url, count=2,
        decoder_settings={},
    )  # fmt: skip

    def asks() -> bool:
        before = len(there.asked)
        verb.run(given, Notes())
        return len(there.asked) > before

    assert asks() and not asks()
    monkeypatch.setitem(CARD, "created", 7)  # it was started again
    assert not asks()
    monkeypatch.setitem(CARD, "adapter", "another")
    assert asks() and not asks()


def test_a_server_of_another_kind_is_refused(scripted: Start, tmp_path: Path) -> None:
    there = scripted()
    with pytest.raises(InputError, match="url: got 'http.*accepted: a server of d3llm-ray"):
        verb.run(settings(tmp_path / "r", models=["scripted"], tasks=["arith"], url=there.url), Notes())
