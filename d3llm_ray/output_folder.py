"""Whose an output is: a folder that an earlier run of ours began, by the settings it has left, or nobody's yet; and
one run's at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import yaml

from d3llm_ray.config import Settings, to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.paths import expanded
from d3llm_ray.report import check_output, digest, write_text

MOST_NAMED = 5

P = ParamSpec("P")
R = TypeVar("R")


class HasOutput(Protocol):
    """Settings of a verb that writes."""

    @property
    def output(self) -> str | os.PathLike[str]: ...


S = TypeVar("S", bound=HasOutput)
_writers: dict[Path, int] = {}  # lock file -> the thread of this process that holds it


def sole_writer(run: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A verb whose `settings.output` no other run may write meanwhile, see `writing`."""

    @wraps(run)
    def alone(settings: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with writing(settings.output):
            return run(settings, *args, **kwargs)

    return alone  # type: ignore[return-value]  # `Concatenate` cannot say that the settings may be named


@contextmanager
def writing(output: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of `output` while the block runs; `InputError` that tells of the other run which holds it.

    The lock is a hidden file beside the output, held by the operating system: it ends with its process, however that
    ends. A block within the block may write to the same output. Where no lock can be had (object storage, a file
    system without locks, a folder that may not be written to) the block runs without one.
    """
    text = expanded(output, "output").removeprefix("file://")
    if "://" in text:
        yield
        return
    lock, made = None, list[Path]()
    try:
        target = Path(os.path.realpath(text))
        file = target.with_name(f".{target.name[:40]}.{digest(target.name)}.lock")
        if _writers.get(file) != threading.get_ident():
            made = [folder for folder in file.parents if not folder.exists()]
            lock = _lock(file, os.fspath(output))
            _writers[file] = threading.get_ident()
    except InputError:
        raise
    except (OSError, ValueError):  # ValueError: a name that no file can have
        pass
    try:
        yield
    finally:
        if lock is not None:
            del _writers[file]
            with suppress(OSError):
                file.unlink()
            os.close(lock)
        with suppress(OSError):  # a run that wrote nothing leaves nothing
            for folder in made:
                folder.rmdir()


def _lock(file: Path, output: str) -> int:
    """The descriptor that holds the lock; `OSError` where there can be none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, file):
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return lock
        except BlockingIOError as error:
            holder = os.pread(lock, 200, 0).decode(errors="replace")
            os.close(lock)
            who = f" ({holder})" if holder else ""
            raise InputError(
                f"output: {output!r} is being written by another run{who}; accepted: another output, or this one when "
                "that run has ended"
            ) from error
        except OSError:
            os.close(lock)
            with suppress(OSError):
                file.unlink()
            raise
        os.close(lock)  # the holder before us has just removed it


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file still has its name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    return False


def is_written(file: Path, cls: type[Settings]) -> bool:
    """Whether a run has written the file: most settings of `cls`, in the form of `to_yaml`, which nobody types."""
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(values, dict) or yaml.safe_dump(values, sort_keys=False) != text:
        return False
    return len(values.keys() & cls.model_fields.keys()) > len(cls.model_fields) / 2  # some were called otherwise


def check_folder(output: str | os.PathLike[str], marker: str, cls: type[Settings], field: str = "output") -> Path:
    """The real folder behind `output`; `InputError` unless it is absent, empty (but for hidden files) or a run's.

    `marker`: name of the file of resolved settings, of class `cls`, that a run writes first: what makes a folder ours.
    """
    real = check_output(output, field, folder=True)
    names = visible(real)
    if names and not is_written(real / marker, cls):
        raise InputError(
            f"{field}: {os.fspath(output)!r} holds {named(names)} and no {marker} of an earlier run; accepted: such a "
            "run's folder, an empty one, or a name that is free"
        )
    return real


def claim(output: Path, marker: str, settings: Settings) -> None:
    """Make the folder and leave its `marker`; `InputError` where `check_folder` has one."""
    check_folder(output, marker, type(settings)).mkdir(parents=True, exist_ok=True)
    write_text(output / marker, to_yaml(settings))


def visible(folder: Path) -> list[str]:
    """The names in a folder that are not hidden, sorted; none without the folder."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []


def named(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return ", ".join(map(repr, listed[:MOST_NAMED])) + more
