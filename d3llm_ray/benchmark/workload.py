"""From a plan to requests: model, prompts and decoders, all checked before any weight is read or made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from d3llm_ray.benchmark.machine import check_machine
from d3llm_ray.benchmark.plan import BenchmarkPlan
from d3llm_ray.benchmark.shapes import SHAPES, random_model
from d3llm_ray.decoding import Decoder, Request, decoder, override_known
from d3llm_ray.decoding.presets import default_decoder
from d3llm_ray.device import check_device
from d3llm_ray.errors import InputError, require, unknown
from d3llm_ray.models import Family, ModelConfig, Transformer, encode_chat, load_model, load_tokenizer, read_configs
from d3llm_ray.models.families import read_family
from d3llm_ray.tasks import load_task

DEFAULT_MODEL = "tiny-llada"
DEFAULT_TASK = "arith"


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    decoder: Decoder
    batch_size: int
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """What is decoded: the same prompts in every cell."""

    plan: BenchmarkPlan
    model_name: str
    task_name: str
    config: ModelConfig
    family: Family
    vocabulary_size: int
    prompts: list[list[int]]
    cells: list[Cell]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.plan.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.device)

    def load(self) -> Transformer:
        """The weights: a shape's are made on the device, a model's are read."""
        if self.plan.shape is not None:
            return random_model(self.config, self.dtype, self.device, self.plan.seed)
        return load_model(self.plan.model or DEFAULT_MODEL, self.plan.dtype, self.device)[0]

    @property
    def kv_positions(self) -> int:
        """Cache positions with which a full batch never waits for memory.

        Twice what the batch can hold: n spans leave at most n + 1 gaps, so that one is long enough for another span.
        """
        context = self.config.max_position_embeddings
        lengths = (
            request.positions(cell.decoder, self.family, context)
            for cell in self.cells
            for request in self.requests(cell)
        )
        return 2 * max(self.plan.batch_sizes) * max(lengths)

    def requests(self, cell: Cell) -> list[Request]:
        """One request a prompt."""
        ignore = self.plan.full_length
        return [
            Request(ids, cell.max_tokens, seed=self.plan.seed, decoder=cell.decoder, ignore_eos=ignore)
            for ids in self.prompts
        ]


def prepare(plan: BenchmarkPlan) -> Workload:
    """Resolve every name of the plan.

    Raises:
        InputError: an unknown model, shape, task, decoder, setting, machine or device; too few or too long prompts.
    """
    check_machine(plan.machine)
    check_device(plan.device)
    label, config, family = read_shape(plan.model, plan.shape)
    tokenizer = load_tokenizer(plan.model or DEFAULT_MODEL, family) if plan.shape is None else None
    vocabulary = config.vocab_size if tokenizer is None else min(len(tokenizer), config.vocab_size)
    if plan.prompt_tokens is not None:
        drawn = synthetic_prompts(family, vocabulary, plan.count, plan.prompt_tokens, plan.seed)
        task, prompts = "synthetic", drawn
    else:
        task, prompts = task_prompts(plan, tokenizer)
    longest, canvas = max(map(len, prompts)), max(plan.max_tokens)
    room = config.max_position_embeddings - longest
    require(canvas <= room, "max_tokens", canvas, f"at most {room} behind prompts of {longest} tokens")
    cells = [
        Cell(chosen, batch_size, max_tokens)
        for chosen in choose_decoders(plan, family)
        for max_tokens in plan.max_tokens
        for batch_size in plan.batch_sizes
    ]
    return Workload(plan, label, task, config, family, vocabulary, prompts, cells)


def read_shape(model: str | None, shape: str | None) -> tuple[str, ModelConfig, Family]:
    """(name, config, family) of a published shape, or of a model where none is named.

    Raises:
        InputError: an unknown shape or model.
    """
    if shape is None:
        return Path(model or DEFAULT_MODEL).name, *read_configs(model or DEFAULT_MODEL)
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    return shape, *read_family(SHAPES[shape], {})


def synthetic_prompts(family: Family, vocabulary: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Random ordinary tokens; those with a meaning for decoding are left out."""
    special = [family.mask_token_id, family.eos_token_id, family.pad_token_id, *family.stop_token_ids]
    ordinary = np.setdiff1d(np.arange(vocabulary), [token for token in special if token is not None])
    prompts: list[list[int]] = np.random.default_rng(seed).choice(ordinary, (count, length)).tolist()
    return prompts


def task_prompts(plan: BenchmarkPlan, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, list[list[int]]]:
    """(name, encoded prompts) of the first test problems."""
    task = load_task(plan.task or DEFAULT_TASK)
    problems = task.problems("test", plan.count)
    require(len(problems) == plan.count, "count", plan.count, f"at most the task's {len(problems)} problems")
    if tokenizer is None:
        raise InputError("task: this checkpoint has no tokenizer; accepted: synthetic prompts of prompt_tokens tokens")
    return task.name, [encode_chat(tokenizer, problem.messages) for problem in problems]


def choose_decoders(plan: BenchmarkPlan, family: Family) -> list[Decoder]:
    """Every decoder in every suffix mode; a decoder that lacks a setting of the plan goes without it."""
    presets = [decoder(name) for name in plan.decoders or (default_decoder(family),)]
    for preset in presets:
        preset.check(family)
    bases = override_known(presets, plan.decoder_settings)
    with_suffix = not plan.suffixes or any("suffix" in base.settings() for base in bases)
    require(with_suffix, "suffixes", plan.suffixes, "none, as no decoder of the list has suffix modes")
    chosen = []
    for base in bases:
        modes = [{"suffix": suffix} for suffix in plan.suffixes] if "suffix" in base.settings() else []
        chosen += [base.override(**mode) for mode in modes or [{}]]
    if plan.scripted_tpf is None or family.layout.attention == "causal":  # one token a forward already
        return chosen
    return [variant.scripted(plan.scripted_tpf) for variant in chosen]
