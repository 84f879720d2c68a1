"""Small models and conventions for the tests of the references, and networks that watch or forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from d3llm_ray.models import ModelConfig, Transformer

from .answer import Answer, Conventions
from .network import Network, Rows, Rule, Store, everything

LLADA_LIKE = Conventions(mask_id=36, eos_id=1, stop_ids=(1,), shift=False, dream_rules=False, vocabulary=35)
DREAM_LIKE = Conventions(mask_id=36, eos_id=1, stop_ids=(1,), shift=True, dream_rules=True, vocabulary=35)
NEVER_STOPS = replace(DREAM_LIKE, stop_ids=())
CAUSAL = Conventions(mask_id=None, eos_id=1, stop_ids=(1,), shift=True, dream_rules=False, vocabulary=37)


def random_model(kv_heads: int = 2, bias: bool = True, seed: int = 0) -> Transformer:
    """Two layers, hidden size 32, 37 ids; peaked logits."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(37, 32, 2, 4, kv_heads, 48, 128, 1e4, 1e-5, bias, False)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


class Recomputing(Network):
    """Forgets every key and computes each window's whole past from the present ids."""

    def forward(self, ids: Sequence[int], start: int, end: int, store: Store, allowed: Rule = everything) -> Rows:
        return super().forward(ids, 0, end, self.store(), allowed)


class Recording(Network):
    """Notes the windows it is asked for."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        self.windows: list[tuple[int, int]] = []

    def forward(self, ids: Sequence[int], start: int, end: int, store: Store, allowed: Rule = everything) -> Rows:
        self.windows.append((start, end))
        return super().forward(ids, start, end, store, allowed)


def reveals_per_forward(answer: Answer) -> list[int]:
    return [answer.reveal_steps.count(step) for step in range(answer.forwards)]
