"""Token statistics as one Triton kernel: each row of logits is read once, in its own dtype, and left as it is.

Importing this module needs triton, which CUDA builds of torch bring along. Equal to `scoring.score` and, on rows
without top-p and top-k, to `scoring.draw`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from d3llm_ray.decoding import sampling as rules
from d3llm_ray.decoding.scoring import GREEDY_STATS, Stat

GOLDEN = tl.constexpr(rules.GOLDEN)
MIX_1 = tl.constexpr(rules.MIX_1)
MIX_2 = tl.constexpr(rules.MIX_2)
LOWEST = tl.constexpr(-1e30)  # below every logit; finite, so that differences and products with 0 stay finite
NO_ID = tl.constexpr((1 << 31) - 1)
ARGMAX, LOGPROB, ENTROPY, MARGIN, SAMPLED, FILTERED_CONFIDENCE, FILTERED_ENTROPY = (
    tl.constexpr(int(stat)) for stat in Stat
)
BLOCK, WARPS = 2048, 16  # 4 tokens a thread: the widest tile that spills no registers with float64 noise


def score(logits: Tensor, mask_id: int | None, sampling: rules.Sampling | None) -> Tensor:
    """Statistics of [N, V] logits in float32, float16 or bfloat16, without top-p and top-k.

    Returns rows of `scoring.Stat`, [GREEDY_STATS, N] float32, or with `sampling` all of them: the same token ids.
    """
    rows, vocabulary = logits.shape
    out = torch.empty(GREEDY_STATS if sampling is None else len(Stat), rows, dtype=torch.float32, device=logits.device)
    temperatures = keys = None
    if sampling is not None:
        temperatures = torch.from_numpy(sampling.temperatures).to(logits.device, non_blocking=True)
        keys = torch.from_numpy(sampling.keys.view(np.int64)).to(logits.device, non_blocking=True)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _score[(rows,)](
            logits,
            out,
            temperatures,
            keys,
            rows,
            vocabulary,
            -1 if mask_id is None else mask_id,
            *logits.stride(),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out


@triton.jit
def _gumbel(key, ids):
    """`sampling.gumbel_noise` of one row."""
    x = key + (ids + 1).to(tl.uint64) * GOLDEN
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    x = x ^ (x >> 31)
    uniform = ((x >> 11).to(tl.float64) + 0.5) * (1.0 / (1 << 53))
    return -tl.log(-tl.log(uniform))


@triton.jit
def _log1p(x):
    """log(1 + x) of x >= 0, exact near 0: below 1/2 by the series of 2 artanh(x / (2 + x))."""
    s = x / (2 + x)
    square = s * s
    series = 2 * s * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square / 9))))
    return tl.where(x < 0.5, series, tl.log(1 + x))


@triton.jit
def _add(others, moment, rise, valid):
    """Add exp(x) to an online softmax: `moment` = sum exp(x - top) (x - top), `others` = sum exp(x - top) without the
    top itself, whose 1 would drown them.

    `rise` is x - top; where it is positive, x becomes the top and what was summed shrinks. NaN and infinities make
    the moment NaN, and it stays so.
    """
    weight = tl.where(valid, tl.exp(-tl.abs(rise)), 0.0)
    moment = tl.where(rise > 0, weight * (moment - rise * (others + 1)), moment + weight * rise)
    others = tl.where(rise > 0, weight * (others + 1), others + weight)
    return others, moment


@triton.jit
def _merge(others, moment, drop, first):
    """The lanes' sums as one, `drop` = top of the lane - top of the row, which lane `first` has: (others, entropy)."""
    scale = tl.exp(drop)
    merged = tl.sum(tl.where(first, others, (others + 1) * scale), 0)
    return merged, _log1p(merged) - tl.sum(scale * (moment + (others + 1) * drop), 0) / (1 + merged)


@triton.jit(do_not_specialize=["rows"])  # or a batch of a new size would wait for the compiler
def _score(logits, out, temperatures, keys, rows, vocabulary, mask_id, row_stride, stride, BLOCK: tl.constexpr):
    """One program a row. Every lane keeps the statistics of its own tokens; they meet once, at the end."""
    SAMPLE: tl.constexpr = temperatures is not None
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    second = tl.full([BLOCK], LOWEST, tl.float32)
    top_id = tl.zeros([BLOCK], tl.int32)
    others = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    if SAMPLE:
        temperature = tl.load(temperatures + row)
        hot = temperature > 0
        coldness = tl.where(hot, tl.minimum(1 / tl.where(hot, temperature, 1.0), -LOWEST), 1.0)
        key = tl.load(keys + row).to(tl.uint64, bitcast=True)
        tempered_others = tl.zeros([BLOCK], tl.float32)
        tempered_moment = tl.zeros([BLOCK], tl.float32)
        best = tl.full([BLOCK], float("-inf"), tl.float64)
        best_id = tl.zeros([BLOCK], tl.int32)
        best_logit = tl.full([BLOCK], LOWEST, tl.float32)

    for begin in range(0, vocabulary, BLOCK):
        ids = begin + lanes
        inside = ids < vocabulary
        valid = inside & (ids != mask_id)
        x = tl.load(logits + row * row_stride + ids * stride, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(valid, x, LOWEST)
        rise = x - top
        others, moment = _add(others, moment, rise, valid)
        if SAMPLE:
            tempered_rise = tl.minimum(tl.maximum(rise * coldness, LOWEST), -LOWEST)
            tempered_others, tempered_moment = _add(tempered_others, tempered_moment, tempered_rise, valid)
            if hot:
                noisy = x.to(tl.float64) / temperature.to(tl.float64) + _gumbel(key, ids)
                noisy = tl.where(valid, noisy, float("-inf"))
                better = noisy > best
                best = tl.where(better, noisy, best)
                best_id = tl.where(better, ids, best_id)
                best_logit = tl.where(better, x, best_logit)
        second = tl.where(rise > 0, top, tl.maximum(second, x))
        top_id = tl.where(rise > 0, ids, top_id)
        top = tl.maximum(top, x)

    peak = tl.max(top, 0)
    argmax = tl.min(tl.where(top == peak, top_id, NO_ID), 0)
    first = (top == peak) & (top_id == argmax)
    runner_up = tl.max(tl.where(first, second, top), 0)
    drop = top - peak
    rest, entropy = _merge(others, moment, drop, first)
    gap = 1 - tl.exp(runner_up - peak)
    logprob = -_log1p(rest)
    if SAMPLE:
        tempered_drop = tl.maximum(drop * coldness, LOWEST)
        tempered_rest, tempered_entropy = _merge(tempered_others, tempered_moment, tempered_drop, first)
        gap = (1 - tl.exp((runner_up - peak) * coldness)) / (1 + tempered_rest)
        sampled = argmax
        chosen = peak
        if hot:
            winner = tl.max(best, 0)
            sampled = tl.min(tl.where(best == winner, best_id, NO_ID), 0)
            chosen = tl.max(tl.where((best == winner) & (best_id == sampled), best_logit, LOWEST), 0)
        logprob += chosen - peak
        tl.store(out + SAMPLED * rows + row, sampled.to(tl.float32))
        tl.store(out + FILTERED_CONFIDENCE * rows + row, tl.exp((chosen - peak) * coldness) / (1 + tempered_rest))
        tl.store(out + FILTERED_ENTROPY * rows + row, tempered_entropy)
    else:
        gap /= 1 + rest
    tl.store(out + ARGMAX * rows + row, argmax.to(tl.float32))
    tl.store(out + LOGPROB * rows + row, logprob)
    tl.store(out + ENTROPY * rows + row, entropy)
    tl.store(out + MARGIN * rows + row, gap)
