"""The statistics kernel against the same figures computed literally in float64, on the same device."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.benchmark.gpu_check_base import Figures, Part, Target, Unavailable, expect
from d3llm_ray.benchmark.shapes import SHAPES
from d3llm_ray.decoding.sampling import Sampling, row_keys

DTYPES = ("float32", "float16", "bfloat16")
TEMPERATURES = (0.0, 0.7, 1.0, 2.0, 1e-4, 0.0, 30.0)
ABSOLUTE, RELATIVE = 1e-5, 1e-5  # of float32 sums over a vocabulary
SAME_NOISE = 1e-9  # float64 logarithms of host and device differ in their last digits
SEED, FORWARD = 11, 2


def parts() -> Iterator[Part]:
    for dtype in DTYPES:

        def run(target: Target, dtype: str = dtype) -> Figures:
            return check_kernel(target, dtype)

        yield Part(f"kernel-{dtype}", "statistics kernel against float64", 30.0, run)


def check_kernel(target: Target, dtype: str) -> Figures:
    """Greedy and sampled rows over the vocabularies of LLaDA and Dream; figures are the greatest errors."""
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed (CUDA builds of torch bring it; python -m pip install triton)")
    if not target.cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("without CUDA the kernel needs Triton's interpreter (TRITON_INTERPRET=1)")
    from d3llm_ray.decoding import kernels

    names = ("llada-8b", "dream-7b")
    sizes = [(SHAPES[n].get("embedding_size") or SHAPES[n]["vocab_size"], SHAPES[n]["mask_token_id"]) for n in names]
    wrong_ids, worst, rows = 0, 0.0, 0
    for vocabulary, mask_id in [(5000, 3)] if target.quick else sizes:
        logits, sampling = drawn_rows(14 if target.quick else 70, vocabulary, mask_id, getattr(torch, dtype))
        logits = logits.to(target.device)[:, :vocabulary]
        kept = logits.clone()
        for chosen in (None, sampling):
            got = kernels.score(logits, mask_id, chosen).double()
            wrong, error = compare(got, literal(logits, mask_id, chosen, got), chosen)
            wrong_ids, worst, rows = wrong_ids + wrong, max(worst, error), rows + len(logits)
        wrong_ids += 0 if torch.equal(logits, kept) else len(logits)  # it may not write to its input
    figures = {"rows": rows, "wrong_ids": wrong_ids, "error_over_tolerance": worst}
    return expect(wrong_ids == 0 and worst <= 1.0, "the kernel disagrees with float64", figures)


def drawn_rows(count: int, vocabulary: int, mask_id: int, dtype: torch.dtype) -> tuple[Tensor, Sampling]:
    """[count, vocabulary + 64] logits, flat to peaked, with ties; what does not count is highest."""
    logits = torch.randn(count, vocabulary + 64, generator=torch.Generator().manual_seed(vocabulary))
    logits *= torch.logspace(-2, 1.5, count)[:, None]
    logits[5] = 0.0
    logits[6, vocabulary // 2 :] = logits[6].max() + 1  # a plateau: the lowest id wins
    logits[:, mask_id] = logits[:, vocabulary:] = 900.0
    temperatures = np.resize(np.array(TEMPERATURES, dtype=np.float32), count)
    off = (np.ones(count, dtype=np.float32), np.zeros(count, dtype=np.int64))
    return logits.to(dtype), Sampling(temperatures, *off, row_keys(SEED, np.arange(count), FORWARD))


def literal(logits: Tensor, mask_id: int, sampling: Sampling | None, got: Tensor) -> Tensor:
    """What `kernels.score` should say, in float64.

    A sampled id of `got` is taken as it is where its noisy logit is the greatest up to rounding.
    """
    exact = logits.double()
    exact[:, mask_id] = -torch.inf
    argmax = _lowest_id(exact)
    logprobs = exact.log_softmax(-1)
    entropy = torch.special.entr(exact.softmax(-1)).sum(-1)
    if sampling is None:
        return torch.stack((argmax.double(), _at(logprobs, argmax), entropy, _gap(exact)))
    temperatures = torch.from_numpy(sampling.temperatures).to(logits.device).double()
    hot = temperatures > 0
    tempered = exact / torch.where(hot, temperatures, 1.0)[:, None]
    noisy = torch.where(hot[:, None], tempered + gumbel(sampling, logits), exact)
    best, claimed = noisy.max(-1).values, got[4].long().clamp(0, logits.shape[1] - 1)
    close = hot & (_at(noisy, claimed) >= best - SAME_NOISE * best.abs())
    sampled = torch.where(close, claimed, _lowest_id(noisy))
    probabilities = tempered.softmax(-1)
    of_tempered = (_gap(tempered), sampled.double(), _at(probabilities, sampled))
    rest = torch.special.entr(probabilities).sum(-1)
    return torch.stack((argmax.double(), _at(logprobs, sampled), entropy, *of_tempered, rest))


def gumbel(sampling: Sampling, logits: Tensor) -> Tensor:
    """-log(-log(u)) with u from SplitMix64 (Steele, Lea, Flood 2014) over the token id, from each row's key."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, logits.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = sampling.keys[:, None] + steps
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    uniform = torch.from_numpy(((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53).to(logits.device)
    return -torch.log(-torch.log(uniform))


def compare(got: Tensor, expected: Tensor, sampling: Sampling | None) -> tuple[int, float]:
    """(token ids that differ, greatest error of the other figures in units of the tolerance)."""
    ids = [0] if sampling is None else [0, 4]
    figures = [row for row in range(len(expected)) if row not in ids]
    wrong = int((got[ids] != expected[ids]).sum())
    error = (got[figures] - expected[figures]).abs() / (ABSOLUTE + RELATIVE * expected[figures].abs())
    return wrong, float(error.nan_to_num(torch.inf).max())


def _lowest_id(values: Tensor) -> Tensor:
    ids = torch.arange(values.shape[1], device=values.device)
    highest = values == values.max(-1, keepdim=True).values
    return torch.where(highest, ids, values.shape[1]).min(-1).values


def _at(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(1, ids[:, None])[:, 0]


def _gap(values: Tensor) -> Tensor:
    top = values.softmax(-1).topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]
