"""The shape of a transformer, independent of any checkpoint layout."""

from __future__ import annotations

from dataclasses import dataclass

from d3llm_ray.errors import require


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one checkpoint (LLaDA paper arXiv:2502.09992; Dream arXiv:2508.15487).

    Sizes are in units (features, heads, layers, tokens). `mask_token_id` is None for a causal model.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    qkv_bias: bool
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, field, value, "a positive whole number")
        require(self.hidden_size % self.num_heads == 0, "hidden_size", self.hidden_size, "a multiple of num_heads")
        require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", self.num_kv_heads, "a divisor of num_heads")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary pairs)")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
