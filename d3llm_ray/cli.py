"""The command line: `d3llm-ray VERB --config FILE.yaml --key value`.

A verb is a settings class and a function that takes its settings. Both are imported only when their verb is
called: `--help` and bad input answer at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from typing import TYPE_CHECKING, Any

from d3llm_ray import __version__
from d3llm_ray.errors import STORAGE_FAILURES, InputError, StorageError, WorkError, one_line, unknown
from d3llm_ray.paths import not_uploaded
from d3llm_ray.verbs import RENAMED, VERBS, Verb

if TYPE_CHECKING:
    from d3llm_ray.config import Settings

DONE, FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
EXIT_CODES = {
    DONE: "done",
    FAILED: "the work failed, or some rows or parts of it have no result; storage or a connection failed",
    BAD_INPUT: "bad input: a setting, file, model or package that is not what was asked for",
    INTERRUPTED: "interrupted (Ctrl-C, SIGTERM)",
    UNREAD: "nobody reads the output any more (`d3llm-ray ... | head`)",
}
UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    codes = "\n".join(f"  {code:<{width}}  {meaning}" for code, meaning in EXIT_CODES.items())
    return (
        f"usage: d3llm-ray VERB [--config FILE.yaml] [--key value ...]\n\n{verbs}\n\n"
        "d3llm-ray VERB --help lists a verb's settings; --print-config prints the resolved ones.\n\n"
        f"exit codes:\n{codes}\n"
    )


def _interrupt(_signal: int, _frame: object) -> None:
    """SIGTERM cleans up as Ctrl-C does. An event loop is told as by Ctrl-C, which cancels its task: an exception from
    between its own lines has left one running for ever."""
    if _runs_a_loop() and callable(signal.getsignal(signal.SIGINT)):  # ignored in a shell's background
        signal.raise_signal(signal.SIGINT)
    else:
        raise KeyboardInterrupt


def _runs_a_loop() -> bool:
    try:
        return "asyncio" in sys.modules and bool(sys.modules["asyncio"].get_running_loop())
    except RuntimeError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; what goes wrong is one line on stderr. Returns one of `EXIT_CODES`."""
    try:
        try:
            return _call(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where it is noticed that nobody reads, and not when the interpreter ends
    except BrokenPipeError:
        _hang_up()
        return UNREAD


def _call(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), end="")
        return DONE if words else BAD_INPUT
    if words[0] == "--version":
        print(f"d3llm-ray {__version__}")
        return DONE
    signal.signal(signal.SIGTERM, _interrupt)
    verb, settings = None, None
    try:
        from d3llm_ray.config import parse, to_yaml  # pydantic may be what is missing

        pair = " ".join(words[:2])
        if pair in RENAMED:
            raise InputError(f"verb: {pair!r} is called {RENAMED[pair]!r} now")
        length = 2 if pair in VERBS else 1
        name = " ".join(words[:length])
        if name not in VERBS:
            raise unknown("verb", name, VERBS)
        verb = VERBS[name]
        settings_class: type[Settings] = _load(verb.settings)
        settings, print_only = parse(settings_class, words[length:])
        if print_only:
            print(to_yaml(settings), end="")
            return DONE
        result = _load(verb.run)(settings)
        if result is not None:
            print(result)
        return DONE
    except KeyboardInterrupt:
        code, line = INTERRUPTED, f"interrupted; {_what_stays(verb)}"
    except InputError as error:
        code, line = BAD_INPUT, str(error)
    except WorkError as error:
        code, line = FAILED, str(error)
    except ModuleNotFoundError as error:
        code, line = BAD_INPUT, f"{error}: {_how_to_install(error)}"
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _hang_up():
            return UNREAD
        code, line = _os_error(error, verb, settings)
    print(f"d3llm-ray: {line}", file=sys.stderr)
    return code


def _what_stays(verb: Verb | None) -> str:
    if verb is not None and verb.resumes:
        return "what is finished is kept, and the same command goes on from there"
    return "nothing is kept, and the same command begins anew"


def _os_error(error: OSError, verb: Verb | None, settings: Settings | None) -> tuple[int, str]:
    """Exit code and line of an error of the operating system, of a library or of a network."""
    cause = getattr(error, "cause", None)  # of an error in a worker; Ray's own is the worker's traceback
    error = cause if isinstance(cause, OSError) else error
    said = one_line(error) or type(error).__name__
    output = getattr(settings, "output", None)
    ours = output is not None and isinstance(error.filename, str) and _is_below(error.filename, str(output))
    if ours or isinstance(error, StorageError) or error.errno in {*STORAGE_FAILURES, errno.EROFS}:
        return FAILED, f"{said}; {_what_stays(verb)}"
    if isinstance(error, UNREADABLE) and error.filename is not None:
        return BAD_INPUT, f"cannot read {str(error.filename)!r}: {error.strerror}{not_uploaded(str(error.filename))}"
    return FAILED, said if error.errno is None else f"{type(error).__name__}: {said}"


def _is_below(path: str, folder: str) -> bool:
    real, top = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, top]) == top


def _how_to_install(error: ModuleNotFoundError) -> str:
    """What to do about a package that is missing; the error itself again where it is no dependency of ours."""
    module = (error.name or "").partition(".")[0]
    if module == "d3llm_ray":
        raise error
    requirements = []
    with suppress(PackageNotFoundError):
        requirements = requires("d3llm-ray") or []
    for requirement in requirements:
        package = re.split(r"[^\w.-]", requirement)[0]
        if re.sub(r"[-.]", "_", package).lower() == module.lower():
            extra = re.search(r"extra == [\"'](\w+)[\"']", requirement)
            return f'pip install "d3llm-ray[{extra[1]}]"' if extra else "pip install d3llm-ray"
    return f"pip install {module}"


def _hang_up() -> bool:
    """Whether nobody reads stdout or stderr any more (`d3llm-ray ... | head`); what is left goes nowhere then."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a stream without a descriptor, as in a notebook
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                gone = True
    return gone


if __name__ == "__main__":
    sys.exit(main())
