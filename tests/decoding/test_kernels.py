"""The Triton kernel against plain torch: on CUDA where there is one, else through Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from d3llm_ray.decoding import scoring, statistics
from d3llm_ray.decoding.sampling import Sampling, row_keys
from tests.decoding.near_certain import near_certain

pytest.importorskip("triton", reason="triton is not installed (CUDA builds of torch bring it; pip install '.[dev]')")

Results = dict[str, np.ndarray]
CUDA = torch.cuda.is_available()
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MASK = 3
CASES = [("float32", 5), ("float32", 2048), ("float32", 5000), ("float16", 189), ("bfloat16", 189), ("bfloat16", 5000)]


def rows_of(dtype: str, vocabulary: int) -> tuple[Tensor, Sampling]:
    """14 rows, flat to peaked, with ties; columns beyond the vocabulary and the mask are the highest."""
    count = 14
    wide = torch.randn(count, vocabulary + 7, generator=torch.Generator().manual_seed(vocabulary))
    wide *= torch.logspace(-2, 1.5, count)[:, None]
    wide[5] = 0.0
    wide[6, vocabulary // 2 :] = wide[6].max() + 1  # a plateau: the lowest id wins
    if vocabulary > 4096:  # the two highest in one lane of different tiles, both ways round
        wide[[4, 8], 10] = torch.tensor([40.0, 39.5])
        wide[[4, 8], 10 + 2048] = torch.tensor([39.5, 40.0])
    wide[:, MASK] = wide[:, vocabulary:] = 900.0
    temperatures = np.resize(np.array([0, 0.7, 1, 2, 1e-4, 0, 30], dtype=np.float32), count)
    off = (np.ones(count, dtype=np.float32), np.zeros(count, dtype=np.int64))
    return wide.to(DTYPES[dtype])[:, :vocabulary], Sampling(temperatures, *off, row_keys(11, np.arange(count), 2))


def sampled_rows(count: int) -> Sampling:
    """So cold that the most probable token is drawn."""
    cold, off = (
        np.full(count, 1e-3, dtype=np.float32),
        (np.ones(count, dtype=np.float32), np.zeros(count, dtype=np.int64)),
    )
    return Sampling(cold, *off, row_keys(11, np.arange(count), 2))


def broken_rows() -> Tensor:
    logits = torch.randn(7, 3000, generator=torch.Generator().manual_seed(0))
    logits[1, 2500], logits[3, 0], logits[5, 700] = torch.nan, torch.inf, -torch.inf
    logits[6, MASK] = torch.nan  # not looked at
    return logits


class Head:
    """A model whose hidden rows are its logits."""

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def filtered_batch() -> statistics.TokenStatistics:
    """A batch in which some rows have top-p or top-k, guidance, and chunks."""
    logits, plain = rows_of("float32", 189)
    top_ps = np.resize(np.array([1, 1, 0.8], dtype=np.float32), len(logits))
    top_ks = np.resize(np.array([0, 0, 0, 9]), len(logits))
    return statistics.token_statistics(
        Head(),  # type: ignore[arg-type]
        logits.to("cuda" if CUDA else "cpu"),
        vocabulary=188,
        mask_id=MASK,
        sampling=Sampling(plain.temperatures, top_ps, top_ks, plain.keys),
        guidance=(
            logits.flip(0).to("cuda" if CUDA else "cpu"),
            np.resize(np.array([0, 1.5], dtype=np.float32), len(logits)),
        ),
        margins=True,
    )


def run_kernel() -> Results:
    """What the kernel says of every case, on CUDA or, with TRITON_INTERPRET=1, on the CPU."""
    from d3llm_ray.decoding import kernels

    device = "cuda" if CUDA else "cpu"
    found: Results = {}
    for dtype, vocabulary in CASES:
        logits, sampling = rows_of(dtype, vocabulary)
        logits = logits.to(device)
        before = logits.clone()
        found[f"greedy-{dtype}-{vocabulary}"] = kernels.score(logits, MASK, None).cpu().numpy()
        found[f"sampled-{dtype}-{vocabulary}"] = kernels.score(logits, MASK, sampling).cpu().numpy()
        found[f"unmasked-{dtype}-{vocabulary}"] = kernels.score(logits, None, None).cpu().numpy()
        found[f"untouched-{dtype}-{vocabulary}"] = np.array(torch.equal(logits, before))
    for name, sampling in (("greedy", None), ("sampled", sampled_rows(12))):
        found[f"certain-{name}"] = kernels.score(near_certain()[0].to(device), None, sampling).cpu().numpy()
    found["broken"] = kernels.score(broken_rows().to(device), MASK, None).cpu().numpy()
    statistics.fused_score = lambda _: kernels.score  # type: ignore[assignment]
    found |= {f"batch-{name}": array for name, array in asdict(filtered_batch()).items()}
    return found


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Results:
    # A process of its own: Triton decides at import whether it interprets.
    path = tmp_path_factory.mktemp("kernel") / "found.npz"
    environment = os.environ | ({} if CUDA else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "tests.decoding.test_kernels", str(path)]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], check=True, timeout=240)
    with np.load(path) as found:
        return dict(found)


@pytest.mark.parametrize(("dtype", "vocabulary"), CASES)
def test_statistics_equal_float64(kernel: Results, dtype: str, vocabulary: int) -> None:
    logits, _ = rows_of(dtype, vocabulary)
    for name, mask_id in (("greedy", MASK), ("unmasked", None)):
        wide = logits.double().clone()
        if mask_id is not None:
            wide[:, mask_id] = -torch.inf
        p = wide.softmax(-1)
        top = p.topk(2).values
        argmax, logprob, entropy, margin = kernel[f"{name}-{dtype}-{vocabulary}"]
        np.testing.assert_array_equal(argmax, wide.argmax(-1))
        np.testing.assert_allclose(logprob, top[:, 0].log(), atol=2e-6, rtol=1e-5)
        np.testing.assert_allclose(entropy, torch.special.entr(p).sum(-1), atol=5e-6, rtol=1e-5)
        np.testing.assert_allclose(margin, top[:, 0] - top[:, 1], atol=1e-6)
    assert kernel[f"untouched-{dtype}-{vocabulary}"]


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_near_certain_tokens_keep_their_order(kernel: Results, name: str) -> None:
    _, logprob, entropy = near_certain()
    found = kernel[f"certain-{name}"]
    np.testing.assert_array_equal(np.argsort(-found[1]), np.argsort(-logprob))
    np.testing.assert_array_equal(np.argsort(found[2]), np.argsort(entropy))
    np.testing.assert_allclose(found[1], logprob, rtol=1e-5)
    np.testing.assert_allclose(found[2], entropy, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "vocabulary"), CASES)
def test_sampled_ids_are_those_of_plain_torch(kernel: Results, dtype: str, vocabulary: int) -> None:
    logits, sampling = rows_of(dtype, vocabulary)
    logits = logits.float()
    base = scoring.score(logits.clone(), MASK, margins=True)
    base = torch.cat((base, base[:1], base[1:2].exp(), base[2:3]))
    expected = scoring.draw(logits, MASK, base, sampling).numpy()
    found = kernel[f"sampled-{dtype}-{vocabulary}"]
    np.testing.assert_array_equal(found[[0, 4]], expected[[0, 4]])
    np.testing.assert_allclose(found, expected, atol=5e-6, rtol=1e-5)


def test_rows_that_are_not_finite_are_flagged_and_harm_no_neighbour(kernel: Results) -> None:
    found, logits = kernel["broken"], broken_rows()
    assert np.isfinite(found[2]).tolist() == [True, False, True, False, True, False, True]
    assert ((found[0] >= 0) & (found[0] < logits.shape[1])).all()
    sound = [0, 2, 4, 6]
    np.testing.assert_allclose(
        found[:, sound], scoring.score(logits, MASK, margins=True)[:, sound], atol=5e-6, rtol=1e-5
    )


def test_a_mixed_batch_equals_plain_torch(kernel: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "fused_score", lambda _: None)
    for name, expected in asdict(filtered_batch()).items():
        np.testing.assert_allclose(kernel[f"batch-{name}"], expected, atol=5e-6, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("sampled", [False, True])
def test_it_compiles_for_cuda_without_a_device(
    capability: int, sampled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter accepts what the compiler may not: types that change in a branch, say."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from d3llm_ray.decoding import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"logits": "*bf16", "out": "*fp32", "temperatures": "*fp32", "keys": "*i64"}
    constants: dict[str, int | None] = {"stride": 1, "BLOCK": kernels.BLOCK}
    if not sampled:
        constants |= {"temperatures": None, "keys": None}
    names = kernels._score.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(kernels._score, signature, constexprs=constants)
    built = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})
    assert built.asm["cubin"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.savez(sys.argv[1], **run_kernel())
