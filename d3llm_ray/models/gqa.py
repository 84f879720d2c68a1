"""From multi-head to grouped-query attention: each key-value head becomes the mean of its group's.

Source: Ainslie et al. 2023, arXiv:2305.13245, section 2.1; the pooled model wants some further training.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from d3llm_ray.errors import require
from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.transformer import Transformer


def mean_pool_heads(tensor: Tensor, groups: int, head_dim: int) -> Tensor:
    """Means of neighbouring heads: [heads * head_dim, ...] -> [groups * head_dim, ...]."""
    return tensor.unflatten(0, (groups, -1, head_dim)).mean(1).flatten(0, 1)


def group_queries(model: Transformer, shape: ModelConfig) -> Transformer:
    """A copy of `model` with the key-value heads of `shape`, and zero biases where only `shape` has any.

    Raises `InputError` when the two differ in anything else, or the heads do not fall into groups.
    """
    have = model.config
    accepted = dataclasses.replace(have, num_kv_heads=shape.num_kv_heads, qkv_bias=shape.qkv_bias)
    require(shape == accepted, "shape", shape, f"{have} but for num_kv_heads and qkv_bias")
    require(
        have.num_kv_heads % shape.num_kv_heads == 0,
        "num_kv_heads",
        shape.num_kv_heads,
        f"a divisor of {have.num_kv_heads}",
    )
    require(shape.qkv_bias or not have.qkv_bias, "qkv_bias", shape.qkv_bias, "true, as the model has biases")
    weights = model.state_dict()
    grouped = Transformer(shape)
    with torch.no_grad():
        for name, parameter in grouped.named_parameters():
            if name not in weights:
                parameter.zero_()
            elif ".k_proj." in name or ".v_proj." in name:
                parameter.copy_(mean_pool_heads(weights[name], shape.num_kv_heads, shape.head_dim))
            else:
                parameter.copy_(weights[name])
    return grouped
