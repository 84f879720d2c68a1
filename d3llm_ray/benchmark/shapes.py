"""Published shapes with random weights: the speed of a large model without its checkpoint.

Sources: `config.json` of GSAI-ML/LLaDA-8B-Instruct, Dream-org/Dream-v0-Instruct-7B and Qwen/Qwen2.5-7B-Instruct.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from d3llm_ray.models import ModelConfig, Transformer

_QWEN_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

SHAPES: dict[str, dict[str, Any]] = {  # as config.json has them
    "llada-8b": {
        "model_type": "llada",
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "mlp_hidden_size": 12288,
        "embedding_size": 126464,
        "max_sequence_length": 4096,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
    },
    "dream-7b": {
        **_QWEN_7B,
        "model_type": "Dream",
        "max_position_embeddings": 131072,
        "mask_token_id": 151666,
        "eos_token_id": 151643,
    },
    "qwen2.5-7b": {**_QWEN_7B, "model_type": "qwen2", "max_position_embeddings": 32768, "eos_token_id": 151645},
}

INIT_STD = 0.02


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Transformer:
    """A model with normally distributed weights, made where and as they stay: no float32 or host copy exists."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=INIT_STD, generator=generator)
    return model.eval().requires_grad_(False)
