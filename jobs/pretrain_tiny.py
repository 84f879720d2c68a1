"""Train the embedded models: causal pretraining (`tiny-ar`), then diffusion from those weights (`tiny-llada`).

    python jobs/pretrain_tiny.py --output runs/pretrain          # resumes if interrupted

Stages: `causal` (next token, answers only, single facts mixed in), `adapt` (masked diffusion, complementary
masks, plain mean) and `sft` (LLaDA's SFT objective: i.i.d. masks at ratio p, every token loss over
p x answer length; arXiv:2502.09992 and its GUIDELINES.md). The adaptation of causal weights follows Dream.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.ragged import BlockCausal, Ragged
from d3llm_ray.models.transformer import Transformer
from d3llm_ray.tasks.arith import STEPS, ArithProblem, problems, vocabulary_texts
from d3llm_ray.tasks.tokenizer import build_tokenizer

EPSILON = 1e-3  # smallest mask ratio of LLaDA's objective
FEW_SHOT_EVERY = 20  # one batch in so many carries worked examples, so that `arith-long` is in distribution
FEW_SHOT_SHRINK = 4  # and has fewer rows, for its prompts are that much longer


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    response: list[int]  # ends with the stop token


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
        text = self.tokenizer.apply_chat_template([*messages, question], tokenize=False)
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
        """A bare sum such as ` 12 + 7 = 19`: the arithmetic without the story."""
        problem = next(self.stream)
        (operation, n), before, after = problem.steps[0], problem.start, problem.totals[0]
        return self.encode(STEPS[operation][0].format(a=before, n=n, b=after))


def causal_loss(model: Transformer, examples: list[Example], facts: list[list[int]], device: str) -> Tensor:
    """Mean next-token cross-entropy over response tokens (and whole facts)."""
    rows = [(len(e.prompt), [*e.prompt, *e.response]) for e in examples] + [(1, fact) for fact in facts]
    ids = torch.tensor([token for _, row in rows for token in row], device=device)
    ragged = Ragged.build([len(row) for _, row in rows], pattern=BlockCausal(1), device=device)
    first = torch.tensor([start for start, _ in rows], device=device)[ragged.rows]
    predicted = (ragged.positions >= first).nonzero()[:, 0]
    hidden = model(ids, ragged)
    return F.cross_entropy(model.logits(hidden[predicted - 1]).float(), ids[predicted])


def diffusion_loss(
    model: Transformer,
    examples: list[Example],
    canvas: int,
    mask_id: int,
    eos_id: int,
    inverse_ratio: bool,
    device: str,
) -> Tensor:
    """Masked cross-entropy of each example under a random mask and under its complement.

    Both views are draws of the same objective (their ratios p and 1 - p are equally distributed).
    `inverse_ratio` divides each token's loss by ratio x canvas length and averages over rows; otherwise the
    mean is over masked tokens.
    """
    clean = [[*e.prompt, *e.response, *[eos_id] * (canvas - len(e.response))] for e in examples] * 2
    ids = torch.tensor([token for row in clean for token in row], device=device)
    ragged = Ragged.build([len(row) for row in clean], device=device)
    half = len(examples)
    # Stratified over the batch: the same uniform marginal with less variance.
    t = (torch.arange(half) + torch.rand(half)) / half
    ratio = (1 - EPSILON) * t[torch.randperm(half)] + EPSILON
    drawn = torch.rand(half, canvas) < ratio[:, None]
    masks = torch.cat((drawn, ~drawn))  # [2 * half, canvas]
    ratios = torch.cat((ratio, (1 - ratio).clamp(min=EPSILON)))
    in_response = ragged.positions >= torch.tensor([len(e.prompt) for e in examples] * 2, device=device)[ragged.rows]
    masked = torch.zeros_like(in_response)
    masked[in_response] = masks.flatten().to(device)
    chosen = masked.nonzero()[:, 0]
    hidden = model(torch.where(masked, torch.full_like(ids, mask_id), ids), ragged)
    losses = F.cross_entropy(model.logits(hidden[chosen]).float(), ids[chosen], reduction="none")
    if not inverse_ratio:
        return losses.mean()
    weights = 1.0 / (ratios.to(device)[ragged.rows[chosen]] * canvas)
    return (losses * weights).sum() / len(clean)


def learning_rate(step: int, total: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then cosine to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def run_stage(model: Transformer, stage: str, args: argparse.Namespace, output: Path) -> None:
    """Train one stage, resuming from its last checkpoint; a finished stage leaves `<stage>.pt`."""
    finished, partial = output / f"{stage}.pt", output / f"{stage}-partial.pt"
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
    tokenizer = corpus.tokenizer
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
                if stage == "causal":
                    loss = causal_loss(model, examples, [corpus.fact() for _ in examples], args.device)
                else:
                    ids = (tokenizer.mask_token_id, tokenizer.eos_token_id)
                    loss = diffusion_loss(model, examples, args.canvas, *ids, stage == "sft", args.device)
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, default=384)
    parser.add_argument("--canvas", type=int, default=64, help="response positions, end-of-text padding included")
    parser.add_argument("--batch", type=int, default=16, help="problems a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=200)
    for stage, steps, lr in (("causal", 3000, 3e-3), ("adapt", 6000, 2e-3), ("sft", 800, 5e-4)):
        parser.add_argument(f"--{stage}-steps", type=int, default=steps)
        parser.add_argument(f"--{stage}-lr", type=float, default=lr)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocabulary_texts())
    torch.manual_seed(args.seed)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        num_kv_heads=args.num_heads,
        intermediate_size=args.intermediate_size,
        max_position_embeddings=512,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        tie_word_embeddings=False,
    )
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = (
                0.02 / math.sqrt(2 * config.num_layers)
                if name.endswith(("o_proj.weight", "down_proj.weight"))
                else 0.02
            )
            torch.nn.init.normal_(parameter, std=scale)
    model.to(args.device)
    for stage in ("causal", "adapt", "sft"):
        run_stage(model, stage, args, args.output)


if __name__ == "__main__":
    main()
