"""What a set of rows says about the order of reveals, added up table by table in constant memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

UNTOLD = ("reveal_step", "reveal_entropy", "attempt")  # columns whose nulls leave something out of the figures
VALUES = 2**16  # of a uint16; bit patterns of a float16


@dataclass(frozen=True)
class Histogram:
    """Positions by the value of one quantity: bin i counts values in [edges[i], edges[i + 1])."""

    title: str
    unit: str
    edges: NDArray[np.float64]  # [bins + 1]
    counts: NDArray[np.int64]  # [bins]


class Reveals:
    """Figures of the answers' positions: those before the first stop token.

    What follows a stop token is padding that the decoder often fills in one forward, which says nothing about the
    order. Without `stop_token_ids` every position of the canvas counts. `block_size` None takes the canvas as one
    block.
    """

    def __init__(self, stop_token_ids: Sequence[int], block_size: int | None, bins: int) -> None:
        self.positions = self.forwards = 0  # of the rows whose forwards are known
        self.canvases: Counter[int] = Counter()  # rows by canvas length
        self.untold: Counter[str] = Counter()  # rows by the column that is null
        self._stop_token_ids, self._block_size, self._bins = list(stop_token_ids), block_size, bins
        self._untied = self._left_first = 0
        # Exact counts of every value that uint16 and float16 can have: bins are chosen when the range is known.
        self._steps = np.zeros(VALUES, np.int64)
        self._entropies = np.zeros(VALUES, np.int64)  # by bit pattern
        self._relative = np.zeros(bins, np.int64)

    def add(self, rows: pa.Table) -> None:
        """Count rows of `schema.SCHEMA`."""
        for name in UNTOLD:
            self.untold[name] += rows[name].null_count
        lengths = pc.list_value_length(rows["response_ids"])
        for length in pc.unique(lengths).to_pylist():
            self._add_canvas(rows.filter(pc.equal(lengths, length)), length)

    @property
    def order(self) -> float | None:
        """Goodman and Kruskal's gamma of position and reveal step over all pairs of positions within a block.

        Kendall's tau of the pairs that were not revealed by the same forward: 1 is left to right, 0 no order, -1
        right to left. None without such a pair.
        """
        return 2 * self._left_first / self._untied - 1 if self._untied else None

    def histograms(self) -> list[Histogram]:
        """Of those quantities that the rows know."""
        histograms = []
        if self._steps.any():
            edges = np.linspace(0.0, 1.0, self._bins + 1)
            histograms.append(Histogram("reveal step / forwards of the row", "", edges, self._relative))
            histograms.append(
                self._binned("reveal step", "0-based forward", np.arange(float(VALUES)), self._steps, least=1.0)
            )
        if self._entropies.any():
            values = np.arange(VALUES, dtype=np.uint16).view(np.float16).astype(np.float64)
            histograms.append(self._binned("entropy at reveal", "nats", values, self._entropies, least=1e-3))
        return histograms

    def _add_canvas(self, rows: pa.Table, canvas: int) -> None:
        """Rows of one canvas length, so that their lists are matrices."""
        self.canvases[canvas] += rows.num_rows
        counted = self._before_stop(_matrix(rows["response_ids"], canvas))
        self.positions += int(counted[_valid(rows["forwards"])].sum())
        self.forwards += pc.sum(rows["forwards"]).as_py() or 0
        entropies = _matrix(rows["reveal_entropy"], canvas).view(np.uint16)
        self._entropies += np.bincount(entropies[counted[_valid(rows["reveal_entropy"])]], minlength=VALUES)
        ordered = _valid(rows["reveal_step"])
        steps, counted = _matrix(rows["reveal_step"], canvas), counted[ordered]
        self._steps += np.bincount(steps[counted], minlength=VALUES)
        forwards = rows["forwards"].to_numpy()[ordered].astype(np.int64)
        relative = steps * np.int64(self._bins) // forwards[:, None]
        self._relative += np.bincount(relative[counted], minlength=self._bins)
        self._add_pairs(steps, counted)

    def _before_stop(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[rows, canvas]: the positions to count, always the first ones of a row."""
        return ~np.logical_or.accumulate(np.isin(ids, self._stop_token_ids), axis=1)

    def _add_pairs(self, steps: NDArray[np.uint16], counted: NDArray[np.bool_]) -> None:
        rows, canvas = steps.shape
        size = max(1, min(self._block_size or canvas, canvas))
        blocks = -(-canvas // size)
        padding = ((0, 0), (0, blocks * size - canvas))
        # [block, position, row]: both sides of a comparison below are views whose last axis is contiguous.
        steps = np.pad(steps, padding).T.reshape(blocks, size, rows)
        counted = np.pad(counted, padding).T.reshape(blocks, size, rows)
        for gap in range(1, size):
            left, right, both = steps[:, :-gap], steps[:, gap:], counted[:, gap:]  # a prefix counts: left does as well
            self._left_first += int(np.count_nonzero((left < right) & both))
            self._untied += int(np.count_nonzero((left != right) & both))

    def _binned(
        self, title: str, unit: str, values: NDArray[np.float64], counts: NDArray[np.int64], least: float
    ) -> Histogram:
        """About `bins` bins of a round width, `least` or more, from 0 to the largest value that occurs."""
        values, counts = values[counts > 0], counts[counts > 0]
        width = round_up(max(float(values.max()) / self._bins, least))
        edges = width * np.arange(math.floor(values.max() / width) + 2)
        return Histogram(title, unit, edges, np.histogram(values, edges, weights=counts)[0].astype(np.int64))


def round_up(width: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below `width`."""
    scale = 10.0 ** math.floor(math.log10(width))
    return next(digit * scale for digit in (1, 2, 5, 10) if digit * scale >= width)


def _matrix(column: pa.ChunkedArray, canvas: int) -> NDArray[Any]:
    """The lists of a column that are not null, [rows, canvas]."""
    values: NDArray[Any] = pc.list_flatten(column).to_numpy()
    return values.reshape(len(column) - column.null_count, canvas)


def _valid(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    valid: NDArray[np.bool_] = pc.is_valid(column).to_numpy()
    return valid
