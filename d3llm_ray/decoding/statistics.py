"""Token statistics of scored rows: most probable token, sampled token, its probability, entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.decoding.canvas import BoolArray, FloatArray, IntArray
from d3llm_ray.decoding.sampling import Sampling
from d3llm_ray.decoding.scoring import Stat, as_sampled, draw, most_probable, score
from d3llm_ray.models import Transformer

MAX_CHUNK_ELEMENTS = 1 << 26  # logits held at a time: 256 MiB in float32
COSTLY_ROW = 8  # a guided row, or one that plain torch draws, holds up to so many times the memory of the others

Score = Callable[[Tensor, int | None, Sampling | None], Tensor]


@dataclass(slots=True)  # not frozen: made for every request in every forward
class TokenStatistics:
    """Host arrays with one entry for each scored row; probabilities are those of tokens other than the mask."""

    argmax: IntArray
    sampled: IntArray  # equals argmax at temperature 0
    confidence: FloatArray  # probability of `sampled`, before temperature and filters
    logprob: FloatArray  # its logarithm
    entropy: FloatArray  # nats, before temperature and filters
    # Of the distribution after temperature, top-p and top-k, by which Dream's samplers rank positions.
    filtered_confidence: FloatArray  # probability of `sampled`
    margin: FloatArray  # gap between the two highest probabilities; NaN where nobody asked for it
    filtered_entropy: FloatArray  # nats
    finite: BoolArray  # False: the row's logits held NaN or an infinity (or lie further apart than float32 reaches)
    tops: FloatArray  # [rows, 2 * K], as of `scoring.most_probable`

    def rows(self, chosen: slice) -> TokenStatistics:
        """The entries of some rows."""
        return TokenStatistics(*(getattr(self, name)[chosen] for name in self.__slots__))

    def most_probable(self, chosen: IntArray, count: int) -> list[list[tuple[int, float]]]:
        """Of each of the rows the `count` most probable tokens with their log probabilities."""
        ids, logprobs = np.split(self.tops[chosen], 2, axis=1)
        pairs = zip(ids[:, :count].astype(int).tolist(), logprobs[:, :count].tolist(), strict=True)
        return [list(zip(*pair, strict=True)) for pair in pairs]


def token_statistics(
    model: Transformer,
    hidden: Tensor,
    *,
    vocabulary: int,
    mask_id: int | None,
    sampling: Sampling | None,
    guidance: tuple[Tensor, FloatArray] | None = None,
    margins: bool = False,
    tops: int = 0,
) -> TokenStatistics:
    """LM head and statistics on the scored rows `hidden` [N, hidden_size] only, chunked; one host copy.

    Token ids from `vocabulary` on (rows of the LM head without a token) and `mask_id` are never predicted.
    `guidance` is classifier-free: hidden rows [N, hidden_size] without the prompt and scales [N]; where the scale
    w > 0, logits are u + (w + 1)(c - u) (LLaDA generate.py). `margins` asks for the margin, `tops` for so many of the
    most probable tokens. Without `sampling` every row takes its most probable token.
    """
    if not hidden.shape[0]:
        return unpack(np.zeros((len(Stat) + 2 * tops, 0), dtype=np.float32), tops)
    fused = fused_score(hidden.device.type)
    if sampling is not None and not sampling.active.any():
        sampling = None
    drawn = np.zeros(hidden.shape[0], dtype=np.bool_)  # rows that plain torch draws
    if sampling is not None:
        drawn = sampling.active if fused is None else sampling.filtered
    cost = COSTLY_ROW if guidance is not None or tops or drawn.any() else 1
    chunk = max(1, MAX_CHUNK_ELEMENTS // (vocabulary * cost))
    parts = []
    for begin in range(0, hidden.shape[0], chunk):
        rows = slice(begin, begin + chunk)
        logits = model.logits(hidden[rows])[:, :vocabulary]
        if guidance is not None:
            logits = _guided(model, logits, guidance[0][rows], guidance[1][rows])
        chosen = None if sampling is None else sampling.select(rows)
        if fused is not None:
            packed = fused(logits, mask_id, chosen)
        else:
            logits = logits.float()
            packed = score(logits, mask_id, margins=margins or chosen is not None)
            packed = packed if chosen is None else as_sampled(packed)
        if chosen is not None and drawn[rows].any():
            _redraw(packed, logits, mask_id, chosen, np.flatnonzero(drawn[rows]))
        parts.append(torch.cat((packed, most_probable(logits, mask_id, tops))) if tops else packed)
    return unpack(torch.cat(parts, dim=1).cpu().numpy(), tops)


@cache
def fused_score(device_type: str) -> Score | None:
    """The Triton kernel for tensors on CUDA where triton is installed; None: plain torch."""
    if device_type != "cuda":
        return None
    try:
        from d3llm_ray.decoding import kernels
    except ImportError:
        return None
    return kernels.score


def _guided(model: Transformer, logits: Tensor, unconditional: Tensor, scales: FloatArray) -> Tensor:
    rows = np.flatnonzero(scales > 0)
    if not rows.size:
        return logits
    where = torch.from_numpy(rows).to(logits.device)
    weights = torch.from_numpy(scales[rows] + 1).to(logits.device)[:, None]
    logits = logits.float()
    without = model.logits(unconditional[where])[:, : logits.shape[1]].float()
    logits[where] = without + weights * (logits[where] - without)
    return logits


def _redraw(packed: Tensor, logits: Tensor, mask_id: int | None, sampling: Sampling, chosen: IntArray) -> None:
    """Replace the chosen rows' statistics, columns of `packed` [len(Stat), N], by those of `draw`."""
    rows = torch.from_numpy(chosen).to(logits.device)
    packed[:, rows] = draw(logits[rows].float(), mask_id, packed[:, rows], sampling.select(chosen))


def unpack(packed: FloatArray, tops: int = 0) -> TokenStatistics:
    """Rows of `Stat` and of `tops` tokens, copied to the host, by name."""
    argmax, logprob, entropy = packed[Stat.ARGMAX].astype(np.int64), packed[Stat.LOGPROB], packed[Stat.ENTROPY]
    confidence = np.exp(logprob)
    sampled, filtered_confidence, filtered_entropy = argmax, confidence, entropy
    if len(packed) - 2 * tops == len(Stat):
        sampled = packed[Stat.SAMPLED].astype(np.int64)
        filtered_confidence, filtered_entropy = packed[Stat.FILTERED_CONFIDENCE], packed[Stat.FILTERED_ENTROPY]
    return TokenStatistics(
        argmax=argmax,
        sampled=sampled,
        confidence=confidence,
        logprob=logprob,
        entropy=entropy,
        filtered_confidence=filtered_confidence,
        margin=packed[Stat.MARGIN],
        filtered_entropy=filtered_entropy,
        finite=np.isfinite(entropy),
        tops=packed[len(packed) - 2 * tops :].T,
    )
