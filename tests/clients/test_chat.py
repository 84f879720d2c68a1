"""The verb `chat`: the canvas it draws, what it asks and remembers, on a terminal and in a pipe."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from rich.cells import cell_len
from rich.console import Console

from d3llm_ray.cli import main
from d3llm_ray.clients import chat
from d3llm_ray.clients.canvas import CanvasView, ShownToken
from d3llm_ray.clients.chat import Terminal
from d3llm_ray.clients.conversation import Conversation
from d3llm_ray.clients.settings import ChatSettings
from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.errors import InputError
from tests.clients.conftest import Answer, Scripted, refusal

Start = Callable[..., Scripted]
ROOT = Path(__file__).parents[2]
STEERING = "\x1b[2J\x1b]0;mine\x07\x9b5A\r\x08\u202e日本語"


def event(forward: int, *reveals: tuple[int, str, float], **changes: int) -> dict[str, Any]:
    return {
        "forward": forward,
        "positions": [position for position, _, _ in reveals],
        "text": [text for _, text, _ in reveals],
        "entropy": [entropy for _, _, entropy in reveals],
        **{"size": 8, "block_size": 4, "opened": 8, "frozen": 0, **changes},
    }


def sse(text: str, diffusion: dict[str, Any] | None = None, finish: str | None = None) -> str:
    chunk = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "scripted",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}],
    }
    return f"data: {json.dumps(chunk | ({} if diffusion is None else {'diffusion': diffusion}))}\n\n"


def streamed(*texts: str) -> Answer:
    return 200, {}, iter([*(sse(text) for text in texts), sse("", finish="stop"), "data: [DONE]\n\n"])


# --- the canvas


def test_a_canvas_is_what_its_events_say() -> None:
    """Worked by hand: two blocks of four, the second not open at first, then the first one frozen."""
    canvas = CanvasView("entropy")
    canvas.apply(event(0, (0, "A", 0.05), (2, "C", 2.0), opened=4))
    assert canvas.cells().plain == "▓░▓░ ····" and canvas.answer().plain == "░C░" and canvas.revealed == 2
    canvas.text = "A"
    canvas.apply(event(1, (1, "\n", 0.2), (3, "D\x1b[2J", 0.5), (5, "F", 0.7), frozen=4))
    assert canvas.cells().plain == "████ ░▓░░" and canvas.forwards == 2
    canvas.text = "A\nCD\x1b[2J"
    assert canvas.answer().plain == "A\nCD\ufffd[2J░F░░"
    assert canvas.footer().plain.startswith("forward 2  5/8 positions  TPF 2.50  ")
    assert canvas.tokens[1] == ShownToken("⏎", 0.2, 1)


def test_colours_tell_the_entropy_or_the_forward() -> None:
    tokens = [ShownToken("x", entropy, forward) for forward, entropy in enumerate((0.0, 0.2, 0.5, 1.0, 3.0))]
    assert [token.style("entropy") for token in tokens] == ["bright_green", "green", "yellow", "dark_orange", "red"]
    assert len({token.style("forward") for token in tokens}) == 5
    assert ShownToken("x", 3.0, 1).style("forward") == ShownToken("x", 0.0, 1).style("forward")
    for color, expected in (("entropy", "red"), ("forward", "cyan")):
        canvas = CanvasView(color)  # type: ignore[arg-type]
        canvas.apply(event(0, (1, "x", 3.0)))
        assert expected in {str(span.style) for span in canvas.cells().spans}
        assert expected in {str(span.style) for span in canvas.answer().spans}


@pytest.mark.parametrize(("width", "height"), [(80, 24), (20, 6), (7, 3)])
def test_a_frame_never_leaves_the_screen(width: int, height: int) -> None:
    """Long answers, wide letters and control characters, on any size of terminal."""
    canvas = CanvasView("entropy", text=f"long words {'x' * 300} {'日本語' * 60} {STEERING} " * 9)
    canvas.apply(event(0, (0, "A", 0.1), (500, STEERING, 0.1), size=512, block_size=32, opened=512))
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, height=height, color_system=None)
    console.print(canvas)
    lines = screen.getvalue().rstrip("\n").split("\n")
    assert len(lines) <= height and all(cell_len(line) <= width for line in lines)
    assert all(letter.isprintable() for line in lines for letter in line)


# --- what is asked


@contextmanager
def conversation(server: Scripted, watch: bool = False, system: str | None = None) -> Iterator[Conversation]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield Conversation(client, "scripted", system, watch)


def ask(talk: Conversation, text: str) -> str:
    with talk.answering(text) as answer:
        return "".join(new for new, _ in answer)


def test_history_is_sent_as_messages_until_it_is_cleared(scripted: Start) -> None:
    server = scripted(lambda number, body: streamed(f"answer {number}"))
    with conversation(server, system="be brief") as talk:
        ask(talk, "one")
        ask(talk, "two")
        ask(talk, "three")
        talk.clear()
        ask(talk, "four")
    sent = [[(message["role"], message["content"]) for message in body["messages"]] for body in server.asked]
    first = [("system", "be brief"), ("user", "one")]
    second = [*first, ("assistant", "answer 0"), ("user", "two")]
    assert sent == [
        first,
        second,
        [*second, ("assistant", "answer 1"), ("user", "three")],
        [("system", "be brief"), ("user", "four")],
    ]


def test_settings_reach_the_request_under_their_names(scripted: Start) -> None:
    server = scripted(lambda number, body: streamed("x"))
    with conversation(server) as talk:
        ask(talk, "plain")
        for line in ("max_tokens 9", "top_k 3", "seed 5", "entropy_threshold 0.3", "early_stop false", "suffix none"):
            talk.set(*line.split())
        talk.watch = True
        ask(talk, "set")
        for name in ("max_tokens", "suffix", "top_k", "seed", "early_stop"):
            talk.set(name, "")
        ask(talk, "unset")
        for value in ("[1", ".nan", "2020-01-01"):
            with pytest.raises(InputError, match="^entropy_threshold: got "):
                talk.set("entropy_threshold", value)
    plain, with_settings, without = server.asked
    assert plain.keys() == {"model", "messages", "stream", "stream_options"} and plain["model"] == "scripted"
    diffusion = {"entropy_threshold": 0.3, "early_stop": False, "suffix": "none", "events": True}
    assert {name: with_settings[name] for name in ("max_tokens", "top_k", "seed")} == {
        "max_tokens": 9,
        "top_k": 3,
        "seed": 5,
    }
    assert with_settings["diffusion"] == diffusion
    assert without.keys() - plain.keys() == {"diffusion"}
    assert without["diffusion"] == {"entropy_threshold": 0.3, "events": True}


# --- a pipe


def piped(text: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", *words])


def test_lines_of_a_pipe_are_answered_as_one_conversation(
    served: str, offline: DiffusionLLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert piped("3 + 4\n\n5 + 6\n", "--url", served, monkeypatch=monkeypatch) == 0
    messages = [{"role": "user", "content": "3 + 4"}]
    first = offline.generate([messages], max_tokens=32)[0].text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "5 + 6"}]
    second = offline.generate([messages], max_tokens=32)[0].text
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_a_model_is_served_in_this_process(
    tiny_checkpoint: Path,
    offline: DiffusionLLM,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--model", str(tiny_checkpoint), "--max-tokens", "16"]
    assert piped("3 + 4", *words, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == offline.generate(["3 + 4"], max_tokens=16)[0].text + "\n"


def test_an_error_is_one_line_and_the_next_line_is_answered(
    scripted: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [
        refusal(400, f"no\n{STEERING}", "context_length_exceeded"),
        streamed("ok"),
        (200, {}, iter([sse("half")])),
        (200, {}, iter([sse("a"), 'data: {"error": {"message": "the engine failed"}}\n\n'])),
        (0, {}, None),
        streamed(STEERING),
    ]
    monkeypatch.setattr(openai.OpenAI, "_calculate_retry_timeout", lambda *_: 0.0)
    server = scripted(lambda number, body: answers[min(number, 4) if number < 7 else 5])
    assert piped("1\n2\n3\n4\n5\n6\n", "--url", server.url, monkeypatch=monkeypatch) == 1
    out, err = capsys.readouterr()
    assert out == "ok\nhalf\na" + "\ufffd[2J\ufffd]0;mine\ufffd\ufffd5A\ufffd\ufffd\ufffd日本語\n"
    said = err.splitlines()
    assert said[0].startswith("d3llm-ray: no \ufffd[2J") and said[0].endswith("/clear forgets the conversation")
    assert said[1:3] == ["d3llm-ray: the answer was cut off", "d3llm-ray: the engine failed"]
    assert said[3].startswith("d3llm-ray: Connection error")
    assert said[4:] == ["d3llm-ray: stdin: 4 of 6 lines not answered"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"watch": True}, "^watch: .*only on a terminal"),
        ({"served_model_name": "other"}, "^served_model_name: unknown value 'other'; accepted: scripted"),
        ({"model": "tiny-dream"}, "^model: "),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], message: str, scripted: Start) -> None:
    with pytest.raises(InputError, match=message):
        chat.run(build(ChatSettings, {"watch": False, "url": scripted().url, **values}))


# --- a terminal


class Screen:
    """The verb on a terminal of 70 by 20, as a user sits before it."""

    def __init__(self, *words: str) -> None:
        self.unread = b""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", PYTHONPATH=str(ROOT), COLUMNS="70", LINES="20")
            os.execv(sys.executable, [sys.executable, "-m", "d3llm_ray.cli", "chat", *words])
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 70, 0, 0))

    def until(self, text: str, seconds: float = 30.0) -> str:
        """What comes on the screen, up to `text`."""
        deadline, wanted = time.monotonic() + seconds, text.encode()
        while wanted not in self.unread:
            assert time.monotonic() < deadline, self.unread
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.unread += os.read(self.descriptor, 65536)
        seen, _, self.unread = self.unread.partition(wanted)
        return (seen + wanted).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def interrupt_prompt(self, until: str) -> None:
        """Ctrl-C at a prompt, and again: one that comes between readline's prompt and its reading is seen with
        the next key only."""
        for _ in range(5):
            self.type("\x03")
            with suppress(AssertionError):
                self.until(until, seconds=6)
                return
        pytest.fail(f"no {until!r}: {self.unread!r}")

    def exit_code(self) -> int:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with suppress(OSError):
                if select.select([self.descriptor], [], [], 0.05)[0]:
                    os.read(self.descriptor, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        pytest.fail("it did not end")


def endless(number: int, body: dict[str, Any]) -> Answer:
    """Answers without an end, but for a message that says `short`."""
    if "short" in body["messages"][-1]["content"]:
        return streamed(f"short {STEERING} answer")

    def pieces() -> Iterator[str]:
        for position in range(10_000):
            shown = event(position, (position % 8, "tok", 0.1)) if (body.get("diffusion") or {}).get("events") else None
            yield sse("tok ", shown)
            time.sleep(0.01)

    return 200, {}, pieces()


@pytest.mark.parametrize("words", [(), ("--no-watch",)], ids=["watched", "plain"])
def test_ctrl_c_stops_the_answer_and_not_the_program(words: tuple[str, ...], scripted: Start) -> None:
    server = scripted(endless)
    screen = Screen("--url", server.url, *words)
    screen.until("> ")
    screen.type("go on\n")
    screen.until("tok tok tok" if words else "▓")
    screen.type("\x03")
    screen.until("(stopped)")
    screen.until("> ")
    screen.interrupt_prompt(until="/quit or Ctrl-D ends")  # there it ends nothing either
    screen.until("> ")
    screen.type("short\n")
    shown = screen.until("> ")
    assert "short \ufffd[2J\ufffd]0;mine\ufffd\ufffd5A\ufffd\ufffd\ufffd日本語 answer" in shown
    assert "\x1b]0;" not in shown and "\x9b" not in shown and "\u202e" not in shown
    screen.type("/quit\n")
    assert screen.exit_code() == 0
    assert server.left == 1
    assert [message["role"] for message in server.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_it_ends_by_ctrl_d_and_by_sigterm(scripted: Start) -> None:
    server = scripted(endless)
    screen = Screen("--url", server.url)
    screen.until("> ")
    screen.type("\x04")
    assert screen.exit_code() == 0
    screen = Screen("--url", server.url)
    screen.until("> ")
    screen.type("go on\n")
    screen.until("tok tok")
    os.kill(screen.pid, signal.SIGTERM)
    assert screen.exit_code() == 130


def test_commands(scripted: Start) -> None:
    server = scripted(lambda number, body: streamed("x"))
    with conversation(server) as talk:
        shown = io.StringIO()
        terminal = Terminal(talk, "entropy", Console(file=shown, width=120))
        for line in ("/set entropy_threshold 0.3", "/set", "/color forward", "/color blue", "/nonsense", "/set x [1"):
            terminal.command(line)
        talk.messages.append({"role": "user", "content": "x"})
        terminal.command("/clear")
        terminal.command("/help")
        assert talk.messages == [] and talk.options == {"entropy_threshold": 0.3}
        lines = shown.getvalue().splitlines()
        assert lines[:3] == [
            "entropy_threshold 0.3",
            "'/color blue' is no command; /help lists them",
            "'/nonsense' is no command; /help lists them",
        ]
        assert lines[3].startswith("x: got '[1'") and lines[4].startswith("/set NAME VALUE")
        assert terminal._color == "forward"


def test_a_watched_answer_ends_with_its_text_and_figures(served: str, offline: DiffusionLLM) -> None:
    (expected,) = offline.generate(["3 + 4"], max_tokens=32)
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none") as client:
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=True, width=100, height=30, color_system=None)
        Terminal(Conversation(client, "tiny-random", None, watch=True), "forward", console).turn("3 + 4")
    seen = shown.getvalue()
    tokens, forwards = len(expected.token_ids), expected.forwards
    assert f"({tokens} tokens, {forwards} forwards, TPF {tokens / forwards:.2f}, " in seen.splitlines()[-1]
    assert f"forward {forwards}  " in seen and "colour: forward" in seen
    assert seen.endswith(expected.text + "\n" + seen.splitlines()[-1] + "\n")
