"""The verb `batch`: through a model or a server; what is refused, tried again, kept and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from d3llm_ray.cli import main
from d3llm_ray.clients import batch
from d3llm_ray.clients.batch_output import partial_file, record_file
from d3llm_ray.clients.settings import BatchSettings
from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.errors import IncompleteError, InputError, WorkError
from d3llm_ray.progress import Progress
from tests.clients.conftest import Answer, Scripted, echo, refusal, said

CHAT = "/v1/chat/completions"
Start = Callable[..., Scripted]


def row(name: str, content: Any = None, **changes: Any) -> dict[str, Any]:
    body = {"model": "scripted", "messages": [{"role": "user", "content": name if content is None else content}]}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body, **changes}


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run(folder: Path, server: Scripted | None, **values: Any) -> str:
    given = {"input": folder / "in.jsonl", "output": folder / "out.jsonl", **values}
    if server is not None:
        given["url"] = server.url
    return batch.run(build(BatchSettings, given), Progress(quiet=True))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once; no key of this machine is sent anywhere."""
    monkeypatch.setattr(batch, "FIRST_WAIT_S", 0.001)
    for name in ("D3LLM_RAY_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_answers_are_the_offline_ones_in_the_order_of_the_requests(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line as it is documented: a batch of more requests than slots, answers of unlike lengths."""
    questions = {f"id-{n}": (f"Tom has {n} apples. How many?", 8 + 8 * (n * 5 % 7)) for n in range(12)}
    rows = [
        row(name, text, body={**row("")["body"], "model": "tiny-random", "max_tokens": length})
        for name, (text, length) in questions.items()
    ]
    for one, (text, _) in zip(rows, questions.values(), strict=True):
        one["body"]["messages"][0]["content"] = text
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    words = ["batch", str(source), str(output), "--model", str(tiny_checkpoint), "--max-batch-size", "4"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{output}\n"
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint)
    answers = lines(output)
    assert [answer["custom_id"] for answer in answers] == list(questions)
    assert len({answer["id"] for answer in answers}) == len(answers)
    for answer, (text, length) in zip(answers, questions.values(), strict=True):
        assert answer.keys() == {"id", "custom_id", "response", "error"} and answer["error"] is None
        assert answer["response"].keys() == {"status_code", "request_id", "body"}
        assert answer["response"]["status_code"] == 200 and answer["response"]["request_id"]
        (expected,) = llm.generate([text], max_tokens=length)
        completion = ChatCompletion.model_validate(answer["response"]["body"])
        assert completion.choices[0].message.content == expected.text
    assert sorted(os.listdir(output.parent)) == ["out.jsonl", "out.jsonl.batch.json"]


def test_one_bad_request_costs_its_own_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(name, "2 + 3") for name in ("a", "bad", "other", "b")]
    for one in rows:
        one["body"] |= {"model": "tiny-random", "max_tokens": 8}
    rows[1]["body"]["max_tokens"] = -1
    rows[2]["body"]["model"] = "gpt-9"
    output = tmp_path / "out.jsonl"
    words = ["batch", str(write(tmp_path / "in.jsonl", rows)), str(output), "--model", str(tiny_checkpoint)]
    for _ in range(2):  # and when it is finished, the same is said of it
        assert main(words) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(
            f"d3llm-ray: input: 2 of 4 not answered, the others are in {output}: line 2 ('bad'): max"
        )
        assert "; line 3 ('other'): model: 'gpt-9' is not served here" in last
    found = {line["custom_id"]: line for line in lines(output)}
    assert [found[name]["response"]["status_code"] for name in ("a", "bad", "other", "b")] == [200, 400, 404, 200]
    assert found["bad"]["error"] is None and found["bad"]["response"]["body"]["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["{", row("a")], "line 1: not JSON: "),
        ([row("a"), "", row("a")], "line 3: custom_id: 'a' is that of line 1 as well"),
        ([row("a", method="GET")], 'line 1: method: got "GET"; accepted: "POST"'),
        ([row("a", url="/v1/embeddings")], 'line 1: url: got "/v1/embeddings"; accepted: /v1/chat/completions or /v1/'),
        ([row("a", url=["x"])], 'line 1: url: got ["x"]'),
        ([row("a", body=[1])], "line 1: body: got [1]; accepted: an object"),
        ([row("a", body={"stream": True})], "line 1: body.stream: "),
        (
            [row(""), row("b", custom_id=5)],
            'line 1: custom_id: got ""; accepted: a text that is not empty; line 2: cus',
        ),
        ([row("a", priority=1)], "line 1: accepted: an object with custom_id, method, url, body and nothing else"),
        (["[1]"], "line 1: accepted: an object"),
        (["\udcff"], "line 1: not UTF-8"),
        (["9" * 5000], "line 1: not JSON: "),
        (["[" * 100_000], "line 1: not JSON: "),
        (["", " "], "holds no requests"),
        ([row(str(n), method="PUT") for n in range(12)], 'line 10: method: got "PUT"; accepted: "POST"; and 2 more'),
    ],
)
def test_the_whole_input_is_checked_before_anything_is_asked(
    rows: list[Any], said: str, scripted: Start, tmp_path: Path
) -> None:
    server = scripted()
    content = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows)
    (tmp_path / "in.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as refused:
        run(tmp_path, server)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert server.asked == [] and os.listdir(tmp_path) == ["in.jsonl"]


def test_a_byte_order_mark_and_windows_line_ends_are_read(scripted: Start, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row("a")).encode() + b"\r\n\r\n")
    run(tmp_path, scripted())
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == ["a"]


def test_bodies_and_routes_arrive_as_they_were_written(scripted: Start, tmp_path: Path) -> None:
    bodies = [{"prompt": "é \ud83d", "x": [1, None, float("inf")]}, {"prompt": [1, 2], "n": 10**30}]
    rows = [row(str(n), url="/v1/completions", body=body) for n, body in enumerate(bodies)]
    write(tmp_path / "in.jsonl", rows)
    server = scripted(lambda number, body: said("x"))
    run(tmp_path, server, concurrency=1)
    assert server.asked == bodies and server.paths == ["/v1/completions"] * 2
    asked, written = [headers["X-Request-Id"] for headers in server.headers], lines(tmp_path / "out.jsonl")
    assert asked == [line["id"] for line in written] == [line["response"]["request_id"] for line in written]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 0])
def test_what_may_pass_is_tried_again(status: int, scripted: Start, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [row("a"), row("b")])
    server = scripted(lambda number, body: refusal(status) if number < 3 else echo(number, body))
    run(tmp_path, server, concurrency=1)
    assert [body["messages"][0]["content"] for body in server.asked] == ["a"] * 4 + ["b"]
    assert [line["response"]["status_code"] for line in lines(tmp_path / "out.jsonl")] == [200, 200]


def test_retry_after_is_waited_for(scripted: Start, tmp_path: Path) -> None:
    times: list[float] = []

    def script(number: int, body: dict[str, Any]) -> Answer:
        times.append(time.monotonic())
        return refusal(429, Retry_After="1") if number == 0 else echo(number, body)

    write(tmp_path / "in.jsonl", [row("a")])
    run(tmp_path, scripted(script))
    assert times[1] - times[0] >= 1.0


@pytest.mark.parametrize(("status", "code"), [(400, None), (404, None), (413, None), (500, "decoding_failed")])
def test_what_will_not_pass_is_asked_once(status: int, code: str | None, scripted: Start, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [row("a")])
    server = scripted(lambda number, body: refusal(status, "because", code))
    with pytest.raises(IncompleteError, match=r"1 of 1 not answered.*line 1 \('a'\): because"):
        run(tmp_path, server)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [429, 503, 0])
def test_a_server_that_is_not_there_ends_the_run_and_not_the_requests(
    status: int, scripted: Start, tmp_path: Path
) -> None:
    write(tmp_path / "in.jsonl", [row(str(n)) for n in range(4)])
    server = scripted(lambda number, body: echo(number, body) if number < 2 else refusal(status))
    with pytest.raises(WorkError, match=r"^url: http.* (does not answer|takes no request).*the same command goes on"):
        run(tmp_path, server, concurrency=1, retries=2)
    assert len(server.asked) == 5  # two answers, and a third request three times
    assert not (tmp_path / "out.jsonl").exists()
    server.script = echo
    run(tmp_path, server)
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == ["0", "1", "2", "3"]
    assert len(server.asked) == 7


def test_an_answer_of_500_is_one_line_in_the_end(scripted: Start, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [row("poison"), row("b")])

    def script(number: int, body: dict[str, Any]) -> Answer:
        return (500, {}, "Internal Server Error") if "poison" in json.dumps(body) else echo(number, body)

    server = scripted(script)
    with pytest.raises(IncompleteError, match="1 of 2"):
        run(tmp_path, server, retries=2)
    poison, other = lines(tmp_path / "out.jsonl")
    assert poison["response"] is None
    assert poison["error"] == {"code": "invalid_response", "message": "status 500: Internal Server Error"}
    assert other["response"]["status_code"] == 200 and len(server.asked) == 4


def test_an_answer_that_takes_too_long_is_one_line(scripted: Start, tmp_path: Path) -> None:
    def script(number: int, body: dict[str, Any]) -> Answer:
        time.sleep(1.0 if number == 0 else 0.0)
        return echo(number, body)

    write(tmp_path / "in.jsonl", [row("slow"), row("b")])
    with pytest.raises(IncompleteError, match="no answer within timeout_s"):
        run(tmp_path, scripted(script), timeout_s=0.3, concurrency=1)
    slow, other = lines(tmp_path / "out.jsonl")
    assert slow["error"]["code"] == "timeout" and other["response"]["status_code"] == 200


def test_no_more_than_concurrency_are_under_way(scripted: Start, tmp_path: Path) -> None:
    def script(number: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.05)
        return echo(number, body)

    write(tmp_path / "in.jsonl", [row(str(n)) for n in range(12)])
    server = scripted(script)
    run(tmp_path, server, concurrency=3)
    assert server.most_at_once == 3 and len(server.asked) == 12


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_is_gone_on_with(kill: signal.Signals, scripted: Start, tmp_path: Path) -> None:
    """Killed three times in the middle: every answer once and whole, and nothing that was kept is asked again."""

    def script(number: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.02)
        return echo(number, body)

    server, count, at_once = scripted(script), 120, 4
    write(tmp_path / "in.jsonl", [row(f"r{n}", f"{n} " + "long é " * 3000) for n in range(count)])
    words = ["batch", "in.jsonl", "out.jsonl", "--url", server.url, "--concurrency", str(at_once)]
    command = [sys.executable, "-m", "d3llm_ray.cli", *words]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for stop in (30, 60, 90):
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
            try:
                while len(server.asked) < stop:
                    assert process.poll() is None
                    time.sleep(0.005)
                process.send_signal(kill)
                assert process.wait(20) == (-9 if kill == signal.SIGKILL else 130)
            finally:
                process.kill()
        assert not (tmp_path / "out.jsonl").exists()
    kept = partial_file(tmp_path / "out.jsonl")
    with kept.open("ab") as torn:  # as a machine that lost its power might leave it
        torn.write(b'7\tok\t{"id": "batch_req_')
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode == 0
    found = lines(tmp_path / "out.jsonl")
    assert [line["custom_id"] for line in found] == [f"r{n}" for n in range(count)]
    for number, line in enumerate(found):
        assert line["response"]["body"]["choices"][0]["message"]["content"].startswith(f"{number} long é")
    assert len(server.asked) <= count + 3 * at_once
    assert max(Counter(body["messages"][0]["content"] for body in server.asked).values()) <= 4
    assert not kept.exists()


def test_answers_are_in_the_order_of_the_requests(scripted: Start, tmp_path: Path) -> None:
    def script(number: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.3 if body["messages"][0]["content"] == "0" else 0.0)
        return echo(number, body)

    write(tmp_path / "in.jsonl", [row(str(n)) for n in range(6)])
    run(tmp_path, scripted(script), concurrency=2)
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == [str(n) for n in range(6)]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_line_is_dropped(cut: int, scripted: Start, tmp_path: Path) -> None:
    """Of three answers that are kept the last was cut after some bytes; at -1 only its line end is missing."""
    server = scripted(lambda number, body: echo(number, body) if number < 3 else refusal(503))
    write(tmp_path / "in.jsonl", [row(str(n)) for n in range(4)])
    with pytest.raises(WorkError):
        run(tmp_path, server, concurrency=1, retries=0)
    kept = partial_file(tmp_path / "out.jsonl")
    *whole, last = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(whole) + last[:cut])
    server.script = lambda number, body: refusal(503)
    with pytest.raises(WorkError):
        run(tmp_path, server, concurrency=1, retries=0)
    assert kept.read_bytes() == b"".join(whole)
    server.script = echo
    run(tmp_path, server, concurrency=1)
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == ["0", "1", "2", "3"]
    assert [body["messages"][0]["content"] for body in server.asked] == ["0", "1", "2", "3", "2", "2", "3"]


@pytest.mark.parametrize("stage", ["begun", "finished"])
@pytest.mark.parametrize("change", ["input", "settings"])
def test_a_run_that_goes_on_is_the_same_batch(stage: str, change: str, scripted: Start, tmp_path: Path) -> None:
    server = scripted(lambda number, body: echo(number, body) if stage == "finished" or number == 0 else refusal(503))
    source = write(tmp_path / "in.jsonl", [row("a"), row("b")])
    if stage == "begun":
        with pytest.raises(WorkError):
            run(tmp_path, server, retries=0, concurrency=1)
    else:
        run(tmp_path, server)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    asked = len(server.asked)
    other = server
    if change == "input":
        write(source, [row("a"), row("c")])
    else:
        other = scripted()
    with pytest.raises(InputError, match=rf"^output: .*with another {change} in"):
        run(tmp_path, other)
    assert len(server.asked) == asked and (other is server or other.asked == [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != source} == {
        name: content for name, content in before.items() if name != source.name
    }


def test_what_does_not_change_answers_may_change_between_runs(scripted: Start, tmp_path: Path) -> None:
    server = scripted(lambda number, body: echo(number, body) if number == 0 else refusal(429))
    write(tmp_path / "in.jsonl", [row("a"), row("b")])
    with pytest.raises(WorkError):
        run(tmp_path, server, retries=0, concurrency=1)
    server.script = echo
    run(tmp_path, server, retries=3, concurrency=2, timeout_s=50.0)
    assert len(server.asked) == 3
    run(tmp_path, server, retries=1)  # it is finished
    assert len(server.asked) == 3


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.batch.json", "partial", "in.jsonl", "link"])
def test_nothing_is_overwritten_that_no_run_has_written(name: str, scripted: Start, tmp_path: Path) -> None:
    server, source = scripted(), write(tmp_path / "in.jsonl", [row("a")])
    output = tmp_path / "out.jsonl"
    if name in ("in.jsonl", "link"):
        output = tmp_path / name
        if name == "link":
            output.symlink_to(source)
    else:
        file = partial_file(output) if name == "partial" else tmp_path / name
        file.write_text('{"id": 1}\n')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="^output: "):
        run(tmp_path, server, output=output)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and server.asked == []


def test_killed_between_its_last_two_steps_it_is_finished_by_the_next_run(scripted: Start, tmp_path: Path) -> None:
    server, output = scripted(), tmp_path / "out.jsonl"
    write(tmp_path / "in.jsonl", [row("a"), row("b")])
    run(tmp_path, server)
    whole, record = output.read_bytes(), json.loads(record_file(output).read_text())
    identity = {name: record[name] for name in ("made_by", "requests", "input", "settings")}
    kept = [f"{index}\tok\t".encode() + line for index, line in enumerate(whole.splitlines(keepends=True))]
    partial_file(output).write_bytes(json.dumps(identity).encode() + b"\n" + b"".join(reversed(kept)))
    run(tmp_path, server)  # the output is there, and the partial file still is as well
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "out.jsonl.batch.json"]
    partial_file(output).write_bytes(json.dumps(identity).encode() + b"\n" + b"".join(reversed(kept)))
    output.unlink()  # the record is there, and the output is not yet
    run(tmp_path, server)
    assert output.read_bytes() == whole and len(server.asked) == 2
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "out.jsonl.batch.json"]


def test_the_key_comes_from_a_file_or_the_environment(
    scripted: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = scripted(key="secret-1")
    write(tmp_path / "in.jsonl", [row("a")])
    with pytest.raises(InputError, match=r"^api_key_file: .* refuses requests without a key"):
        run(tmp_path, server)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(InputError, match=r"^api_key_file: .* refuses this key") as refused:
        run(tmp_path, server)
    assert "wrong" not in str(refused.value)
    monkeypatch.setenv("D3LLM_RAY_API_KEY", "secret-1")
    run(tmp_path, server, output=tmp_path / "one.jsonl")
    monkeypatch.setenv("D3LLM_RAY_API_KEY", "wrong")
    (tmp_path / "key").write_text("secret-1\n")
    run(tmp_path, server, output=tmp_path / "two.jsonl", api_key_file=tmp_path / "key")
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer secret-1"] * 2
    for name in os.listdir(tmp_path):
        assert name == "key" or "secret" not in (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "ftp://x"}, "^url: got 'ftp://x'"),
        ({"url": "http://me:key@x"}, "^url: "),
        ({"url": "http://127.0.0.1:8000", "model": "tiny-dream"}, "^model: got 'tiny-dream'; accepted: nothing beside"),
        ({"url": "http://127.0.0.1:8000", "max_batch_size": 4}, "^max_batch_size: "),
        ({"api_key_file": "key"}, "^api_key_file: .*only with url"),
        ({"url": "http://127.0.0.1:8000", "api_key_file": "nonesuch"}, "^api_key_file: cannot read 'nonesuch'"),
        ({"model": "gpt-9"}, "^model: "),
        ({"decoder": "d9"}, "^decoder: "),
        ({"max_tokens": 300}, "^max_tokens_limit: "),
        ({"input": "nonesuch.jsonl"}, "^input: 'nonesuch.jsonl' does not exist"),
        ({"input": "."}, "^input: '.' is no regular file"),
    ],
)
def test_settings_that_do_not_go_together_are_named(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [row("a")])
    with pytest.raises(InputError, match=message) as refused:
        run(tmp_path, None, **values)
    assert "me:key" not in str(refused.value)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_server_that_is_not_one_is_said_at_once(scripted: Start, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [row("a")])
    with pytest.raises(WorkError, match=r"^url: http://127.0.0.1:9 does not answer: "):
        run(tmp_path, None, url="http://127.0.0.1:9")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_memory_is_that_of_the_ids(tmp_path: Path, scripted: Start) -> None:
    """Of 40 MB of bodies no more than a few are held at once."""
    import resource

    from d3llm_ray.clients.batch_input import check_input, read_requests

    padding = "x" * 1_000_000
    with (tmp_path / "in.jsonl").open("w") as file:
        for number in range(40):
            file.write(json.dumps(row(str(number), padding)) + "\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert check_input(tmp_path / "in.jsonl").requests == 40
    assert sum(1 for _ in read_requests(tmp_path / "in.jsonl")) == 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 15_000  # KiB
