"""Train the embedded models: causal pretraining (`tiny-ar`), then diffusion from those weights (`tiny-llada`).

    python jobs/pretrain_tiny.py --output runs/pretrain          # resumes if interrupted
    python jobs/pretrain_tiny.py --families dream --start tiny-ar --accumulate 1 --adapt-steps 10400    # tiny-dream
    python jobs/pretrain_tiny.py --output runs/coder --tasks arith,code --start tiny-llada \
        --accumulate 1 --adapt-steps 4500 --adapt-lr 1e-3 --no-bf16    # tiny-coder

Stages: `causal` (next token, answers only, single facts mixed in), `adapt` (masked diffusion under a random and a
targeted mask, plain mean) and `sft` (LLaDA's SFT objective: i.i.d. masks at ratio p, every token loss over
p x answer length; arXiv:2502.09992 and its GUIDELINES.md; off by default, for at this size its weights, up to 1 / p,
cost accuracy: 200 steps of it took the shipped model from 91 to 83 %). The adaptation of causal weights follows
Dream (arXiv:2508.15487). `tiny-dream` keeps the causal shift, as Dream does, and has Dream's grouped-query attention
with biases: its key-value heads are pairs of the causal model's, averaged. `tiny-coder` goes on from `tiny-llada` with
more words in its vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from pretraining.corpus import TASKS, Corpus, prompt_length, row_length, vocabulary_texts
from pretraining.losses import causal_loss, diffusion_loss, fact_loss
from pretraining.shapes import CONFIGS, llama_config
from pretraining.vocabulary import with_vocabulary
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from d3llm_ray.distillation.convert import group_queries
from d3llm_ray.models import Family, ModelConfig, Transformer, load_model, load_tokenizer, save_model
from d3llm_ray.models.families import read_family
from d3llm_ray.report import check_output
from d3llm_ray.tasks.tokenizer import build_tokenizer

GENERATION = {"block_size": 16}  # four blocks in a canvas of 64
FACT_WEIGHT = 0.5


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
    easy = Corpus(args.seed + begin + 1, max_steps=1, tasks=args.tasks)
    corpus = Corpus(args.seed + begin, max_steps=3, tasks=args.tasks)
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
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16), sdpa_kernel(SDPBackend.MATH):
                facts = [corpus.fact() for _ in range(args.facts)]
                if stage == "causal":
                    rows = [[*e.prompt, *e.response] for e in examples]
                    loss = causal_loss(model, rows, [len(e.prompt) for e in examples], args.device)
                    loss = loss + FACT_WEIGHT * causal_loss(model, facts, [1] * len(facts), args.device)
                else:
                    loss = diffusion_loss(model, family, examples, args.canvas, stage, args.device)
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
    parser.add_argument(
        "--tasks", type=read_tasks, default=["arith"], help="arith, or arith,code for both in equal parts"
    )
    parser.add_argument("--start", help="a checkpoint to go on from, such as tiny-ar, in place of stage `causal`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mixed precision; a CPU without bfloat16 instructions is ten times as fast without",
    )
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
    check_output(args.output, "output", folder=True).mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocabulary_texts(args.tasks))
    torch.manual_seed(args.seed)
    if args.start:
        causal, started_as = load_model(args.start, device=args.device)
        if known := load_tokenizer(args.start, started_as):
            causal = with_vocabulary(causal, known, tokenizer)
    else:
        shape, family = read_family(llama_config(args, tokenizer), {})
        causal = initial_model(shape).to(args.device)
        if args.causal_steps:
            run_stage(causal, family, "causal", args, args.output / "causal.pt")
            export(causal, family, tokenizer, args.output / model_name("ar", args.tasks))
    for name in args.families:
        shape, family = read_family(CONFIGS[name](args, tokenizer), GENERATION)
        model = group_queries(causal, shape).to(args.device)
        for stage in ("adapt", "sft"):
            if getattr(args, f"{stage}_steps"):
                run_stage(model, family, stage, args, args.output / f"{name}-{stage}.pt")
        export(model, family, tokenizer, args.output / model_name(name, args.tasks))


def read_tasks(text: str) -> list[str]:
    tasks = text.split(",")
    if tasks[0] != "arith" or len(set(tasks)) < len(tasks) or not set(tasks) <= set(TASKS):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: arith, then any of {', '.join(list(TASKS)[1:])}")
    return tasks


def model_name(family: str, tasks: list[str]) -> str:
    """`tiny-llada` and kin; where programs are among the tasks `tiny-coder`, with its family unless that is LLaDA."""
    if tasks == ["arith"]:
        return f"tiny-{family}"
    return "tiny-coder" if family == "llada" else f"tiny-coder-{family}"


def initial_model(shape: ModelConfig) -> Transformer:
    """Random weights: normal, and narrower where a layer adds to the residual stream."""
    model = Transformer(shape)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.num_layers) if residual else 0.02)
    return model


def export(model: Transformer, family: Family, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint in bfloat16, as the published ones are."""
    save_model(copy.deepcopy(model).to("cpu", torch.bfloat16), family, folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
