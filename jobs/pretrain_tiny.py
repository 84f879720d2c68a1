"""Train the embedded models: causal pretraining (`tiny-ar`), then diffusion from those weights (`tiny-llada`).

    python jobs/pretrain_tiny.py --output runs/pretrain          # resumes if interrupted
    python jobs/pretrain_tiny.py --families dream --start tiny-ar --accumulate 1 --adapt-steps 10400    # tiny-dream

Stages: `causal` (next token, answers only, single facts mixed in), `adapt` (masked diffusion under a random and a
targeted mask, plain mean) and `sft` (LLaDA's SFT objective: i.i.d. masks at ratio p, every token loss over
p x answer length; arXiv:2502.09992 and its GUIDELINES.md; off by default, for at this size its weights, up to 1 / p,
cost accuracy: 200 steps of it took the shipped model from 91 to 83 %). The adaptation of causal weights follows
Dream (arXiv:2508.15487). `tiny-dream` keeps the causal shift, as Dream does, and has Dream's grouped-query attention
with biases: its key-value heads are pairs of the causal model's, averaged.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from d3llm_ray.models import BlockCausal, Family, ModelConfig, Ragged, Transformer, load_model, save_model
from d3llm_ray.models.convert import group_queries
from d3llm_ray.models.families import read_family
from d3llm_ray.tasks.arith import STEPS, ArithProblem, problems, vocabulary_texts
from d3llm_ray.tasks.tokenizer import build_tokenizer

CONTEXT = 512  # positions: five worked examples, a question and the canvas fit
GENERATION = {"block_size": 16}  # four blocks in a canvas of 64
EPSILON = 1e-3  # smallest mask ratio of LLaDA's objective
OPERANDS = 4  # tokens before a sum: a + n =
FACT_WEIGHT = 0.5
FEW_SHOT_EVERY = 20  # one batch in so many carries worked examples, so that `arith-long` is in distribution
FEW_SHOT_SHRINK = 4  # and has fewer rows, for its prompts are that much longer


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    response: list[int]  # ends with the stop token

    def sums(self, equals: int) -> list[int]:
        """Response positions of the results, each behind an equals sign."""
        return [position + 1 for position, token in enumerate(self.response) if token == equals]


def prompt_length(example: Example) -> int:
    return len(example.prompt)


def row_length(example: Example) -> int:
    return len(example.prompt) + len(example.response)


class Corpus:
    """An endless source of tokenised training examples in random phrasings."""

    def __init__(self, seed: int, max_steps: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = build_tokenizer(vocabulary_texts())
        self.stream = problems("train", seed=seed, max_steps=max_steps)
        (self.equals,) = self.encode(" =")
        self.waiting: dict[int, list[Example]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _turns(self, problem: ArithProblem) -> tuple[dict[str, str], dict[str, str]]:
        return (
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": problem.solution(self.rng)},
        )

    def example(self, shots: int) -> Example:
        """One problem behind `shots` worked examples."""
        messages: list[dict[str, str]] = []
        for _ in range(shots):
            messages += self._turns(next(self.stream))
        question, answer = self._turns(next(self.stream))
        text = str(self.tokenizer.apply_chat_template([*messages, question], tokenize=False))
        return Example(self.encode(text), [*self.encode(answer["content"]), self.tokenizer.eos_token_id])

    def groups(self, step: int, count: int, size: int, length: Callable[[Example], int]) -> list[list[Example]]:
        """`count` micro-batches of `size` examples, each of one `length`, so that attention needs no padding.

        Examples of other lengths wait for their turn: over time the stream is unbiased.
        """
        if step % FEW_SHOT_EVERY == 0:
            return [
                [self.example(self.rng.randint(1, 5)) for _ in range(size // FEW_SHOT_SHRINK)] for _ in range(count)
            ]
        groups: list[list[Example]] = []
        while len(groups) < count:
            example = self.example(0)
            bucket = self.waiting.setdefault(length(example), [])
            bucket.append(example)
            if len(bucket) == size:
                groups.append(self.waiting.pop(length(example)))
        return groups

    def fact(self) -> list[int]:
        """One step without its story, such as ` Adding 7 gives 12 + 7 = 19`; ends in the sum."""
        problem = next(self.stream)
        before = [problem.start, *problem.totals]
        step = self.rng.randrange(len(problem.steps))
        operation, n = problem.steps[step]
        words = {"name": problem.name, "items": problem.items, "a": before[step], "n": n, "b": ""}
        sentence = self.rng.choice(STEPS[operation]).format(**words)
        return self.encode(sentence[: sentence.index("=") + 1] + f" {before[step + 1]}")


def causal_loss(model: Transformer, rows: list[list[int]], first: list[int], device: str) -> Tensor:
    """Mean next-token cross-entropy over each row's tokens from position `first` on."""
    ids = torch.tensor([token for row in rows for token in row], device=device)
    ragged = Ragged.build([len(row) for row in rows], pattern=BlockCausal(1), device=device)
    predicted = (ragged.positions >= torch.tensor(first, device=device)[ragged.rows]).nonzero()[:, 0]
    hidden = model(ids, ragged)
    return F.cross_entropy(model.logits(hidden[predicted - 1]).float(), ids[predicted])


def masked_losses(model: Transformer, family: Family, ids: Tensor, masked: Tensor, ragged: Ragged) -> Tensor:
    """Cross-entropy of every masked token, [number of masked tokens]; no row may be masked at its start."""
    assert family.mask_token_id is not None
    hidden = model(ids.masked_fill(masked, family.mask_token_id), ragged)
    rows = masked.nonzero()[:, 0] - int(family.logit_shift)
    return F.cross_entropy(model.logits(hidden[rows]).float(), ids[masked], reduction="none")


def fact_loss(model: Transformer, family: Family, facts: list[list[int]], device: str) -> Tensor:
    """Mean cross-entropy of the last token of each fact, the sum, alone masked."""
    ids = torch.tensor([token for fact in facts for token in fact], device=device)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[torch.tensor([len(fact) for fact in facts], device=device).cumsum(0) - 1] = True
    return masked_losses(model, family, ids, masked, Ragged.build([len(fact) for fact in facts], device=device)).mean()


def diffusion_loss(
    model: Transformer, family: Family, examples: list[Example], canvas: int, equals: int, stage: str, device: str
) -> Tensor:
    """Masked cross-entropy of each example under two masks.

    The first mask is i.i.d. with a ratio p ~ U(0, 1). In stage `sft` the second is its complement, and LLaDA's
    objective is used: each token's loss over ratio x canvas length, averaged over rows (both views are draws of
    it: p and 1 - p are equally distributed). In stage `adapt` the second is a `targeted_mask`, and the loss is the
    mean over masked tokens plus the mean over the targets.
    """
    half = len(examples)
    clean = [[*e.prompt, *e.response, *[family.eos_token_id] * (canvas - len(e.response))] for e in examples] * 2
    tokens = torch.tensor([token for row in clean for token in row], device=device)
    ragged = Ragged.build([len(row) for row in clean], device=device)
    # Stratified over the batch: the same uniform marginal with less variance.
    t = (torch.arange(half) + torch.rand(half)) / half
    ratio = (1 - EPSILON) * t[torch.randperm(half)] + EPSILON
    drawn = torch.rand(half, canvas) < ratio[:, None]
    targeted = [targeted_mask(example, canvas, equals) for example in examples]
    second = torch.stack([mask for mask, _ in targeted]) if stage == "adapt" else ~drawn
    masks = torch.cat((drawn, second))  # [2 * half, canvas]
    prompts = torch.tensor([len(e.prompt) for e in examples] * 2, device=device)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[ragged.positions >= prompts[ragged.rows]] = masks.flatten().to(device)
    losses = masked_losses(model, family, tokens, masked, ragged)
    if stage == "adapt":
        order = masks.flatten().cumsum(0).view_as(masks) - 1  # of each masked position among the losses
        targets = order[half:].gather(1, torch.tensor([[target] for _, target in targeted]))[:, 0]
        return losses.mean() + losses[targets.to(device)].mean()
    ratios = torch.cat((ratio, (1 - ratio).clamp(min=EPSILON))).to(device)
    return (losses / (ratios[ragged.rows[masked]] * canvas)).sum() / len(clean)


def targeted_mask(example: Example, canvas: int, equals: int) -> tuple[Tensor, int]:
    """A mask [canvas] and one masked response position that it leaves predictable.

    I.i.d. masks seldom hide a sum and show both its operands, so that arithmetic comes far behind the text around
    it. Half of these masks hide everything from a position on, as decoding from left to right does (any position,
    or a sum: sums alone would teach that what is masked first is a sum); the other half are i.i.d. but for one
    sum, hidden, and what stands before it in its equation, shown.
    """
    total = random.choice(example.sums(equals))
    if random.random() < 0.5:
        target = total if random.random() < 0.5 else random.randrange(len(example.response))
        return torch.arange(canvas) >= target, target
    mask = torch.rand(canvas) < random.random()
    mask[total - OPERANDS : total] = False
    mask[total] = True
    return mask, total


def learning_rate(step: int, total: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then cosine to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def run_stage(model: Transformer, family: Family, stage: str, args: argparse.Namespace, finished: Path) -> None:
    """Train one stage, resuming from its last checkpoint; a finished stage leaves the file `finished`."""
    partial = finished.with_stem(f"{finished.stem}-partial")
    if finished.exists():
        model.load_state_dict(torch.load(finished, weights_only=True))
        return
    total, peak = getattr(args, f"{stage}_steps"), getattr(args, f"{stage}_lr")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    begin = 0
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    torch.manual_seed(args.seed + begin)
    # A resumed stage draws new examples: the stream is endless, no problem needs to be seen twice.
    easy = Corpus(args.seed + begin + 1, max_steps=1)
    corpus = Corpus(args.seed + begin, max_steps=3)
    started, losses = time.monotonic(), []
    for step in range(begin, total):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, peak)
        source = easy if stage == "causal" and step < total // 8 else corpus
        optimizer.zero_grad(set_to_none=True)
        step_loss = 0.0
        # A causal row is prompt and response, a diffusion row prompt and canvas.
        length = row_length if stage == "causal" else prompt_length
        micro_batches = source.groups(step, args.accumulate, args.batch, length)
        for examples in micro_batches:
            with torch.autocast(args.device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                facts = [corpus.fact() for _ in range(args.facts)]
                if stage == "causal":
                    rows = [[*e.prompt, *e.response] for e in examples]
                    loss = causal_loss(model, rows, [len(e.prompt) for e in examples], args.device)
                    loss = loss + FACT_WEIGHT * causal_loss(model, facts, [1] * len(facts), args.device)
                else:
                    loss = diffusion_loss(model, family, examples, args.canvas, corpus.equals, stage, args.device)
                    loss = loss + FACT_WEIGHT * fact_loss(model, family, facts, args.device)
            (loss / args.accumulate).backward()
            step_loss += loss.item() / args.accumulate
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(step_loss)
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1 - begin)
            recent = sum(losses[-50:]) / len(losses[-50:])
            line = {
                "stage": stage,
                "step": step + 1,
                "of": total,
                "loss": round(recent, 4),
                "s_per_step": round(pace, 3),
            }
            print(json.dumps({**line, "eta_min": round(pace * (total - step - 1) / 60, 1)}), flush=True)
        if (step + 1) % args.checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_atomically(state, partial)
    save_atomically(model.state_dict(), finished)
    partial.unlink(missing_ok=True)


def save_atomically(state: object, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--families", nargs="+", choices=CONFIGS, default=["llada"], help="diffusion models to train")
    parser.add_argument("--start", help="a causal checkpoint to adapt, such as tiny-ar, in place of stage `causal`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, default=384)
    parser.add_argument("--canvas", type=int, default=64, help="response positions, end-of-text padding included")
    parser.add_argument("--batch", type=int, default=16, help="problems a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--facts", type=int, default=32, help="bare sums a micro-batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=200)
    for stage, steps, lr in (("causal", 3000, 3e-3), ("adapt", 5000, 2e-3), ("sft", 0, 5e-4)):
        parser.add_argument(f"--{stage}-steps", type=int, default=steps)
        parser.add_argument(f"--{stage}-lr", type=float, default=lr)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocabulary_texts())
    torch.manual_seed(args.seed)
    if args.start:
        causal, _ = load_model(args.start, device=args.device)
    else:
        shape, family = read_family(llama_config(args, tokenizer), {})
        causal = initial_model(shape).to(args.device)
        if args.causal_steps:
            run_stage(causal, family, "causal", args, args.output / "causal.pt")
            export(causal, family, tokenizer, args.output / "tiny-ar")
    for name in args.families:
        shape, family = read_family(CONFIGS[name](args, tokenizer), GENERATION)
        model = group_queries(causal, shape).to(args.device)
        for stage in ("adapt", "sft"):
            if getattr(args, f"{stage}_steps"):
                run_stage(model, family, stage, args, args.output / f"{name}-{stage}.pt")
        export(model, family, tokenizer, args.output / f"tiny-{name}")


def initial_model(shape: ModelConfig) -> Transformer:
    """Random weights: normal, and narrower where a layer adds to the residual stream."""
    model = Transformer(shape)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.num_layers) if residual else 0.02)
    return model


def llada_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The published LLaDA fields (LLaDA-8B's config.json) at this size."""
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": args.hidden_size,
        "n_heads": args.num_heads,
        "n_kv_heads": args.num_heads,
        "n_layers": args.num_layers,
        "mlp_hidden_size": args.intermediate_size,
        "vocab_size": len(tokenizer),
        "embedding_size": len(tokenizer),
        "max_sequence_length": CONTEXT,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 10000.0,
        "rope_full_precision": True,
        "weight_tying": False,
        **dict.fromkeys(("include_bias", "include_qkv_bias", "bias_for_layer_norm", "alibi", "flash_attention"), False),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def llama_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The same network as a causal model in transformers' Llama layout."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_attention_heads": args.num_heads,
        "num_key_value_heads": args.num_heads,
        "num_hidden_layers": args.num_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def dream_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The published Dream fields (Dream-7B's config.json) at this size, with two query heads a key-value head."""
    return {
        **llama_config(args, tokenizer),
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "num_key_value_heads": args.num_heads // 2,
        "mask_token_id": tokenizer.mask_token_id,
    }


CONFIGS = {"llada": llada_config, "dream": dream_config}


def export(model: Transformer, family: Family, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint in bfloat16, as the published ones are."""
    save_model(copy.deepcopy(model).to("cpu", torch.bfloat16), family, folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
