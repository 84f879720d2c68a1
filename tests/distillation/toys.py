"""Two-layer models of both logit conventions and ragged samples, for the objectives' tests."""

from __future__ import annotations

import torch

from d3llm_ray.distillation.objectives.batches import TrainingSample
from d3llm_ray.models import ModelConfig, Transformer
from d3llm_ray.models.families import Family, read_family

CANVAS = 8
_LLADA = {
    "model_type": "llada",
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 64,
    "vocab_size": 5,
    "max_sequence_length": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "mask_token_id": 4,
    "eos_token_id": 0,
}
_QWEN = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 5,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 0,
}
CONFIGS = {
    "llada": _LLADA,
    "dream": {**_QWEN, "model_type": "Dream", "mask_token_id": 4},
    "fast_dllm_v2": {**_QWEN, "model_type": "Fast_dLLM_Qwen", "mask_token_id": 4, "bd_size": 4},
    "qwen2": {**_QWEN, "model_type": "qwen2"},
    "llama": {**_QWEN, "model_type": "llama"},
}


def family_of(kind: str) -> tuple[ModelConfig, Family]:
    return read_family(CONFIGS[kind], {})


def toy(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Transformer, Family, list[TrainingSample]]:
    """A random model, its family, and two samples of different prompt lengths."""
    shape, family = family_of(kind)
    torch.manual_seed(0)
    model = Transformer(shape).to(dtype)
    draw = torch.Generator().manual_seed(1)
    samples = []
    for n, prompt in enumerate((5, 9)):  # ragged
        prompt_ids = torch.randint(1, 4, (prompt,), generator=draw).numpy().astype("int32")
        response = torch.randint(1, 4, (CANVAS,), generator=draw).numpy().astype("int32")
        order = torch.randperm(CANVAS, generator=draw).numpy().astype("uint16")
        samples.append(TrainingSample(str(n), prompt_ids, response, order))
    return model, family, samples
