"""Measurements that are kept, a file a row of the report: what they are named by, and how they are read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d3llm_ray.errors import one_line, require
from d3llm_ray.evaluation.rows import COMPUTED, EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.report import digest, json_line, machine, versions, write_text

MOST_LETTERS = 50  # of the readable part of a name, of which a file system takes 255 bytes


def measurement_key(names: Sequence[str], content: Any) -> str:
    """A readable file name, made unique by a hash of `content`, of the versions, and of the machine but for its kernel.

    `content` (JSON) is all else that the figures depend on.
    """
    where = {name: value for name, value in machine().items() if name != "platform"}
    slug = "".join(letter if letter.isalnum() else "-" for letter in "-".join(names))
    return f"{slug[:MOST_LETTERS]}-{digest([list(names), content, versions(), where])}"


def write_row(path: Path, row: EvaluationRow) -> None:
    """First line: the row; then a line a sample."""
    lines = [row.to_dict(), *(asdict(sample) for sample in row.samples)]
    write_text(path, "".join(json_line(line) + "\n" for line in lines))


def read_row(path: Path, problem_ids: Sequence[str]) -> EvaluationRow | str:
    """A row that `write_row` has written, of these problems; why it cannot be used where it is damaged or of another
    version."""
    try:
        with path.open(encoding="utf-8") as lines:
            first, *rest = (json.loads(line) for line in lines)
        samples = [EvaluatedSample(**line) for line in rest]
        labels = {name: value for name, value in first.items() if name not in COMPUTED}
        row = summarise(samples, first["seconds"], **labels)
        ids = [sample.problem_id for sample in samples]
        require(ids == list(problem_ids), "problems", len(ids), f"{len(problem_ids)} and their ids")
        require(row == EvaluationRow(**first), "figures", "others", "those of the samples")
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        return one_line(f"{type(error).__name__}: {error}")
    return row
