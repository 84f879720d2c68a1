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
from d3llm_ray.decoding.scoring import draw, score
from d3llm_ray.models import Transformer

MAX_CHUNK_ELEMENTS = 1 << 26  # logits held at a time: 256 MiB in float32
COSTLY_ROW = 8  # a guided row, or one that plain torch draws, holds up to so many times the memory of the others

Score = Callable[[Tensor, int | None, Sampling | None], Tensor]


@dataclass(frozen=True)
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

    def rows(self, begin: int, end: int) -> TokenStatistics:
        """The entries [begin, end)."""
        return TokenStatistics(*(values[begin:end] for values in vars(self).values()))


def token_statistics(
    model: Transformer,
    hidden: Tensor,
    *,
    vocabulary: int,
    mask_id: int | None,
    sampling: Sampling,
    guidance: tuple[Tensor, FloatArray] | None = None,
    margins: bool = False,
) -> TokenStatistics:
    """LM head and statistics on the scored rows `hidden` [N, hidden_size] only, chunked; one host copy.

    Token ids from `vocabulary` on (rows of the LM head without a token) and `mask_id` are never predicted.
    `guidance` is classifier-free: hidden rows [N, hidden_size] without the prompt and scales [N]; where the scale
    w > 0, logits are u + (w + 1)(c - u) (LLaDA generate.py). `margins` asks for the margin.
    """
    fused = fused_score(hidden.device.type)
    drawn = sampling.active if fused is None else sampling.filtered  # rows that plain torch draws
    active = bool(sampling.active.any())
    cost = COSTLY_ROW if guidance is not None or drawn.any() else 1
    chunk = max(1, MAX_CHUNK_ELEMENTS // (vocabulary * cost))
    parts = []
    for begin in range(0, hidden.shape[0], chunk):
        rows = slice(begin, begin + chunk)
        logits = model.logits(hidden[rows])[:, :vocabulary]
        if guidance is not None:
            logits = _guided(model, logits, guidance[0][rows], guidance[1][rows])
        chosen = sampling.select(rows) if active else None
        if fused is not None:
            packed = fused(logits, mask_id, chosen)
        else:
            logits = logits.float()
            packed = score(logits, mask_id, margins=margins or active)
            if active:
                packed = torch.cat((packed, packed[:1], packed[1:2].exp(), packed[2:3]))
        if chosen is not None and drawn[rows].any():
            _redraw(packed, logits, mask_id, chosen, np.flatnonzero(drawn[rows]))
        parts.append(packed)
    return unpack(torch.cat(parts, dim=1).cpu().numpy() if parts else np.zeros((3, 0), dtype=np.float32))


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
    """Replace the chosen rows' statistics, columns of `packed` [7, N], by those of `draw`."""
    rows = torch.from_numpy(chosen).to(logits.device)
    packed[:, rows] = draw(logits[rows].float(), mask_id, packed[:, rows], sampling.select(chosen))


def unpack(packed: FloatArray) -> TokenStatistics:
    """Rows of `scoring.score` or `scoring.draw`, copied to the host, by name."""
    argmax, logprob, entropy = packed[:3]
    ids, confidence = argmax.astype(np.int64), np.exp(logprob)
    margin = packed[3] if len(packed) > 3 else np.full_like(entropy, np.nan)
    sampled, filtered_confidence, filtered_entropy = ids, confidence, entropy
    if len(packed) > 4:
        sampled, filtered_confidence, filtered_entropy = packed[4].astype(np.int64), packed[5], packed[6]
    return TokenStatistics(
        argmax=ids,
        sampled=sampled,
        confidence=confidence,
        logprob=logprob,
        entropy=entropy,
        filtered_confidence=filtered_confidence,
        margin=margin,
        filtered_entropy=filtered_entropy,
        finite=np.isfinite(entropy),
    )
