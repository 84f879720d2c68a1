"""Trajectory rows as training samples, held as flat arrays (about 5 bytes a token)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from d3llm_ray.errors import InputError, require
from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.families import Family
from d3llm_ray.trajectories.schema import read_trajectories

Keep = Literal["all", "correct"]


@dataclass(frozen=True)
class Sample:
    """One teacher trajectory. The response is the whole canvas: stop token and padding are trained as well."""

    prompt_id: str
    prompt_ids: NDArray[np.int32]  # [prompt length]
    response_ids: NDArray[np.int32]  # [canvas]
    reveal_step: NDArray[np.uint16]  # [canvas], 0-based teacher step that revealed each position

    @property
    def length(self) -> int:
        """Tokens of prompt and canvas."""
        return self.prompt_ids.size + self.response_ids.size


class _Lists:
    """A column of lists: all values in one array, row i between two offsets."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
        self.offsets = np.concatenate(([0], np.cumsum(lengths)))
        self.values: NDArray[Any] = pc.list_flatten(column).to_numpy()

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class TrajectorySet:
    """Samples by index. Rows are sorted by `prompt_id`, so that an index means the same row wherever it is read.

    Raises `InputError` for rows without an order: answers that were imported without a trajectory.
    """

    def __init__(self, table: pa.Table) -> None:
        unordered = table["reveal_step"].null_count
        require(
            unordered == 0,
            "trajectories: reveal_step",
            f"null in {unordered} of {table.num_rows} rows",
            "rows with an order; a teacher decodes the prompts of such a file: `d3llm-ray trajectories --prompts FILE`",
        )
        table = table.sort_by("prompt_id")
        self.prompt_ids: list[str] = table["prompt_id"].to_pylist()
        self._prompts, self._responses = _Lists(table["prompt_ids"]), _Lists(table["response_ids"])
        self._reveals = _Lists(table["reveal_step"])

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, row: int) -> Sample:
        return Sample(self.prompt_ids[row], self._prompts[row], self._responses[row], self._reveals[row])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt and canvas of every row, [N]."""
        return self._prompts.lengths + self._responses.lengths

    def check(self, config: ModelConfig, family: Family) -> None:
        """Raise `InputError` for rows that this teacher cannot have written, naming the first of them."""
        ids = self.prompt_ids
        repeated = [one for one, other in pairwise(ids) if one == other]
        require(not repeated, "trajectories: prompt_id", repeated[:1], "every prompt_id once")
        prompts, responses = self._prompts, self._responses
        self._all(prompts.lengths > 0, "prompt_ids", "at least one token")
        self._all(responses.lengths > 0, "response_ids", "at least one token")
        limit = config.max_position_embeddings
        self._all(
            self.lengths <= limit, "prompt_ids and response_ids", f"at most {limit} tokens, the teacher's context"
        )
        for name, column in (("prompt_ids", prompts), ("response_ids", responses)):
            inside = (column.values >= 0) & (column.values < config.vocab_size)
            self._all(
                _every(inside, column.offsets), name, f"ids below the teacher's vocabulary of {config.vocab_size}"
            )
        masks = responses.values == family.mask_token_id
        self._all(_every(~masks, responses.offsets), "response_ids", "no mask token")

    def _all(self, good: NDArray[np.bool_], field: str, accepted: str) -> None:
        if not good.all():
            row = int(np.argmin(good))
            raise InputError(f"trajectories: {field} of row {self.prompt_ids[row]!r}; accepted: {accepted}")


def _every(good: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether all values between consecutive offsets are good, [N]; an empty list is."""
    count: NDArray[np.int64] = np.concatenate(([0], np.cumsum(good)))
    return np.equal(np.diff(count[offsets]), np.diff(offsets))


def load_samples(path: str, *, keep: Keep = "all", max_rows: int | None = None) -> TrajectorySet:
    """Read a finished trajectory dataset (folder or file, any `pyarrow.fs` path), whose schema is checked.

    `keep="correct"` drops rows with a wrong answer; a row that could not be checked stays, as in the published
    recipe. `max_rows` then keeps the first rows by `prompt_id`, which is a hash: a random but fixed subset.
    """
    table = read_trajectories(path)
    if keep == "correct":
        table = table.filter(pc.fill_null(table["is_correct"], True))
    require(table.num_rows > 0, "trajectories", path, f"at least one row (keep: {keep})")
    if max_rows is not None:
        table = table.sort_by("prompt_id").slice(0, max_rows)
    return TrajectorySet(table)
