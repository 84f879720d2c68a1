"""The student: a teacher's checkpoint prepared for training, and written out again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint

from d3llm_ray.distillation.convert import group_queries
from d3llm_ray.distillation.lora import add_lora, save_adapter, transformer_of
from d3llm_ray.distillation.objectives import OBJECTIVES, LossModule
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import (
    Family,
    ModelConfig,
    Transformer,
    copy_tokenizer,
    load_model,
    load_tokenizer,
    read_configs,
    save_model,
)
from d3llm_ray.models.families import FAST_DLLM_V2_MASK, Attention

if TYPE_CHECKING:
    from d3llm_ray.distillation.settings import DistillSettings

ADAPTER = "adapter"
KINDS: dict[Attention, str] = {
    "full": "a masked-diffusion model with full attention",
    "causal": "a causal model",
    "block-causal": "a block-diffusion model",
}


def student_family(settings: DistillSettings) -> tuple[ModelConfig, Family]:
    """Shape and conventions of the student, from the teacher's JSON files; `InputError` where the objective needs
    another kind of teacher."""
    shape, family = read_configs(settings.teacher)
    objective, attention = settings.objective, family.layout.attention
    kinds = " or ".join(KINDS[kind] for kind in objective.teacher_attention)
    others = [name for name, other in OBJECTIVES.items() if attention in other.teacher_attention]
    accepted = f"{kinds}, or objective: {', '.join(others)}"
    require(attention in objective.teacher_attention, "teacher", settings.teacher, accepted)
    return objective.student(shape, family, partial(_mask_token_id, settings, shape, family))


def _mask_token_id(settings: DistillSettings, shape: ModelConfig, family: Family) -> int:
    tokenizer = load_tokenizer(settings.teacher, family)
    known = getattr(tokenizer, "mask_token_id", None)
    mask = FAST_DLLM_V2_MASK if known is None else int(known)
    if mask >= shape.vocab_size:
        raise InputError(f"teacher: {settings.teacher!r} has no mask token; accepted: a tokenizer with a mask_token")
    return mask


def build_student(settings: DistillSettings, device: torch.device) -> tuple[LossModule, Family]:
    """Load the teacher's weights, adapt them to the objective, and put adapters and the loss on them."""
    shape, family = student_family(settings)
    model, _ = load_model(settings.teacher, "bfloat16" if settings.precision == "bfloat16" else "float32", device)
    model = group_queries(model, shape)
    if settings.lora_rank == 0:
        # As published: no gradient reaches the padding token's row of the embedding.
        model.embed_tokens.padding_idx = family.config.get("pad_token_id")
    if settings.activation_checkpointing:
        recompute_layers(model)
    model.train()
    module = LossModule(
        with_adapters(model, settings),
        settings.objective,
        head_rows=settings.head_rows,
        autocast=settings.precision == "mixed",
    )
    return module, family


def recompute_layers(model: Transformer) -> None:
    """Keep only the layers' inputs for the backward pass, which computes the rest again (arXiv:1604.06174)."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def with_adapters(model: Transformer, settings: DistillSettings) -> Transformer | PeftModel:
    """`model` with LoRA adapters, or itself when every weight is trained."""
    if settings.lora_rank == 0:
        return model
    return add_lora(
        model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=settings.lora_targets,
    )


def write_student(model: torch.nn.Module, family: Family, settings: DistillSettings, directory: Path) -> None:
    """Write the checkpoint in the family's layout, the peft adapter, or both; training can go on."""
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel) and settings.save_adapter:
        save_adapter(model, directory / ADAPTER)
    if settings.merge:
        save_model(merged(model), family, directory)
        copy_tokenizer(settings.teacher, directory)


@torch.no_grad()
def merged(model: torch.nn.Module) -> Transformer:
    """A copy of the transformer in CPU memory, each adapter added to the weight it adapts."""
    transformer = transformer_of(model)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in transformer.named_parameters():
        if "lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = parameter.detach().to("cpu", copy=True)
    for name, layer in transformer.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in layer.active_adapters:
                weights[f"{name}.weight"] += layer.get_delta_weight(adapter).to("cpu")  # type: ignore[attr-defined]  # of every kind of layer
    with torch.device("meta"):
        copy = Transformer(transformer.config)
    copy.load_state_dict(weights, strict=False, assign=True)
    if copy.config.tie_word_embeddings:
        copy.lm_head.weight = copy.embed_tokens.weight
    return copy
