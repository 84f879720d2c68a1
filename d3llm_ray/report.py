"""What every room leaves behind: written reports, tables, machine and versions, files that are whole, digests."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3llm_ray import __version__
from d3llm_ray.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGEST_CHARACTERS = 10  # 40 bits
PARTIAL = re.compile(
    r"\..*\.[0-9a-f]{32}\.partial"
)  # a file or folder that is being written, or whose writer was killed


class WrittenReport(ABC):
    """How every report is printed and kept: tables for people, one line of JSON for programs."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def to_markdown(self) -> str: ...

    def to_json(self) -> str:
        """One line of JSON; figures keep full precision."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        """For the terminal: the tables, and the JSON as the last line."""
        return f"{self.to_markdown()}\n{self.to_json()}"

    def write(self, directory: Path) -> None:
        """Write `report.md` and `report.json`, the latter last: where it exists, the report is complete."""
        write_text(directory / "report.md", self.to_markdown())
        write_text(directory / "report.json", self.to_json() + "\n")


def table(header: list[str], rows: Iterable[list[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are text and the others figures."""
    rules = ["---"] * left + ["---:"] * (len(header) - left)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rules, *rows))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch  # slow to import, and not every report needs it

    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str | None]:
    """The versions of what computes the figures; None for a package that is not installed."""
    known: dict[str, str | None] = {"python": platform.python_version(), "d3llm-ray": __version__}
    for package in ("torch", "transformers", "ray"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = None
    return known


def check_output(path: str | os.PathLike[str], field: str, *, folder: bool = False) -> Path:
    """Where writing to `path` will end, symbolic links followed; `InputError` for what is no regular file (or folder).

    A pipe, a device or a socket is not replaced by a file, and nothing can be made below a file.
    """
    real = Path(os.path.realpath(path))
    accepted = "a folder, or a name that is free" if folder else "a regular file, or a name that is free"
    if os.path.lexists(real) and not (real.is_dir() if folder else real.is_file()):
        raise InputError(f"{field}: {os.fspath(path)!r} is {_kind(real)}; accepted: {accepted}")
    parent = next(place for place in real.parents if os.path.lexists(place))
    if not parent.is_dir():
        raise InputError(f"{field}: {os.fspath(path)!r} lies below {_kind(parent)}; accepted: {accepted}")
    return real


def _kind(path: Path) -> str:
    kinds = {
        "a folder": path.is_dir,
        "a symbolic link that leads nowhere": path.is_symlink,
        "a file": path.is_file,
        "a named pipe": path.is_fifo,
        "a socket": path.is_socket,
    }
    return next((name for name, holds in kinds.items() if holds()), "a device")


def partial_name(path: Path) -> Path:
    """A hidden name beside `path` that no other writer uses."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.partial")  # a name has 255 bytes at most


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end of the block: a file that is there is whole.

    What a symbolic link points to is replaced, not the link. `InputError` for what is no regular file. A block that
    fails leaves nothing.
    """
    target = check_output(path, "output")
    partial = partial_name(target)
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_line(values: Any) -> str:
    """JSON on one line, letters as they are; half of a surrogate pair, which UTF-8 cannot hold, is escaped."""
    line = json.dumps(values, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(values)
    return line


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG as a whole."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def digest(content: Any) -> str:
    """A short name of JSON content: the same whatever the order of an object's keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGEST_CHARACTERS]
