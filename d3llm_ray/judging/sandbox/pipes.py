"""The pipes between the judge and a program: what is sent and kept is bounded, and so is the time."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from types import TracebackType

from d3llm_ray.errors import WorkError

_CHUNK = 1 << 16
_REPORT_BYTES = 1024  # more than the harness ever says
_MOST_DROPPED = 1 << 26  # bytes of output after which a program is stopped: reading them costs the judge time


class Pipes:
    """Input to the launcher and the harness; the program's output; the harness's report; failures of the set-up.

    `report_end` and the others with that ending are the far ends, which the launcher gets.
    """

    def __init__(self, output_bytes: int) -> None:
        self.input_end, self._input = os.pipe()
        self._output, self.output_end = os.pipe()
        self._report, self.report_end = os.pipe()
        self._setup, self.setup_end = os.pipe()
        self.most_output = output_bytes
        self.output, self.report, self.dropped = bytearray(), b"", 0
        self._pending = b""
        self._open = {self.input_end, self._input, self._output, self.output_end}
        self._open |= {self._report, self.report_end, self._setup, self.setup_end}
        os.set_blocking(self._input, False)

    def __enter__(self) -> Pipes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close(*self._open)

    def close_far_ends(self) -> None:
        """Once the launcher has them: a pipe ends when its last holder does."""
        self._close(self.input_end, self.output_end, self.report_end, self.setup_end)

    def _close(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            self._open.discard(descriptor)
            os.close(descriptor)

    def send(self, message: bytes) -> None:
        """As much of it as the pipe takes now; the rest goes out during `converse`."""
        self._pending += message
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self._pending = self._pending[os.write(self._input, self._pending) :]

    def read_setup(self, seconds: float, count: int | None = None) -> bytes:
        """`count` bytes of what the launcher says (None: all, to its end); `WorkError` where that takes too long."""
        text, deadline = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._setup, selectors.EVENT_READ)
            while count is None or len(text) < count:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkError(f"sandbox: a program could not be started within {seconds:.0f} s")
                part = os.read(self._setup, _CHUNK if count is None else count - len(text))
                if not part:
                    break
                text += part
        return text

    def converse(self, deadline: float, answer: bytes) -> bool:
        """Take what the program says, and send `answer` once it has been loaded; whether it ended before `deadline`
        (of `time.monotonic`)."""
        with selectors.DefaultSelector() as selector:
            readers = {self._output, self._report}
            for descriptor in readers:
                selector.register(descriptor, selectors.EVENT_READ)
            selector.register(self._input, selectors.EVENT_WRITE)
            is_writing = True
            while readers:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if time.monotonic() >= deadline or self._says_too_much():
                    return False
                for descriptor in {key.fd for key, _ in events}:
                    if descriptor != self._input:
                        if not self._take(descriptor):
                            selector.unregister(descriptor)
                            readers.discard(descriptor)
                    elif not self._push():
                        selector.unregister(descriptor)
                        is_writing = False
                if answer and self.report:
                    self._pending, answer = self._pending + answer, b""
                    if not is_writing:
                        selector.register(self._input, selectors.EVENT_WRITE)
                        is_writing = True
        return True

    def _take(self, descriptor: int) -> bool:
        part = os.read(descriptor, _CHUNK)
        if descriptor == self._report:
            self.report += part
        else:
            kept = part[: self.most_output - len(self.output)]
            self.output += kept
            self.dropped += len(part) - len(kept)
        return bool(part)

    def _says_too_much(self) -> bool:
        return len(self.report) > _REPORT_BYTES or self.dropped > _MOST_DROPPED

    def _push(self) -> bool:
        """Write what the pipe takes; whether there is more."""
        try:
            self._pending = self._pending[os.write(self._input, self._pending) :]
        except BrokenPipeError:
            self._pending = b""
        return bool(self._pending)
