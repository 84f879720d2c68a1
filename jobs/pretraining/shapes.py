"""`config.json` of the embedded models: the published fields of each family, at a size for two CPU cores."""

from __future__ import annotations

import argparse
from typing import Any

from transformers import PreTrainedTokenizerFast

CONTEXT = 512  # positions: five worked examples, a question and the canvas fit


def llada_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The published LLaDA fields (LLaDA-8B's config.json) at this size."""
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": args.hidden_size,
        "n_heads": args.num_heads,
        "n_kv_heads": args.num_heads,
        "n_layers": args.num_layers,
        "mlp_hidden_size": args.intermediate_size,
        "vocab_size": len(tokenizer),
        "embedding_size": len(tokenizer),
        "max_sequence_length": CONTEXT,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 10000.0,
        "rope_full_precision": True,
        "weight_tying": False,
        **dict.fromkeys(("include_bias", "include_qkv_bias", "bias_for_layer_norm", "alibi", "flash_attention"), False),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def llama_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The same network as a causal model in transformers' Llama layout."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_attention_heads": args.num_heads,
        "num_key_value_heads": args.num_heads,
        "num_hidden_layers": args.num_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def dream_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The published Dream fields (Dream-7B's config.json) at this size, with two query heads a key-value head."""
    return {
        **llama_config(args, tokenizer),
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "num_key_value_heads": args.num_heads // 2,
        "mask_token_id": tokenizer.mask_token_id,
    }


CONFIGS = {"llada": llada_config, "dream": dream_config}
