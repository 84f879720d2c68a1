"""LoRA adapters on a transformer's projections, by peft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from d3llm_ray.errors import unknown
from d3llm_ray.models.transformer import Transformer


def add_lora(
    model: Transformer, *, rank: int, alpha: int, dropout: float, targets: Sequence[str] | None = None
) -> PeftModel:
    """Freeze `model` and put an adapter on every layer's `targets`, canonical names for every family; None: on all.

    Raises `InputError` for a target that no layer has; the LM head is outside the layers and never adapted.
    """
    projections = model.config.projections
    targets = tuple(projections) if targets is None else targets
    for target in targets:
        if target not in projections:
            raise unknown("lora_targets", target, projections)
    adapters = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    return get_peft_model(model, adapters)


@dataclass(frozen=True)
class Coverage:
    """What a run trains: in how many layers each projection, and how many parameters."""

    rank: int | None  # of the adapters; None when the weights themselves are trained
    alpha: int | None
    layers: int
    projections: dict[str, int]  # name to the number of layers in which it is trained, 0 included
    outside: tuple[str, ...]  # what is trained of the LM head and the embeddings
    trained: int  # parameters
    parameters: int  # all of them, adapters included

    def __str__(self) -> str:
        """One line; projections that no layer trains are named as such."""
        kind = "full fine-tuning" if self.rank is None else f"LoRA rank {self.rank}, alpha {self.alpha}"
        left_out = "frozen:" if self.rank is None else "NO adapter on"
        places = []
        for count in sorted(set(self.projections.values()), reverse=True):
            names = " ".join(name for name, layers in self.projections.items() if layers == count)
            places.append(f"{names} in {count} of {self.layers} layers" if count else f"{left_out} {names}")
        share = f"{self.trained / 1e6:.2f} M of {self.parameters / 1e6:.2f} M parameters trained"
        outside = f"{' and '.join(self.outside)} trained" if self.outside else "LM head and embeddings frozen"
        return f"{kind}: {', '.join(places)}; {share} ({self.trained / self.parameters:.1%}); {outside}"


def transformer_of(model: nn.Module) -> Transformer:
    """The transformer itself, adapters left in place: what the engine decodes with while training goes on."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, Transformer)
    return base


def coverage(model: Transformer | PeftModel) -> Coverage:
    """Read from the modules themselves what will be trained; call it before DeepSpeed splits their weights."""
    transformer = transformer_of(model)
    adapters = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    assert adapters is None or isinstance(adapters, LoraConfig)
    projections: Counter[str] = Counter()
    for layer in transformer.layers:
        for path, part in layer.named_modules():
            name = path.rpartition(".")[2]
            if name in transformer.config.projections:
                projections[name] += _is_trained(part)
    outside = {"LM head": transformer.lm_head, "embeddings": transformer.embed_tokens}
    return Coverage(
        rank=adapters.r if adapters else None,
        alpha=adapters.lora_alpha if adapters else None,
        layers=len(transformer.layers),
        projections=dict(projections),
        outside=tuple(name for name, part in outside.items() if _is_trained(part)),
        trained=sum(weight.numel() for weight in transformer.parameters() if weight.requires_grad),
        parameters=sum(weight.numel() for weight in transformer.parameters()),
    )


def _is_trained(part: nn.Module) -> bool:
    return any(weight.requires_grad for weight in part.parameters())


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` reads."""
    model.save_pretrained(str(directory), save_embedding_layers=False)
