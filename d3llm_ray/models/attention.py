"""Attention backends: PyTorch's everywhere, flash-attn where it is installed on CUDA.

Both take packed queries [T, heads, head dim] and a flat key store [positions, kv heads, head dim], and return
[T, heads, head dim]; `Ragged` says which keys are whose.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d3llm_ray.errors import InputError, unknown
from d3llm_ray.models.ragged import Ragged

logger = logging.getLogger("d3llm_ray.models")

Attend = Callable[[Tensor, Tensor, Tensor, Ragged], Tensor]
BACKENDS = ("auto", "sdpa", "flash-attn")


def sdpa_attention(q: Tensor, keys: Tensor, values: Tensor, ragged: Ragged) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` over a padded rectangle; any pattern, any device."""
    mixed = F.scaled_dot_product_attention(
        ragged.to_rectangle(q).transpose(1, 2),
        ragged.key_rectangle(keys).transpose(1, 2),
        ragged.key_rectangle(values).transpose(1, 2),
        attn_mask=ragged.mask,
        enable_gqa=q.shape[1] != keys.shape[1],
    )  # [B, heads, W, head dim]
    return ragged.to_packed(mixed.transpose(1, 2))


def flash_attention(varlen: Callable[..., Any], q: Tensor, keys: Tensor, values: Tensor, ragged: Ragged) -> Tensor:
    """flash-attn's `flash_attn_varlen_func` with `causal=False`: no padding, no mask.

    Full attention in 16 bits only; rows with a block-causal pattern, and float32, go through PyTorch's.
    """
    if ragged.patterned or q.dtype not in (torch.float16, torch.bfloat16):
        return sdpa_attention(q, keys, values, ragged)
    layout = ragged.varlen
    packed_keys = keys[layout.read] if layout.read is not None else keys[layout.begin : layout.end]
    packed_values = values[layout.read] if layout.read is not None else values[layout.begin : layout.end]
    out: Tensor = varlen(
        q,
        packed_keys,
        packed_values,
        layout.query_offsets,
        layout.key_offsets,
        max(ragged.lengths),
        max(ragged.key_lengths),
        causal=False,
    )
    return out


def choose_attention(name: str, device: torch.device) -> Attend:
    """The backend `name`, or with "auto" flash-attn on CUDA where it is installed and PyTorch's elsewhere; logged.

    Raises `InputError` for an unknown name, or for flash-attn where it cannot run.
    """
    if name not in BACKENDS:
        raise unknown("attention", name, BACKENDS)
    possible = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if name == "flash-attn" and not possible:
        raise InputError(
            f"attention: flash-attn is not installed or the device is {device.type}; accepted: auto, sdpa, or a CUDA "
            "device with the flash-attn package"
        )
    if name == "sdpa" or not possible:
        logger.info("attention: PyTorch scaled_dot_product_attention on %s", device)
        return sdpa_attention
    from flash_attn import flash_attn_varlen_func

    logger.info("attention: flash-attn varlen on %s", device)
    return partial(flash_attention, flash_attn_varlen_func)
