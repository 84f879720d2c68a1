"""Static shapes: steady-state steps padded to a few sizes, so that CUDA graphs can replay them.

At small batches the processor takes longer to launch a forward's kernels than the device to run them. A graph
launches them all at once, but only with the shapes and addresses of its capture. So a group's layout is padded to a
bucket and packed into one buffer, and all else, masks and statistics included, is computed on the device from that
buffer. Without capture (any device) the same function runs kernel by kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.decoding.batch import Span, StepBatch
from d3llm_ray.decoding.canvas import IntArray
from d3llm_ray.decoding.runners import EagerRunner
from d3llm_ray.decoding.scoring import score
from d3llm_ray.decoding.statistics import MAX_CHUNK_ELEMENTS, TokenStatistics, fused_score, unpack
from d3llm_ray.models import Ragged

logger = logging.getLogger("d3llm_ray.decoding")

BATCHES = (1, 2, 4, 8, 16, 32, 64)
WINDOWS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 512)
SPANS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
SCORED = (64, 128, 256, 512, 1024, 2048)
STATIC_TOKENS = 2048  # padded, of a step: beyond them the device is the slower one anyway
STATIC_KEY_CELLS = 1 << 15  # rows x key span: a graph keeps its memory, so that this is bounded too
FREE_TOKENS = 256  # up to here a forward takes as long as reading the weights, and padding costs nothing
MOST_PADDING = 1.5  # padded over real tokens, above that
WARM_UPS = 2  # runs before a capture: kernels are compiled and libraries allocate what they keep
SCRATCH = 1  # positions of the KV store that padding writes to, all to the same: nothing ever reads it

Packed = TypeVar("Packed", IntArray, Tensor)


def bucket(value: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the rising `sizes` that holds `value`; None when none does."""
    return next((size for size in sizes if size >= value), None)


class Shape(NamedTuple):
    """Padded sizes of a model call: what a CUDA graph is captured for."""

    rows: int  # B
    window: int  # W
    span: int  # S
    scored: int  # N

    @staticmethod
    def of(spans: Sequence[Span], vocabulary: int) -> Shape | None:
        """The bucket of a model call; None for one that is better run, or can only be run, as it is."""
        longest = keys = tokens = scored = 0
        for span in spans:
            if span.base is None or span.twin:
                return None
            length = len(span.tokens)
            longest, keys = max(longest, length), max(keys, span.window.key_length)
            tokens, scored = tokens + length, scored + len(span.scored)
        rows, window = bucket(len(spans), BATCHES), bucket(longest, WINDOWS)
        reach, heads = bucket(keys, SPANS), bucket(scored, SCORED)
        if rows is None or window is None or reach is None or heads is None:
            return None
        padded = rows * window
        fits = padded <= STATIC_TOKENS and rows * reach <= STATIC_KEY_CELLS and heads * vocabulary <= MAX_CHUNK_ELEMENTS
        wasteful = padded > max(FREE_TOKENS, MOST_PADDING * tokens)
        return Shape(rows, window, reach, heads) if fits and not wasteful else None

    @property
    def size(self) -> int:
        """Numbers in the packed layout."""
        return 4 * self.rows * self.window + 2 * self.rows + self.scored

    def sections(self, packed: Packed) -> tuple[Packed, Packed, Packed]:
        """Views of a packed layout: of tokens [4, B, W], of rows [2, B], scored places [N] in the B * W tokens.

        Of each token: id, position, place in the KV store, number of leading keys that it sees. Of each row: base and
        key length.
        """
        cells = 4 * self.rows * self.window
        rows = cells + 2 * self.rows
        return (
            packed[:cells].reshape(4, self.rows, self.window),
            packed[cells:rows].reshape(2, self.rows),
            packed[rows : self.size],
        )

    def fill(self, packed: IntArray, spans: Sequence[Span], scratch: int) -> None:
        """Write the layout of `spans`. Padding repeats a row's last token, or the first row, and writes to `scratch`:
        all of it is finite where the rows themselves are."""
        (tokens, positions, write, visible), of_rows, scored = self.sections(packed)
        count, cells, place = len(spans), np.arange(self.window), 0
        figures = np.empty((self.rows, 4), dtype=np.int64)  # base, keys, start, length
        for row, span in enumerate(spans):
            window, length = span.window, len(span.tokens)
            figures[row] = span.base or 0, window.key_length, window.start, length
            tokens[row, :length] = span.tokens
            tokens[row, length:] = span.tokens[-1]
            heads = len(span.scored)
            scored[place : place + heads] = span.scored
            if row:
                scored[place : place + heads] += row * self.window
            place += heads
        scored[place:] = 0
        if count < self.rows:
            figures[count:] = figures[0]
            tokens[count:] = tokens[0]
        of_rows[:] = figures[:, :2].T
        bases, keys, starts, lengths = figures.T[:, :, None]
        np.add(starts, np.minimum(cells, lengths - 1), out=positions)
        np.add(bases, positions, out=write)
        write[cells >= lengths] = scratch
        write[count:] = scratch
        visible[:] = keys
        for row, span in enumerate(spans):
            if span.window.pattern is not None:
                visible[row] = np.minimum(visible[row], span.window.pattern.visible(positions[row]))
        if count < self.rows:
            visible[count:] = visible[0]


class StaticRunner:
    """Model calls in static shapes, from tokens to statistics: one copy to the device, one replay, one copy back.

    `capture` (default: on CUDA) makes graphs. At most `max_graphs` shapes are kept. The cache must have `SCRATCH`
    positions besides its own. A batch that does not fit, or has further shapes, is run by `eager`; after a failing
    capture, which is logged once, every batch is.
    """

    def __init__(self, eager: EagerRunner, *, capture: bool | None = None, max_graphs: int = 64) -> None:
        device = eager.cache.device
        capture = device.type == "cuda" if capture is None else capture
        self._eager, self._max_graphs = eager, max_graphs
        size = Shape(BATCHES[-1], STATIC_TOKENS // BATCHES[-1], SPANS[0], SCORED[-1]).size
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._layout: IntArray = self._host.numpy()
        self._packed = torch.zeros(size, dtype=torch.int64, device=device)
        self._runs: dict[Shape, Callable[[], Tensor]] = {}
        self._stream = torch.cuda.Stream(device) if capture else None  # type: ignore[no-untyped-call]
        # Graphs share their memory: they never overlap, and each one's result is copied before the next runs.
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._failed = False
        self.padded = False  # whether the forward in hand was run in static shapes

    @property
    def shapes(self) -> int:
        """Shapes that have been run so far; 0 once a capture has failed."""
        return len(self._runs)

    def forward(self, batch: StepBatch) -> Tensor:
        """Packed statistics on the host, [GREEDY_STATS, N]; as of `EagerRunner` for a batch that does not fit."""
        shapes = self._shapes(batch)
        self.padded = shapes is not None
        if shapes is None:
            return self._eager.forward(batch)
        packed = [self._run(group, shape) for group, shape in zip(batch.groups, shapes, strict=True)]
        return packed[0] if len(packed) == 1 else torch.cat(packed, dim=1)

    def statistics(self, batch: StepBatch, computed: Tensor) -> TokenStatistics:
        return unpack(computed.numpy()) if self.padded else self._eager.statistics(batch, computed)

    def _shapes(self, batch: StepBatch) -> list[Shape] | None:
        """The buckets of all model calls; None where one of them cannot, or should not, run in a static shape."""
        if self._failed or batch.sampling is not None or batch.tops:
            return None
        shapes = []
        for group in batch.groups:
            shape = Shape.of(group, self._eager.vocabulary)
            if shape is None:
                return None
            shapes.append(shape)
        new = {shape for shape in shapes if shape not in self._runs}
        return shapes if len(new) + len(self._runs) <= self._max_graphs else None

    def _run(self, spans: Sequence[Span], shape: Shape) -> Tensor:
        shape.fill(self._layout, spans, self._eager.cache.positions)
        self._packed[: shape.size].copy_(self._host[: shape.size], non_blocking=True)
        run = self._runs.get(shape) or self._prepare(shape)
        result = run().cpu()  # waits, so that the host buffer may be filled anew
        return result[:, : sum(len(span.scored) for span in spans)]

    def compute(self, shape: Shape) -> Tensor:
        """[GREEDY_STATS, N] of the layout in the device's buffer; nothing here depends on its numbers."""
        of_tokens, of_rows, scored = shape.sections(self._packed)
        tokens, positions, write, visible = of_tokens.unbind()
        bases, key_lengths = of_rows.unbind()
        ragged = Ragged.static(positions, write, visible, bases, key_lengths, shape.span)
        eager = self._eager
        hidden = eager.model(tokens.flatten(), ragged, eager.cache, scored)
        logits = eager.model.logits(hidden)[:, : eager.vocabulary]
        fused = fused_score(logits.device.type)
        if fused is not None:
            return fused(logits, eager.mask_id, None)
        return score(logits.float(), eager.mask_id, margins=True)

    def _prepare(self, shape: Shape) -> Callable[[], Tensor]:
        """What runs `shape` from now on: a captured graph, or without capture the computation itself."""
        compute = partial(self.compute, shape)
        if self._stream is None or self._failed:
            self._runs[shape] = compute
            return compute
        main = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(main)
        try:
            # The stream is entered here too, because a failing capture does not leave it by itself. Running the
            # computation several times changes nothing: it writes the same keys.
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    compute()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    packed = compute()
        except RuntimeError as error:
            logger.warning("CUDA graphs are off, %s could not be captured: %s", shape, error)
            self._failed = True
            self._runs.clear()
            return compute
        finally:
            main.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return packed

        self._runs[shape] = replay
        return replay
