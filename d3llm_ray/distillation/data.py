"""Trajectory rows as training samples, held as flat arrays (about 5 bytes a token) that processes of a node share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

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
Target = Literal["response", "trajectory"]
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

    `target` "response" trains on a row's own response (`reference_ids`) and the stop token, where it has one: the
    trajectory gives the order, position by position. `canvas`: answers take so many positions, shorter ones are padded
    with `pad_token_id`, longer ones cut; None takes the teacher's canvas, or more where the response needs it.
    `max_length`: prompt and answer together lose what is behind it; every prompt must be shorter.
    """

    def __init__(
        self,
        table: pa.Table,
        *,
        target: Target = "response",
        canvas: int | None = None,
        max_length: int | None = None,
        pad_token_id: int = 0,
    ) -> None:
        table = table.sort_by("prompt_id")
        self.prompt_ids: NDArray[np.str_] = np.array(table["prompt_id"].to_pylist(), dtype=np.str_)
        self.unordered = table["reveal_step"].null_count
        self._prompts, self._reveals = _Lists(table["prompt_ids"]), _Lists(table["reveal_step"])
        answers, own = table["response_ids"], table["reference_ids"]
        widths = pc.list_value_length(answers).to_numpy()
        self._given: NDArray[np.bool_] = own.is_valid().to_numpy() & (target == "response")
        if self._given.any():
            answers = pc.if_else(pa.array(self._given), own, answers)
        self._answers = _Lists(answers)
        widths = np.maximum(widths, self._answers.lengths + self._given)  # a stop token ends a given response
        if canvas is not None:
            widths = np.full_like(widths, canvas)
        if max_length is not None:
            widths = np.minimum(widths, max_length - self._prompts.lengths)
        self._widths: NDArray[np.int64] = widths.astype(np.int64)
        self._pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, row: int) -> TrainingSample:
        width, reveal = int(self._widths[row]), self._reveals[row]
        response = _fit(self._answers[row], width, self._pad_token_id)
        order = _fit(reveal, width, LAST_STEP) if reveal.size else None
        return TrainingSample(str(self.prompt_ids[row]), self._prompts[row], response, order)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt and canvas of every row, [N]."""
        return self._prompts.lengths + self._widths

    def cut(self, stop_token_ids: Collection[int]) -> NDArray[np.int64]:
        """Tokens that each row's answer, stop token included, loses to `canvas` and `max_length`, [N]."""
        ends = self._answers.offsets[1:]
        stops = np.flatnonzero(np.isin(self._answers.values, list(stop_token_ids)))
        first = np.append(stops, ends[-1])[np.searchsorted(stops, self._answers.offsets[:-1])]
        answers = np.where(first < ends, first + 1, ends + self._given) - self._answers.offsets[:-1]
        return np.maximum(answers - self._widths, 0)

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
        prompts, answers = self._prompts, self._answers
        self._all(prompts.lengths > 0, "prompt_ids", "at least one token")
        self._all(answers.lengths + self._given > 0, "response", "at least one token")
        context = config.max_position_embeddings
        self._all(self.lengths <= context, "prompt and response", f"at most the model's context of {context} tokens")
        for name, column in (("prompt_ids", prompts), ("response", answers)):
            inside = (column.values >= 0) & (column.values < config.vocab_size)
            self._all(
                _every(inside, column.offsets), name, f"ids below the teacher's vocabulary of {config.vocab_size}"
            )
        masks = answers.values == family.mask_token_id
        self._all(_every(~masks, answers.offsets), "response", "no mask token")

    def _all(self, good: NDArray[np.bool_], field: str, accepted: str) -> None:
        if not good.all():
            row = int(np.argmin(good))
            raise InputError(
                f"trajectories: {field} of row {str(self.prompt_ids[row])!r} ({int(self._prompts.lengths[row])} + "
                f"{int(self._answers.lengths[row])} tokens); accepted: {accepted}"
            )


def _every(good: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether all values between consecutive offsets are good, [N]; an empty list is."""
    count: NDArray[np.int64] = np.concatenate(([0], np.cumsum(good)))
    return np.equal(np.diff(count[offsets]), np.diff(offsets))


def _fit(values: NDArray[Any], width: int, padding: int) -> NDArray[Any]:
    """`values` at exactly `width`: padded or cut at the end."""
    return values[:width] if values.size >= width else np.pad(values, (0, width - values.size), constant_values=padding)


def _answered_otherwise(table: pa.Table) -> NDArray[np.bool_]:
    """Whether each row has a response of its own that is not what the teacher wrote, [N]."""
    written = zip(table["reference_ids"].to_pylist(), table["response_ids"].to_pylist(), strict=True)
    return np.array([own is not None and own != answer[: len(own)] for own, answer in written], dtype=np.bool_)


class Rows(NamedTuple):
    """Rows of a trajectory folder: to train on, to validate on, and how many were `left_out`, by reason."""

    train: pa.Table
    held_out: pa.Table
    left_out: Mapping[str, int]


def read_rows(
    path: str,
    *,
    keep: Keep = "all",
    target: Target = "response",
    max_length: int | None = None,
    max_rows: int | None = None,
    held_out: int = 0,
) -> Rows:
    """The rows to train on, and `held_out` rows to validate on; any `pyarrow.fs` path.

    The schema is checked. `keep="correct"` drops rows with a wrong answer; a row that could not be checked stays, as
    in the published recipe. A wrong answer is no target either, unless `target="trajectory"` asks for it: its row stays
    where it has another response of its own. A prompt without room for an answer in `max_length` is left out. The
    first rows by `prompt_id`, which is a hash, are held out: a random but fixed subset; of the others `max_rows` stay.
    """
    table = read_trajectories(path)
    right = pc.fill_null(table["is_correct"], True).to_numpy(zero_copy_only=False).copy()
    if keep == "all":
        right[~right] = target == "trajectory" or _answered_otherwise(table.filter(pa.array(~right)))
    prompts = pc.list_value_length(table["prompt_ids"]).to_numpy()
    room = prompts < (prompts.max(initial=0) + 1 if max_length is None else max_length)
    left_out = {"wrong": int((~right).sum()), "without room in max_length": int((right & ~room).sum())}
    table = table.filter(pa.array(right & room))
    require(table.num_rows > 0, "trajectories", path, f"at least one row (keep: {keep}, target: {target})")
    require(held_out < table.num_rows, "val_rows", held_out, f"fewer than the {table.num_rows} rows there are")
    table = table.sort_by("prompt_id")
    return Rows(table.slice(held_out, max_rows), table.slice(0, held_out), left_out)
