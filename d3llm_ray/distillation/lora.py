"""LoRA adapters on a transformer's projections, by peft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from d3llm_ray.errors import unknown
from d3llm_ray.models.transformer import Transformer


def add_lora(model: Transformer, *, rank: int, alpha: int, dropout: float, targets: Sequence[str]) -> PeftModel:
    """Freeze `model` and put an adapter on every layer's `targets`, canonical names for every family.

    Raises `InputError` for a target that no layer has; the LM head is outside the layers and never adapted.
    """
    leaves = {name.rpartition(".")[2] for name, part in model.layers.named_modules() if isinstance(part, nn.Linear)}
    for target in targets:
        if target not in leaves:
            raise unknown("lora_targets", target, leaves)
    adapters = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    return get_peft_model(model, adapters)


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` reads."""
    model.save_pretrained(str(directory), save_embedding_layers=False)


def merge_lora(model: PeftModel) -> Transformer:
    """Add the adapters to the weights they adapt and return the bare transformer."""
    merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, Transformer)
    return merged
