"""Static shapes: steady-state steps padded to a few sizes, so that CUDA graphs can replay them.

At small batches the processor takes longer to launch a forward's kernels than the device to run them. A graph
launches them all at once, but only with the shapes and addresses of its capture. So a group's layout is padded to a
bucket and packed into one buffer, and all else, masks and statistics included, is computed on the device from that
buffer. Without capture (any device) the same function runs kernel by kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.decoding.batch import Span
from d3llm_ray.decoding.canvas import FloatArray, IntArray
from d3llm_ray.decoding.scoring import score
from d3llm_ray.decoding.statistics import MAX_CHUNK_ELEMENTS, fused_score
from d3llm_ray.models import KVCache, Ragged, Transformer

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


@dataclass(frozen=True)
class Shape:
    """Padded sizes of a model call: what a CUDA graph is captured for."""

    rows: int  # B
    window: int  # W
    span: int  # S
    scored: int  # N

    @staticmethod
    def of(sequences: Sequence[Span], vocabulary: int) -> Shape | None:
        """The bucket of a model call; None for one that is better run, or can only be run, as it is."""
        if any(one.base is None or one.twin for one in sequences):
            return None
        lengths, scored = [len(one.tokens) for one in sequences], sum(len(one.scored) for one in sequences)
        rows, window = bucket(len(sequences), BATCHES), bucket(max(lengths), WINDOWS)
        span, heads = bucket(max(one.window.key_length for one in sequences), SPANS), bucket(scored, SCORED)
        if rows is None or window is None or span is None or heads is None:
            return None
        padded = rows * window
        fits = padded <= STATIC_TOKENS and rows * span <= STATIC_KEY_CELLS and heads * vocabulary <= MAX_CHUNK_ELEMENTS
        wasteful = padded > max(FREE_TOKENS, MOST_PADDING * sum(lengths))
        return Shape(rows, window, span, heads) if fits and not wasteful else None

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

    def fill(self, packed: IntArray, sequences: Sequence[Span], scratch: int) -> None:
        """Write the layout of `sequences`. Padding repeats a row's last token, or the first row, and writes to
        `scratch`: all of it is finite where the rows themselves are."""
        (tokens, positions, write, visible), (bases, key_lengths), scored = self.sections(packed)
        padded = [*sequences, *[sequences[0]] * (self.rows - len(sequences))]
        lengths = np.array([len(one.tokens) for one in padded])[:, None]
        starts = np.array([one.window.start for one in padded])[:, None]
        cells = np.arange(self.window)
        bases[:] = [one.base for one in padded]
        key_lengths[:] = [one.window.key_length for one in padded]
        positions[:] = starts + np.minimum(cells, lengths - 1)
        write[:] = np.where(cells < lengths, bases[:, None] + positions, scratch)
        write[len(sequences) :] = scratch
        visible[:] = key_lengths[:, None]
        for row, one in enumerate(padded):
            tokens[row, : len(one.tokens)] = one.tokens
            tokens[row, len(one.tokens) :] = one.tokens[-1]
            if one.window.pattern is not None:
                visible[row] = np.minimum(visible[row], one.window.pattern.visible(positions[row]))
        places = np.concatenate([one.scored + row * self.window for row, one in enumerate(sequences)])
        scored[: places.size] = places
        scored[places.size :] = 0


class StaticRunner:
    """Model calls in static shapes, from tokens to statistics: one copy to the device, one replay, one copy back.

    `capture` (default: on CUDA) makes graphs. At most `max_graphs` shapes are kept; calls of further ones are not
    accepted. `cache` must have `SCRATCH` positions besides its own. A failing capture is logged once, and then nothing
    is accepted any more.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        vocabulary: int,
        mask_id: int | None,
        *,
        capture: bool | None = None,
        max_graphs: int = 64,
    ) -> None:
        device = cache.keys.device
        capture = device.type == "cuda" if capture is None else capture
        self._model, self._cache = model, cache
        self._vocabulary, self._mask_id = vocabulary, mask_id
        self._max_graphs = max_graphs
        size = Shape(BATCHES[-1], STATIC_TOKENS // BATCHES[-1], SPANS[0], SCORED[-1]).size
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._packed = torch.zeros(size, dtype=torch.int64, device=device)
        self._runs: dict[Shape, Callable[[], Tensor]] = {}
        self._stream = torch.cuda.Stream(device) if capture else None  # type: ignore[no-untyped-call]
        # Graphs share their memory: they never overlap, and each one's result is copied before the next runs.
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._failed = False

    def accepts(self, groups: Sequence[Sequence[Span]]) -> bool:
        """Whether all model calls of a step can run in static shapes."""
        if self._failed:
            return False
        shapes = {Shape.of(group, self._vocabulary) for group in groups}
        return None not in shapes and len(shapes | self._runs.keys()) <= self._max_graphs

    def run(self, groups: Sequence[Sequence[Span]]) -> FloatArray:
        """Run the model calls of a step that `accepts` has let in: [4, N] float32 as `scoring.score`, on the host."""
        return np.concatenate([self._run(group) for group in groups], axis=1)

    def _run(self, sequences: Sequence[Span]) -> FloatArray:
        shape = Shape.of(sequences, self._vocabulary)
        assert shape is not None  # accepted
        shape.fill(self._host.numpy(), sequences, self._cache.positions)
        self._packed[: shape.size].copy_(self._host[: shape.size], non_blocking=True)
        run = self._runs.get(shape) or self._prepare(shape)
        result: FloatArray = run().cpu().numpy()  # waits, so that the host buffer may be filled anew
        return result[:, : sum(len(one.scored) for one in sequences)]

    def _compute(self, shape: Shape) -> Tensor:
        """[4, N] statistics of the layout in the device's buffer; nothing here depends on its numbers."""
        of_tokens, of_rows, scored = shape.sections(self._packed)
        tokens, positions, write, visible = of_tokens.unbind()
        bases, key_lengths = of_rows.unbind()
        ragged = Ragged.static(positions, write, visible, bases, key_lengths, shape.span)
        hidden = self._model(tokens.flatten(), ragged, self._cache, scored)
        logits = self._model.logits(hidden)[:, : self._vocabulary]
        fused = fused_score(logits.device.type)
        if fused is not None:
            return fused(logits, self._mask_id, None)
        return score(logits.float(), self._mask_id, margins=True)

    def _prepare(self, shape: Shape) -> Callable[[], Tensor]:
        """What runs `shape` from now on: a captured graph, or without capture the computation itself."""
        compute = partial(self._compute, shape)
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
