"""One transformer for every family: RMSNorm, rotary, grouped-query attention, SwiGLU.

Module names are Llama's; a family's checkpoint names are mapped onto them (`families.py`), so that LoRA
targets and recipes read the same for every family.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3llm_ray.models.attention import Attend, sdpa_attention
from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.kv_cache import KVCache
from d3llm_ray.models.ragged import Ragged


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 statistics and scaling, cast back, then the weight (LLaDA, Qwen2)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine, each [T, 1, head_dim] float32, for half-split ("rotate half") rotary embedding."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = (positions.float()[:, None] * (theta**-exponents))[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Apply rotary embedding in float32. `x`: [T, heads, head_dim]."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return torch.addcmul(wide * cos, torch.cat((second, first), dim=-1), signed_sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.attend: Attend = sdpa_attention
        size, kv_size, bias = config.hidden_size, config.num_kv_heads * config.head_dim, config.qkv_bias
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, kv_size, bias=bias)
        self.v_proj = nn.Linear(size, kv_size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], ragged: Ragged, cache: KVCache | None, rows: Tensor | None
    ) -> Tensor:
        # Queries and keys are rotated together: half as many small operations.
        heads = torch.cat((self.q_proj(x), self.k_proj(x)), dim=1).view(x.shape[0], -1, self.head_dim)
        q, k = torch.split(rotate(heads, *angles), [self.num_heads, self.num_kv_heads], dim=1)
        v = self.v_proj(x).view(-1, self.num_kv_heads, self.head_dim)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, ragged)
        mixed = self.attend(q, k, v, ragged).flatten(1)  # [T, hidden]
        out: Tensor = self.o_proj(mixed if rows is None else mixed.index_select(0, rows))
        return out


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        ragged: Ragged,
        cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(x), angles, ragged, cache, rows)
        x = (x if rows is None else x.index_select(0, rows)) + mixed
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Transformer(nn.Module):
    """The whole network, without any notion of diffusion: packed tokens in, hidden states out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, token_ids: Tensor, ragged: Ragged, cache: KVCache | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Packed `token_ids` [T] -> final hidden states [T, hidden_size], or only those of `rows` [N].

        Without a cache a row attends to its own window only, which must then start at position 0 of its sequence to
        be the whole of it; with one, to key positions [0, key_lengths[b]) of its span. With `rows`, the last layer
        computes keys and values for all tokens and the rest for those rows alone.
        """
        angles = rotary_angles(ragged.positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(token_ids)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x, angles, ragged, cache, rows if number == last else None)
        out: Tensor = self.norm(x)
        return out

    def use_attention(self, attend: Attend) -> None:
        """Choose the attention backend of every layer (`attention.py`)."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head on the given rows only: [N, hidden_size] -> [N, vocab_size]."""
        out: Tensor = self.lm_head(hidden)
        return out
