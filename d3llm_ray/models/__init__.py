"""One transformer for all families, checkpoints in their published layouts, and the embedded tiny models."""

from d3llm_ray.models.chat import encode_chat, load_tokenizer
from d3llm_ray.models.checkpoint import (
    ZOO_NAMES,
    copy_tokenizer,
    fingerprint,
    load_model,
    read_configs,
    resolve_model,
    save_model,
)
from d3llm_ray.models.config import ModelConfig, Work
from d3llm_ray.models.families import Family
from d3llm_ray.models.kv_cache import KVCache
from d3llm_ray.models.ragged import BlockCausal, Ragged
from d3llm_ray.models.transformer import Transformer

__all__ = [
    "ZOO_NAMES",
    "BlockCausal",
    "Family",
    "KVCache",
    "ModelConfig",
    "Ragged",
    "Transformer",
    "Work",
    "copy_tokenizer",
    "encode_chat",
    "fingerprint",
    "load_model",
    "load_tokenizer",
    "read_configs",
    "resolve_model",
    "save_model",
]
