"""The shape of a transformer, independent of any checkpoint layout, and what a forward of it costs."""

from __future__ import annotations

from dataclasses import dataclass

from d3llm_ray.errors import require


@dataclass(frozen=True)
class Work:
    """What one forward computes, summed over its sequences, in however many model calls it is run."""

    tokens: int  # positions computed
    attended: int  # query-key pairs: window length x key length
    keys: int  # key positions read
    scored: int  # rows of the LM head's output

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.attended + other.attended,
            self.keys + other.keys,
            self.scored + other.scored,
        )


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

    @property
    def kv_size(self) -> int:
        """Features of a position's keys, and of its values, in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by their names in `Transformer`."""
        h, k, m = self.hidden_size, self.kv_size, self.intermediate_size
        attention = {"q_proj": (h, h), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (h, h)}
        return {**attention, "gate_proj": (h, m), "up_proj": (h, m), "down_proj": (m, h)}

    @property
    def widest(self) -> int:
        """Features of a token's widest activation."""
        return max(map(max, self.projections.values()))

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices; its norms and biases, below a thousandth of them, are left out."""
        return sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def body_parameters(self) -> int:
        """Weights of all layers' matrices."""
        return self.num_layers * self.layer_parameters

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Numbers in the whole model: matrices, biases, norms, embeddings and LM head."""
        small = 2 * self.hidden_size + self.qkv_bias * (self.hidden_size + 2 * self.kv_size)
        tables = 1 if self.tie_word_embeddings else 2
        return self.body_parameters + self.num_layers * small + self.hidden_size + tables * self.head_parameters

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes that one position takes in a cache, keys and values of all layers, in numbers of `itemsize` bytes."""
        return 2 * self.num_layers * self.kv_size * itemsize

    def attention_flops(self, work: Work) -> int:
        """Operations of the two products of attention; masked query-key pairs count like others."""
        return 4 * self.num_layers * self.hidden_size * work.attended

    def matrix_flops(self, work: Work) -> int:
        """Operations of the layers' matrices. The last layer counts for every position, though only scored rows need
        all of it."""
        return 2 * self.body_parameters * work.tokens

    def head_flops(self, work: Work) -> int:
        """Operations of the LM head, on the scored rows."""
        return 2 * self.head_parameters * work.scored

    def flops(self, work: Work) -> int:
        """Floating-point operations of a forward: matrices, LM head on the scored rows, attention."""
        return self.matrix_flops(work) + self.head_flops(work) + self.attention_flops(work)

    def traffic(self, work: Work, itemsize: int) -> int:
        """Bytes of a forward: all weights once, keys and values once, logits written once and read once."""
        weights = (self.body_parameters + self.head_parameters) * itemsize
        logits = 2 * work.scored * self.vocab_size * itemsize
        return weights + work.keys * self.kv_bytes(itemsize) + logits
