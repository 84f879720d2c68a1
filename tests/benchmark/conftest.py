"""A shape small enough for a CPU."""

from __future__ import annotations

import pytest

from d3llm_ray.benchmark.shapes import SHAPES

SMALL = {
    **SHAPES["llada-8b"],
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_hidden_size": 64,
    "embedding_size": 128,
    "max_sequence_length": 256,
    "mask_token_id": 126,
    "eos_token_id": 127,
}


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a shape with LLaDA's layout: 2 layers, hidden size 32."""
    monkeypatch.setitem(SHAPES, "small", SMALL)
    return "small"
