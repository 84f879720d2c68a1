"""The verb `chat`: a conversation in the terminal, with the canvas beside the answer; or answers to lines of stdin."""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
from rich.console import Console
from rich.live import Live

from d3llm_ray.clients.canvas import CanvasView, Color
from d3llm_ray.clients.connection import Server, check_server, connected
from d3llm_ray.clients.conversation import Conversation, StreamedAnswer
from d3llm_ray.clients.settings import ChatSettings, on_terminal
from d3llm_ray.errors import IncompleteError, InputError, one_line, require, unknown
from d3llm_ray.progress import Progress
from d3llm_ray.terminal import legible

FRAMES_PER_S = 20
HELP = """\
/set NAME VALUE    of the answers to come: max_tokens, temperature, top_p, top_k, seed, or a setting of the decoder,
                   such as entropy_threshold 0.3; without VALUE the server's own again; /set alone tells what is set
/color entropy     or forward: what the colour of a revealed position tells
/clear             forget the conversation
/quit              or Ctrl-D; Ctrl-C stops an answer"""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the program where Ctrl-C ends an answer."""


def run(settings: ChatSettings, progress: Progress | None = None) -> None:
    """Talk until `/quit` or the end of stdin.

    Raises:
        InputError: bad settings, before anything starts.
        WorkError: nothing answers at `url`.
        IncompleteError: without a terminal, some lines of stdin got no answer.
    """
    check_server(settings, also=("served_model_name",))
    require(not settings.watch or on_terminal(), "watch", settings.watch, "only on a terminal")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what is no UTF-8 ends no conversation
    with connected(settings, concurrency=1) as server, _conversation(settings, server) as conversation:
        if on_terminal():
            with _sigterm_ends():
                Terminal(conversation, settings.color).talk()
        else:
            _answer_lines(conversation)


@contextmanager
def _conversation(settings: ChatSettings, server: Server) -> Iterator[Conversation]:
    model = settings.served_model_name or next(iter(server.models), "")
    if model not in server.models:
        raise unknown("served_model_name", model, server.models)
    http = httpx2.Client(trust_env=not server.local)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key or "none", http_client=http) as client:
        yield Conversation(client, model, settings.system, settings.watch, {"temperature": settings.temperature})


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    def end(_signal: int, _frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _answer_lines(conversation: Conversation) -> None:
    asked = failed = 0
    for line in sys.stdin:
        if not line.strip():
            continue
        asked += 1
        try:
            with conversation.answering(line.strip()) as answer:
                for text, _ in answer:
                    print(legible(text), end="", flush=True)
                print(flush=True)
                _check_whole(answer)
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            failed += 1
            print(f"d3llm-ray: {error_line(error)}", file=sys.stderr)
    if failed:
        raise IncompleteError(f"stdin: {failed} of {asked} lines not answered")


def _check_whole(answer: StreamedAnswer) -> None:
    """A stream that ends without a reason has been cut off."""
    if answer.finish_reason is None:
        raise openai.OpenAIError("the answer was cut off")


def error_line(error: Exception) -> str:
    """What a server or the way to it says, in one line that steers no terminal."""
    said: Any = error
    if isinstance(error, openai.APIError) and isinstance(error.body, dict):
        said = error.body.get("message") or error
    hint = "; /clear forgets the conversation" if getattr(error, "code", None) == "context_length_exceeded" else ""
    return legible(one_line(said) or type(error).__name__) + hint


class Terminal:
    """A conversation on a terminal."""

    def __init__(self, conversation: Conversation, color: Color, console: Console | None = None) -> None:
        self._conversation = conversation
        self._color: Color = color
        self._console = console or Console(highlight=False, markup=False, emoji=False)

    def talk(self) -> None:
        """Read lines until one says to quit."""
        import readline  # noqa: F401  # lines are edited, and come back with the arrow keys

        self._say(f"{legible(self._conversation.model)}: /help lists what a line may be besides a message")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                self._say("")
                return
            except Terminated:
                raise
            except KeyboardInterrupt:
                self._say("(/quit or Ctrl-D ends)")
                continue
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.turn(line)

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        name, *rest = line.split(maxsplit=2)
        try:
            if name == "/help":
                self._say(HELP)
            elif name == "/clear":
                self._conversation.clear()
            elif name == "/set" and rest:
                self._conversation.set(rest[0], " ".join(rest[1:]))
            elif name == "/set":
                self._say(", ".join(f"{key} {value}" for key, value in self._conversation.options.items()))
            elif name == "/color" and rest in (["entropy"], ["forward"]):
                self._color = "forward" if rest == ["forward"] else "entropy"
            else:
                raise InputError(f"{line[:80]!r} is no command; /help lists them")
        except InputError as error:
            self._say(error_line(error))

    def turn(self, text: str) -> None:
        """Ask and show the answer; Ctrl-C stops it, and what goes wrong is one line."""
        began = time.monotonic()
        try:
            with self._conversation.answering(text) as answer:
                if self._conversation.watch:
                    self._watch(answer)
                else:
                    for new, _ in answer:
                        self._console.out(legible(new), end="", highlight=False)
                    self._say("")
                _check_whole(answer)
                self._say(_figures(answer, time.monotonic() - began))
        except Terminated:
            raise
        except KeyboardInterrupt:
            self._say("(stopped)")
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            self._say(error_line(error))

    def _watch(self, answer: StreamedAnswer) -> None:
        """Draw the canvas in place while it fills; what stays on the screen is the text."""
        canvas = CanvasView(self._color)
        try:
            with Live(canvas, console=self._console, refresh_per_second=FRAMES_PER_S, transient=True):
                for new, event in answer:
                    canvas.text += new
                    if event is not None:
                        canvas.apply(event)
        finally:
            if answer.text:
                self._say(legible(answer.text))

    def _say(self, text: str) -> None:
        self._console.out(text, highlight=False)


def _figures(answer: StreamedAnswer, seconds: float) -> str:
    usage = answer.usage
    if usage is None:
        return ""
    known = usage.model_extra or {}
    diffusion = f"{known['forwards']} forwards, TPF {known['tpf']:.2f}, " if {"forwards", "tpf"} <= known.keys() else ""
    return f"({usage.completion_tokens} tokens, {diffusion}{usage.completion_tokens / seconds:.0f} tokens/s)"
