"""What every room leaves behind: written reports, tables, machine and versions, files that are whole, digests."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3llm_ray import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGEST_CHARACTERS = 10  # 40 bits


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end of the block: a file that is there is whole."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG as a whole."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def digest(content: Any) -> str:
    """A short name of JSON content: the same whatever the order of an object's keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGEST_CHARACTERS]
