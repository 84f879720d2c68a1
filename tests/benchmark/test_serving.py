"""The benchmark of a served model: its loads, its client, its figures, and a whole run against a server without Ray."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.benchmark import serving
from d3llm_ray.benchmark.exchange import Answered, Exchange, Passage
from d3llm_ray.benchmark.serving_client import serving_client
from d3llm_ray.benchmark.serving_load import Bounds, ClosedLoad, OpenLoad
from d3llm_ray.benchmark.serving_rows import Slo, of_offline, same_answer, same_tokens, serving_row
from d3llm_ray.benchmark.serving_settings import ServeBenchmarkSettings
from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.errors import InputError, WorkError
from d3llm_ray.progress import Progress
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.settings import ReplicaSettings
from d3llm_ray.tasks import load_task

QUIET = Progress(quiet=True)
ANSWER = Answered("12.", "stop", 7, 3, 2, {0: (0, "1"), 1: (1, "2"), 2: (1, ".")})


def exchange(sent: float, first: float | None, end: float, **fields: Any) -> Exchange:
    return Exchange(0, sent, end, "200", first, **{"answer": ANSWER, **fields})


# --- a whole run


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path) -> Iterator[str]:
    with serve_locally(ReplicaSettings(model=str(tiny_checkpoint), max_batch_size=4)) as url:
        yield url


def settings_for(url: str | None, model: Path, output: Path, **values: Any) -> ServeBenchmarkSettings:
    sizes = {"requests": 5, "rounds": 2, "warm_up": 2, "compared": 6, "max_batch_size": 4, "max_tokens": 16}
    return build(ServeBenchmarkSettings, {"url": url, "model": str(model), "output": output, **sizes, **values})


@pytest.mark.parametrize("stream", [True, False])
def test_a_run_against_a_server(
    url: str, tiny_checkpoint: Path, tmp_path: Path, stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(url, tiny_checkpoint, tmp_path / "out", concurrency=(3, 1), rates=(50.0,), stream=stream)
    text = str(serving.run(settings, QUIET))
    found = json.loads(text.splitlines()[-1])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert found["benchmark"] == "serve" and found["plan"]["max_tokens"] == 16
    assert [row["name"] for row in found["rows"]] == [
        "offline, 1 at a time", "1 client", "offline, 3 at a time", "3 clients", "50 requests/s",
    ]  # fmt: skip
    offline = DiffusionLLM.from_pretrained(tiny_checkpoint)
    problems = load_task("arith").problems("test", 6)[:5]
    expected = offline.generate([problem.messages for problem in problems], max_tokens=16)
    for row in found["rows"]:
        assert row["sent"] == row["answered"] == 2 * 5 and row["errors"] == {}
        assert row["tokens"] == 2 * sum(len(output.token_ids) for output in expected)
        assert row["prompt_tokens"] == 2 * sum(output.prompt_tokens for output in expected)
        assert row["forwards"] == 2 * sum(output.forwards for output in expected)
        assert row["identical"] == (None if row["kind"] == "offline" else 10)
        assert 0 < row["total_s"]["p50"] <= row["total_s"]["p90"] <= row["total_s"]["p99"] < 60
        has_first = stream or row["kind"] == "offline"
        assert (row["first_s"] is not None) == has_first
        assert not has_first or row["first_s"]["p50"] <= row["total_s"]["p50"]
        assert (row["added_ms"] is not None) == (row["kind"] == "closed")
        assert (row["floor_ms"] is not None) == (row["kind"] != "offline")
        # Nothing is decoded for it; the faster of the two rounds, on a busy machine.
        assert row["floor_ms"] is None or 0 < row["floor_ms"][1] < 1e3 * row["total_s"]["p50"]
    assert sorted(ratio["what"] for ratio in found["ratios"]) == [
        "1 client: tokens/s / offline", "3 clients: tokens/s / offline",
    ]  # fmt: skip
    assert "6 of 6 answers equal the offline ones token for token (3 clients)" in text
    assert (tmp_path / "out" / "latency.png").read_bytes()[1:4] == b"PNG"


def test_a_server_that_answers_otherwise_is_found_out(url: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The offline engine has another decoder than the server: answers are compared, not only counted."""
    settings = settings_for(
        url, tiny_checkpoint, tmp_path, concurrency=(2,), decoder_settings={"entropy_threshold": 5.0}, rounds=1
    )
    text = str(serving.run(settings, QUIET))
    (row,) = [row for row in json.loads(text.splitlines()[-1])["rows"] if row["kind"] == "closed"]
    assert row["identical"] < row["answered"] == 5
    assert "6 of 6 answers" not in text


def test_what_cannot_be_measured_is_said_before_the_work(url: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("two words")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"concurrency": (), "rates": ()}, "^concurrency: "),
        ({"concurrency": (0,)}, "^concurrency: "),
        ({"rates": (-1.0,)}, "^rates: "),
        ({"device": "cuda"}, "^offline: "),
        ({"url": None, "concurrency": (99,), "max_queue": 3}, "^concurrency: got 99; accepted: at most 7 "),
        ({"api_key_file": tmp_path / "none"}, "^api_key_file: cannot read"),
        ({"api_key_file": key}, "^api_key_file: .*one key"),
        ({"prompts": "missing.jsonl"}, "^prompts: "),
        ({"served_model_name": "other", "offline": False}, "^served_model_name: .*accepted: tiny-random"),
    ]
    for number, (values, message) in enumerate(wrong):
        with pytest.raises(InputError, match=message):
            serving.run(settings_for(values.pop("url", url), tiny_checkpoint, tmp_path / str(number), **values), QUIET)
    with pytest.raises(WorkError, match="does not answer"):
        serving.run(settings_for("http://127.0.0.1:9", tiny_checkpoint, tmp_path / "dead", offline=False), QUIET)


# --- loads


def test_a_closed_load_has_as_many_requests_under_way_as_clients() -> None:
    busy, most, asked = 0, 0, []

    async def ask(number: int, since: float | None) -> Exchange:
        nonlocal busy, most
        assert since is None
        busy, most = busy + 1, max(most, busy + 1)
        await asyncio.sleep(0.002)
        busy -= 1
        asked.append(number)
        return exchange(0, 0, 1)

    passage = asyncio.run(ClosedLoad(3).run(ask, Bounds(20, 60)))
    assert most == 3 and sorted(asked) == list(range(20)) and len(passage.exchanges) == 20
    late = asyncio.run(ClosedLoad(2).run(ask, Bounds(10**6, 0.05)))
    assert 2 <= len(late.exchanges) < 100 and late.seconds < 5


def test_an_open_load_waits_for_nobody_and_counts_from_when_a_request_was_due() -> None:
    load = OpenLoad(200.0, seed=3)
    due = list(load.arrivals(Bounds(2000, 1e9)))
    gaps = [after - before for before, after in zip([0.0, *due], due, strict=False)]
    # Of an exponential distribution the mean is the standard deviation: 1 / rate; 2,000 draws are within a tenth.
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 200, rel=0.1) and deviation == pytest.approx(1 / 200, rel=0.1)
    assert due == list(OpenLoad(200.0, seed=3).arrivals(Bounds(2000, 1e9)))
    assert due != list(OpenLoad(200.0, seed=4).arrivals(Bounds(2000, 1e9)))
    assert list(load.arrivals(Bounds(2000, due[10]))) == due[:10] and len(list(load.arrivals(Bounds(7, 1e9)))) == 7
    began = time.perf_counter()
    seen: list[float] = []
    gate = asyncio.Event()

    async def ask(number: int, since: float | None) -> Exchange:
        assert since is not None
        seen.append(since - began)
        if number == 19:
            gate.set()  # the first is still under way when the last arrives
        await asyncio.wait_for(gate.wait(), 5)
        return exchange(0, 0, 1)

    passage = asyncio.run(load.run(ask, Bounds(20, 60)))
    assert len(passage.exchanges) == 20
    shift = seen[0] - due[0]
    assert [moment - shift for moment in seen] == pytest.approx(due[:20], abs=1e-6)


# --- the client


class Stub(BaseHTTPRequestHandler):
    """Answers by what the first message says: a status, a stream without its end, silence."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        wanted = body["messages"][0]["content"]
        if wanted == "silence":
            time.sleep(0.6)
        self.send_response(200 if wanted in ("broken", "silence") else int(wanted))
        self.send_header("x-key", str(self.headers["authorization"]))
        self.end_headers()
        self.wfile.write(b'data: {"choices": [{"delta": {"content": "1"}}]}\n\ndata: {"error": {}}\n\n')

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def stub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("content", "status"), [("429", "429"), ("500", "500"), ("broken", "broken"), ("silence", "timeout")]
)
def test_what_is_no_answer_is_an_error_by_its_status(stub: str, content: str, status: str) -> None:
    async def ask(url: str) -> Exchange:
        async with serving_client(url, "key", {"model": "m"}, stream=True, timeout_s=0.3) as client:
            return await client.ask(4, [{"role": "user", "content": content}])

    got = asyncio.run(ask(stub))
    assert (got.prompt, got.status, got.answer) == (4, status, None) and got.end >= got.sent
    assert asyncio.run(ask("http://127.0.0.1:9")).status == "connection"


# --- figures


def test_figures_of_a_load_by_hand() -> None:
    rounds = [
        Passage((exchange(0, 1, 2), exchange(0, 3, 6), exchange(1, None, 2, answer=None)), 6.0, 1.5),
        Passage((exchange(10, 11, 14),), 3.0, 1.5),
    ]
    offline = [Passage((exchange(0, 0, 1),), 1.0), Passage((exchange(0, 0, 2),), 2.0)]
    other = Answered("13.", "stop", 7, 3, 2)
    row = serving_row("2 clients", "closed", 2, rounds, Slo(1.0, 4.0), {0: ANSWER}, offline, [0.002, 0.004])
    assert (row.sent, row.answered, row.errors) == (4, 3, {"200": 1})
    assert (row.tokens, row.forwards, row.prompt_tokens, row.tpf) == (9, 6, 21, 1.5)
    assert (row.tps, row.tps_low, row.tps_high) == (1.0, 1.0, 1.0)  # 6 tokens in 6 s, 3 in 3 s
    assert row.first_s is not None and row.first_s["p50"] == 1.0 and row.total_s is not None
    assert row.total_s["p50"] == 4.0 and row.total_s["p99"] == pytest.approx(5.96)
    assert row.user_tps == 0.75
    assert row.good_share == 0.5 and row.good_rate == 2 / 9  # the one of 6 s and the error are not
    assert row.client_cpu == 0.5 and row.identical == 3
    assert row.added_ms == (2500.0, 2000.0, 3000.0)  # medians of 4 - 1 and 4 - 2 seconds
    assert row.floor_ms == (3.0, 2.0, 4.0)
    assert serving_row("x", "closed", 2, rounds, Slo(1, 4), {0: other}, offline).identical == 0
    (ratio,) = of_offline({"2 clients": rounds, "3 requests/s": rounds}, {"2 clients": offline})
    assert (ratio.value, ratio.low, ratio.high) == (pytest.approx(0.5), pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_answers_are_the_same_only_in_every_token() -> None:
    assert same_tokens(exchange(0, 0, 1), ANSWER)
    for revealed in (
        {0: (0, "1"), 1: (1, "2")},
        {0: (0, "1"), 1: (0, "2"), 2: (1, ".")},
        {0: (0, "1"), 1: (1, "3"), 2: (1, ".")},
    ):
        changed = Answered("12.", "stop", 7, 3, 2, revealed)
        assert same_answer(exchange(0, 0, 1, answer=changed), ANSWER)
        assert not same_tokens(exchange(0, 0, 1, answer=changed), ANSWER)
    for answer in (None, Answered("12.", "length", 7, 3, 2), Answered("12.", "stop", 7, 3, 3)):
        assert not same_answer(exchange(0, 0, 1, answer=answer), ANSWER)
