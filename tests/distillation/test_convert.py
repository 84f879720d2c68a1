"""Grouped-query attention from multi-head weights: pooling by hand, and where it changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from d3llm_ray.distillation.convert import group_queries, mean_pool_heads
from d3llm_ray.errors import InputError
from d3llm_ray.models import ModelConfig, Ragged, Transformer

SHAPE = ModelConfig(37, 16, 2, 4, 4, 24, 64, 1e4, 1e-5, qkv_bias=False, tie_word_embeddings=False)
GROUPED = dataclasses.replace(SHAPE, num_kv_heads=2, qkv_bias=True)


def test_mean_pooling_by_hand() -> None:
    """Four heads of two features over one input: (1, 2), (3, 4) | (5, 6), (7, 10)."""
    weight = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0], [10.0]])
    assert mean_pool_heads(weight, 2, 2).tolist() == [[2.0], [3.0], [6.0], [8.0]]
    assert mean_pool_heads(weight, 1, 2).tolist() == [[4.0], [5.5]]
    assert mean_pool_heads(weight[:, 0], 4, 2).tolist() == weight[:, 0].tolist()


def _model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def test_grouping_equal_heads_changes_nothing() -> None:
    """Where the heads of a group are the same, so is their mean: the grouped model computes the same function."""
    model, ids = _model(), torch.arange(9)
    for layer in model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = projection.weight.data.view(4, 4, 16)
            heads[1], heads[3] = heads[0], heads[2]
    grouped = group_queries(model, GROUPED)
    assert grouped.layers[0].self_attn.k_proj.weight.shape == (8, 16)
    torch.testing.assert_close(grouped(ids, Ragged.build([9])), model(ids, Ragged.build([9])), atol=1e-5, rtol=1e-5)


def test_other_shapes_are_refused() -> None:
    model = _model()
    with pytest.raises(InputError, match="num_layers=3"):
        group_queries(model, dataclasses.replace(SHAPE, num_layers=3))
    with pytest.raises(InputError, match="num_kv_heads: got 4; accepted: a divisor of 2"):
        group_queries(group_queries(model, GROUPED), dataclasses.replace(GROUPED, num_kv_heads=4))
    with pytest.raises(InputError, match="qkv_bias"):
        group_queries(group_queries(model, GROUPED), dataclasses.replace(GROUPED, qkv_bias=False))
