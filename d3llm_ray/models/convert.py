"""Making a block-diffusion model out of a causal one, without touching what its weights compute."""

from __future__ import annotations

import torch
from torch import nn

from d3llm_ray.errors import require
from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.families import Family, JsonDict, read_family
from d3llm_ray.models.transformer import Transformer


def block_diffusion_family(family: Family, mask_token_id: int, block_size: int) -> tuple[ModelConfig, Family]:
    """The conventions of a causal (Qwen2 or Llama layout) checkpoint trained on as Fast-dLLM v2.

    arXiv:2509.26328: same names and shapes, `bd_size` and a mask token; Qwen2 has biases on its query, key and value
    projections, a Llama gets them as zeros. Raises `InputError` for a family that is not causal.
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


def with_qkv_bias(model: Transformer, shape: ModelConfig) -> Transformer:
    """`model` with the zero biases that `shape` asks for and it lacks; its weights are shared, not copied."""
    if model.config == shape:
        return model
    with torch.device("meta"):
        wider = Transformer(shape)
    wider.load_state_dict(model.state_dict(), strict=False, assign=True)
    if shape.tie_word_embeddings:
        wider.lm_head.weight = wider.embed_tokens.weight
    like = model.embed_tokens.weight
    for name, parameter in list(wider.named_parameters()):
        if parameter.is_meta:
            module, _, leaf = name.rpartition(".")
            zeros = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
            setattr(wider.get_submodule(module), leaf, nn.Parameter(zeros))
    return wider.train(model.training)
