"""The embedded models: their size, what they can do, and the script that trains them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.models import ZOO_NAMES, BlockCausal, Ragged, load_model, load_tokenizer, read_configs, resolve_model
from d3llm_ray.models.checkpoint import ZOO
from d3llm_ray.tasks import load_task

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs" / "pretrain_tiny.py"


@pytest.fixture(scope="module")
def losses() -> Iterator[ModuleType]:
    """The losses of the script, which finds its modules beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("pretraining.losses")


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_embedded_models_are_small(name: str) -> None:
    model, family = load_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 5_000_000
    assert sum(file.stat().st_size for file in resolve_model(name).iterdir()) <= 12_000_000
    tokenizer = load_tokenizer(name, family)
    assert tokenizer is not None and len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id in family.stop_token_ids


def test_tiny_llada_solves_the_task_and_is_honestly_uncertain() -> None:
    """README: 91 % of 500; here 96 problems, so the bound is four standard errors below."""
    task = load_task("arith")
    problems = task.problems("test", 96)
    llm = DiffusionLLM.from_pretrained("tiny-llada", decoder="vanilla", early_stop=True)
    prompts = [problem.messages for problem in problems]

    def correct(outputs) -> float:
        return sum(task.is_correct(o.text, p.reference or "") for o, p in zip(outputs, problems, strict=True)) / 96

    plain = llm.generate(prompts)
    assert correct(plain) >= 0.79
    assert all(max(output.reveal_steps) == output.forwards - 1 for output in plain)
    fast = DiffusionLLM.from_pretrained("tiny-llada", decoder="d3llm-nocache", entropy_threshold=0.45).generate(prompts)
    tokens_per_forward = sum(len(o.token_ids) for o in fast) / sum(o.forwards for o in fast)
    assert 1.5 <= tokens_per_forward <= 4


def test_all_embedded_models_together_fit_a_repository() -> None:
    assert {path.name for path in ZOO.iterdir()} == set(ZOO_NAMES)
    assert sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file()) < 40_000_000


@pytest.mark.parametrize(
    ("name", "decoder", "accuracy", "tpf"),
    [
        # docs/distillation.md has 500 problems; here 48, so the bounds are three standard errors below
        ("tiny-llada-d3llm", "d3llm-nocache", 0.78, 2.9),
        ("tiny-llada-dparallel", "dparallel", 0.79, 1.9),
        ("tiny-llada-d2f", "d2f", 0.86, 1.8),
        ("tiny-fast-dllm-v2", "fast-dllm-v2", 0.90, 1.8),
    ],
)
def test_distilled_models_do_what_they_were_distilled_for(name: str, decoder: str, accuracy: float, tpf: float) -> None:
    task = load_task("arith")
    problems = task.problems("test", 48)
    outputs = DiffusionLLM.from_pretrained(name, decoder=decoder).generate([one.messages for one in problems])
    right = sum(task.is_correct(o.text, p.reference or "") for o, p in zip(outputs, problems, strict=True))
    assert right / 48 >= accuracy
    assert sum(len(o.token_ids) for o in outputs) / sum(o.forwards for o in outputs) >= tpf


def test_tiny_dream_computes_what_transformers_does() -> None:
    """Dream is Qwen2 with full attention: transformers' Qwen2 over the same file, unmasked, is the oracle."""
    model, family = load_model("tiny-dream")
    assert family.name == "dream" and family.logit_shift and family.block_size == 16
    assert (model.config.num_heads, model.config.num_kv_heads, model.config.qkv_bias) == (4, 2, True)
    oracle = Qwen2ForCausalLM(Qwen2Config(**{**family.config, "model_type": "qwen2"}))
    oracle.load_state_dict(load_file(resolve_model("tiny-dream") / "model.safetensors"))
    ids = torch.tensor([4, *range(20, 60), *[family.mask_token_id] * 20])
    with torch.no_grad():
        everything = torch.zeros(1, 1, len(ids), len(ids))  # added to the attention scores, in place of a causal mask
        expected = oracle(ids[None], attention_mask=everything).logits[0]
        logits = model.logits(model(ids, Ragged.build([len(ids)])))
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_tiny_dream_solves_the_task() -> None:
    """README: 96 % of 500; here 48 problems, so the bound is three standard errors below."""
    task = load_task("arith")
    problems = task.problems("test", 48)
    llm = DiffusionLLM.from_pretrained("tiny-dream", decoder="d3llm-nocache", entropy_threshold=0.45)
    outputs = llm.generate([problem.messages for problem in problems])
    right = sum(task.is_correct(o.text, p.reference or "") for o, p in zip(outputs, problems, strict=True))
    assert right / 48 >= 0.86


def test_tiny_ar_continues_a_solution() -> None:
    """The causal half adds: next token after `Adding 7 gives 12 + 7 =`."""
    model, family = load_model("tiny-ar")
    tokenizer = load_tokenizer("tiny-ar", family)
    assert tokenizer is not None and family.mask_token_id is None
    for a, b in ((12, 7), (30, 15), (9, 9)):
        ids = tokenizer(f"Adding {b} gives {a} + {b} =", add_special_tokens=False)["input_ids"]
        hidden = model(torch.tensor(ids), Ragged.build([len(ids)], pattern=BlockCausal(1)))
        assert tokenizer.decode(model.logits(hidden[-1:]).argmax(-1)).strip() == str(a + b)


def test_targeted_masks_leave_their_target_predictable(losses: ModuleType) -> None:
    corpus = importlib.import_module("pretraining.corpus").Corpus(0, 3)
    kinds = set()
    for _ in range(300):
        example = corpus.example(0)
        mask, target = losses.targeted_mask(example, 64)
        assert mask[target]
        if target in example.targets:
            equation = slice(target - losses.OPERANDS, target)
            assert not mask[equation].any()
            assert example.response[target - 1] == corpus.equals
        after_only = bool(mask[target:].all()) and not mask[:target].any()
        kinds.add(after_only)
    assert kinds == {True, False}


def test_losses_are_means_of_cross_entropies(losses: ModuleType) -> None:
    """A model with a zero LM head is uniform: every mean is ln V; the SFT weighting keeps that on average."""
    corpus = importlib.import_module("pretraining.corpus").Corpus(0, 3)
    model, family = load_model("tiny-llada")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    examples = [corpus.example(0) for _ in range(64)]
    uniform = torch.tensor(model.config.vocab_size).log().item()
    with torch.no_grad():
        facts = losses.fact_loss(model, family, [corpus.fact() for _ in range(4)], "cpu").item()
        given = (model, family, examples, 64)
        adapt = losses.diffusion_loss(*given, "adapt", "cpu").item()
        sft = [losses.diffusion_loss(*given, "sft", "cpu").item() for _ in range(4)]
    assert facts == pytest.approx(uniform, rel=1e-4)
    assert adapt == pytest.approx(2 * uniform, rel=1e-4)  # mean over the masked, and mean over the targets
    assert sum(sft) / 4 == pytest.approx(uniform, rel=0.1)  # 1 / p makes every ratio count alike


@pytest.mark.parametrize(("name", "expected"), [("tiny-llada", [8.0, 3.0]), ("tiny-dream", [2.0, 5.0])])
def test_masked_losses_by_hand(losses: ModuleType, name: str, expected: list[float]) -> None:
    """Packed sequences (0, 1, 2) and (1, 0), each with its last token masked, over a vocabulary of three.

    LLaDA reads a token from its own row: probabilities 1 / 8 and 1 / 3; Dream from the row before: 2 / 4 and 1 / 5.
    """
    _, family = read_configs(name)
    odds = torch.tensor([[1.0, 1, 1], [1, 1, 2], [1, 6, 1], [1, 3, 1], [1, 1, 1]])

    class Given:
        def __call__(self, ids: torch.Tensor, ragged: Ragged) -> torch.Tensor:
            assert ids.tolist() == [0, 1, family.mask_token_id, 1, family.mask_token_id]
            return odds.log()

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    ids, masked = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([False, False, True, False, True])
    found = losses.masked_losses(Given(), family, ids, masked, Ragged.build([3, 2]))
    torch.testing.assert_close(found, torch.tensor(expected).log())


@pytest.mark.slow
def test_the_script_trains_resumes_and_exports(tmp_path: Path) -> None:
    command = [
        sys.executable, str(SCRIPT), "--output", str(tmp_path), "--hidden-size", "16", "--num-layers", "1",
        "--num-heads", "2", "--intermediate-size", "16", "--batch", "4", "--facts", "4", "--checkpoint-every", "1",
        "--causal-steps", "2", "--adapt-steps", "2",
    ]  # fmt: skip

    def run(*more: str) -> None:
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=200, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]

    run("--sft-steps", "2", "--families", "llada", "dream")
    causal, _ = load_model(tmp_path / "tiny-ar", dtype="auto")
    llada, family = load_model(tmp_path / "tiny-llada", dtype="auto")
    assert family.block_size == 16 and llada.lm_head.weight.dtype == torch.bfloat16
    assert not llada.lm_head.weight.equal(causal.lm_head.weight)
    dream, family = load_model(tmp_path / "tiny-dream", dtype="auto")
    assert family.name == "dream" and family.logit_shift and dream.config.num_kv_heads == 1 and dream.config.qkv_bias
    assert not list(tmp_path.glob("*-partial.pt")) and not list(tmp_path.glob("*.tmp"))
    # A stage that was cut off goes on from its checkpoint, finished stages are not repeated, and a shipped causal
    # model stands in for the first stage.
    (tmp_path / "llada-sft.pt").unlink()
    (tmp_path / "causal.pt").unlink()
    stamp = (tmp_path / "llada-adapt.pt").stat().st_mtime_ns
    run("--sft-steps", "1", "--start", str(tmp_path / "tiny-ar"))
    assert stamp == (tmp_path / "llada-adapt.pt").stat().st_mtime_ns
    assert (tmp_path / "llada-sft.pt").exists() and not (tmp_path / "causal.pt").exists()
