"""A dense float32 transformer for one sequence, position by position over stored keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d3llm_ray.models import Transformer

Rule = Callable[[int, int], bool]  # (query position, key position) -> may attend
Rows = dict[int, Tensor]  # absolute position -> raw logits [vocab_size], before any shift


def everything(query: int, key: int) -> bool:
    """Full bidirectional attention."""
    return True


class Store:
    """Keys (after rotation) and values by layer and absolute position, each [kv heads, head dim]."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[dict[int, Tensor]] = [{} for _ in range(num_layers)]
        self.values: list[dict[int, Tensor]] = [{} for _ in range(num_layers)]


class Network:
    """Evaluates the parameters of a `Transformer`; none of its forward code is used."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.weights: dict[str, Tensor] = {name: weight.detach().float() for name, weight in model.state_dict().items()}

    def store(self) -> Store:
        return Store(self.config.num_layers)

    def forward(self, ids: Sequence[int], start: int, end: int, store: Store, allowed: Rule = everything) -> Rows:
        """Compute positions [start, end) of `ids` and return their raw logits.

        The window's keys replace those in `store`; then each query attends to every stored position that
        `allowed` lets it see.
        """
        positions = list(range(start, end))
        x = self.weights["embed_tokens.weight"][torch.tensor(ids[start:end])]
        for layer in range(self.config.num_layers):
            x = x + self._attention(layer, self._norm(x, f"layers.{layer}.input_layernorm"), positions, store, allowed)
            x = x + self._mlp(layer, self._norm(x, f"layers.{layer}.post_attention_layernorm"))
        x = self._norm(x, "norm")
        head = "embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        logits = x @ self.weights[head].T
        return dict(zip(positions, logits, strict=True))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = x.pow(2).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config.rms_norm_eps) * self.weights[f"{name}.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _rotate(self, x: Tensor, positions: list[int]) -> Tensor:
        """Half-split rotary embedding of `x` [W, heads, head dim]."""
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half).float() / half)
        angles = torch.tensor(positions).float()[:, None, None] * frequencies  # [W, 1, half]
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            (
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
            ),
            dim=-1,
        )

    def _attention(self, layer: int, x: Tensor, positions: list[int], store: Store, allowed: Rule) -> Tensor:
        prefix, config = f"layers.{layer}.self_attn", self.config
        width, size = len(positions), config.head_dim
        queries = self._rotate(self._linear(x, f"{prefix}.q_proj").view(width, config.num_heads, size), positions)
        keys = self._rotate(self._linear(x, f"{prefix}.k_proj").view(width, config.num_kv_heads, size), positions)
        values = self._linear(x, f"{prefix}.v_proj").view(width, config.num_kv_heads, size)
        for row, position in enumerate(positions):
            store.keys[layer][position] = keys[row]
            store.values[layer][position] = values[row]
        seen = sorted(store.keys[layer])
        all_keys = torch.stack([store.keys[layer][key] for key in seen])  # [S, kv heads, head dim]
        all_values = torch.stack([store.values[layer][key] for key in seen])
        visible = torch.tensor([[allowed(query, key) for key in seen] for query in positions])  # [W, S]
        group = config.num_heads // config.num_kv_heads
        heads = []
        for head in range(config.num_heads):
            scores = queries[:, head] @ all_keys[:, head // group].T / math.sqrt(size)  # [W, S]
            scores = scores.masked_fill(~visible, -math.inf)
            weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            heads.append(weights @ all_values[:, head // group])
        return self._linear(torch.cat(heads, dim=-1), f"{prefix}.o_proj")

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        prefix = f"layers.{layer}.mlp"
        gate = self._linear(x, f"{prefix}.gate_proj")
        return self._linear(gate * torch.sigmoid(gate) * self._linear(x, f"{prefix}.up_proj"), f"{prefix}.down_proj")
