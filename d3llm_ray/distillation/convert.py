"""Making diffusion models out of causal ones: other conventions, grouped heads, biases."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from d3llm_ray.errors import require
from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.families import Family, JsonDict, read_family
from d3llm_ray.models.transformer import Transformer


def block_diffusion_family(family: Family, mask_token_id: int, block_size: int) -> tuple[ModelConfig, Family]:
    """The conventions of a causal (Qwen2 or Llama layout) checkpoint trained on as Fast-dLLM v2.

    arXiv:2509.26328: same names and shapes, `bd_size` and a mask token; Qwen2 has biases on its query, key and value
    projections, a Llama gets them (see `group_queries`). Raises `InputError` for a family that is not causal.
    """
    require(family.layout.attention == "causal", "teacher", family.name, "a causal model (Qwen2 or Llama layout)")
    config: JsonDict = {
        **family.config,
        "model_type": "Fast_dLLM_Qwen",
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "bd_size": block_size,
        "mask_token_id": mask_token_id,
    }
    generation = {name: value for name, value in family.generation_config.items() if name != "block_size"}
    return read_family(config, generation)


def group_queries(model: Transformer, shape: ModelConfig) -> Transformer:
    """`model` with the key-value heads of `shape`, and zero biases where only `shape` has any.

    Heads of a group become their mean (Ainslie et al., arXiv:2305.13245). Weights that stay are shared, not copied.
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
    if shape == have:
        return model
    weights = dict(model.named_parameters())
    like = model.embed_tokens.weight
    with torch.device("meta"):
        grouped = Transformer(shape)
    for name, parameter in list(grouped.named_parameters()):
        if name not in weights:
            tensor = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
        elif parameter.shape != weights[name].shape:
            tensor = mean_pool_heads(weights[name].detach(), shape.num_kv_heads, shape.head_dim)
        else:
            tensor = weights[name].detach()
        module, _, leaf = name.rpartition(".")
        setattr(grouped.get_submodule(module), leaf, nn.Parameter(tensor))
    if shape.tie_word_embeddings:
        grouped.lm_head.weight = grouped.embed_tokens.weight
    return grouped.train(model.training)


def mean_pool_heads(tensor: Tensor, groups: int, head_dim: int) -> Tensor:
    """Means of neighbouring heads: [heads * head_dim, ...] -> [groups * head_dim, ...]."""
    heads = tensor.view(groups, -1, head_dim, *tensor.shape[1:])
    return heads.mean(1).flatten(0, 1)
