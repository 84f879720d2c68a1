"""`metrics.jsonl`: one JSON object a logged step, written by rank 0 and read by whoever watches the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d3llm_ray.report import write_text

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """An open metrics file that a resumed run continues: lines after the resumed step are dropped first."""

    def __init__(self, path: Path, done: int) -> None:
        kept = [json.dumps(line) for line in read_metrics(path) if line["step"] <= done]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a")

    def log(self, line: Mapping[str, float | int | str]) -> None:
        """Append one line, floats to six digits."""
        rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in line.items()}
        self._file.write(json.dumps(rounded) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; none while it does not exist. A line still being written is left out."""
    if not path.is_file():
        return []
    complete = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]
