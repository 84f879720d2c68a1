"""Trajectory rows as training samples, held as flat arrays (about 5 bytes a token) that processes of a node share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from d3llm_ray.distillation.objectives.batches import TrainingSample
from d3llm_ray.errors import InputError, require
from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.families import Family
from d3llm_ray.trajectories.schema import read_trajectories

Keep = Literal["all", "correct"]
LAST_STEP = np.iinfo(np.uint16).max  # padding added here is revealed after everything else


class _Lists:
    """A column of lists: all values in one array, row i between two offsets."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        self.offsets = np.concatenate(([0], np.cumsum(lengths)))
        self.values: NDArray[Any] = pc.list_flatten(column).to_numpy()

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class TrajectorySet:
    """Samples by index. Rows are sorted by `prompt_id`, so that an index means the same row wherever it is read.

    `canvas`: answers are padded to so many tokens with `pad_token_id`; None takes them as they are.
    """

    def __init__(self, table: pa.Table, *, canvas: int | None = None, pad_token_id: int = 0) -> None:
        table = table.sort_by("prompt_id")
        self.prompt_ids: NDArray[np.str_] = np.array(table["prompt_id"].to_pylist(), dtype=np.str_)
        self.unordered = table["reveal_step"].null_count
        self._prompts, self._responses = _Lists(table["prompt_ids"]), _Lists(table["response_ids"])
        self._reveals = _Lists(table["reveal_step"])
        self._canvas, self._pad_token_id = canvas, pad_token_id

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, row: int) -> TrainingSample:
        response, reveal = self._responses[row], self._reveals[row]
        missing = 0 if self._canvas is None else self._canvas - response.size
        if missing:
            response = np.pad(response, (0, missing), constant_values=self._pad_token_id)
        order = None
        if reveal.size:
            order = np.pad(reveal, (0, missing), constant_values=LAST_STEP) if missing else reveal
        return TrainingSample(str(self.prompt_ids[row]), self._prompts[row], response, order)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt and canvas of every row, [N]."""
        responses = self._responses.lengths
        return self._prompts.lengths + (responses if self._canvas is None else np.full_like(responses, self._canvas))

    def check(self, config: ModelConfig, family: Family, *, ordered: bool) -> None:
        """Raise `InputError` for rows that this student cannot be trained on, naming the first of them.

        `ordered`: the objective reads the order of reveals, which answers imported without a trajectory lack.
        """
        require(
            not (ordered and self.unordered),
            "trajectories: reveal_step",
            f"null in {self.unordered} of {len(self)} rows",
            "rows with an order (a teacher decodes the prompts of such a file: `d3llm-ray trajectories --prompts "
            "FILE`), or objective.order: random",
        )
        repeated = [str(here) for here, following in pairwise(self.prompt_ids) if here == following]
        require(not repeated, "trajectories: prompt_id", repeated[:1], "every prompt_id once")
        prompts, responses = self._prompts, self._responses
        self._all(prompts.lengths > 0, "prompt_ids", "at least one token")
        self._all(responses.lengths > 0, "response_ids", "at least one token")
        if self._canvas is not None:
            self._all(responses.lengths <= self._canvas, "response_ids", f"at most the canvas of {self._canvas} tokens")
        context = config.max_position_embeddings
        self._all(self.lengths <= context, "prompt and response", f"at most the model's context of {context} tokens")
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
            raise InputError(
                f"trajectories: {field} of row {str(self.prompt_ids[row])!r} ({int(self._prompts.lengths[row])} + "
                f"{int(self._responses.lengths[row])} tokens); accepted: {accepted}"
            )


def _every(good: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether all values between consecutive offsets are good, [N]; an empty list is."""
    count: NDArray[np.int64] = np.concatenate(([0], np.cumsum(good)))
    return np.equal(np.diff(count[offsets]), np.diff(offsets))


def read_rows(path: str, *, keep: Keep = "all", max_rows: int | None = None, held_out: int = 0) -> tuple[pa.Table, ...]:
    """The rows to train on and, as a second table, `held_out` rows to validate on; any `pyarrow.fs` path.

    The schema is checked. `keep="correct"` drops rows with a wrong answer; a row that could not be checked stays, as
    in the published recipe. The first rows by `prompt_id`, which is a hash, are held out: a random but fixed subset;
    of the others `max_rows` stay.
    """
    table = read_trajectories(path)
    if keep == "correct":
        table = table.filter(pc.fill_null(table["is_correct"], True))
    require(table.num_rows > 0, "trajectories", path, f"at least one row (keep: {keep})")
    require(held_out < table.num_rows, "val_rows", held_out, f"fewer than the {table.num_rows} rows there are")
    table = table.sort_by("prompt_id")
    return table.slice(held_out, max_rows), table.slice(0, held_out)
