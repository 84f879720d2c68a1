"""flash-attn against PyTorch's attention, both in bfloat16, with PyTorch's in float32 as the measure."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from d3llm_ray.benchmark.gpu_check_base import Figures, Part, Target, Unavailable, expect
from d3llm_ray.benchmark.shapes import SHAPES
from d3llm_ray.errors import InputError
from d3llm_ray.models import Ragged
from d3llm_ray.models.attention import choose_attention, sdpa_attention
from d3llm_ray.models.families import read_family

ROUNDING = 0.02  # of bfloat16, for values of about 1; below it nothing can be told apart
# Lengths, starts and keys of rows: one whole canvas, whole canvases, and windows into a cache.
LAYOUTS = (
    ((400,), (0,), (400,)),
    ((400, 150, 33), (0, 0, 0), (400, 150, 33)),
    ((32, 96, 1), (144, 200, 9), (400, 400, 10)),
)


def parts() -> Iterator[Part]:
    yield Part("flash-attn", "flash-attn against sdpa", 20.0, check_flash)


def check_flash(target: Target) -> Figures:
    """The heads of LLaDA (as many keys as queries) and Dream (7 queries a key); figures are the greatest errors."""
    try:
        flash = choose_attention("flash-attn", target.device)
    except InputError as error:
        raise Unavailable(
            "flash-attn is not installed (python -m pip install flash-attn), or this is no GPU"
        ) from error
    generator = torch.Generator(target.device).manual_seed(0)
    worst = {"flash_attn": 0.0, "sdpa": 0.0}
    for name in ("llada-8b", "dream-7b"):
        config = read_family(SHAPES[name], {})[0]
        for lengths, starts, keys in LAYOUTS:
            bases = None if not any(starts) else [0, 450, 900]
            ragged = Ragged.build(lengths, starts, keys, bases=bases, device=target.device)
            store = sum(lengths) if bases is None else 1400
            shapes = ((sum(lengths), config.num_heads), (store, config.num_kv_heads), (store, config.num_kv_heads))
            q, k, v = (
                torch.randn(*shape, config.head_dim, device=target.device, generator=generator).bfloat16()
                for shape in shapes
            )
            exact = sdpa_attention(q.float(), k.float(), v.float(), ragged)
            for kind, attend in (("flash_attn", flash), ("sdpa", sdpa_attention)):
                worst[kind] = max(worst[kind], float((attend(q, k, v, ragged).float() - exact).abs().max()))
    close = worst["flash_attn"] <= max(2 * worst["sdpa"], ROUNDING)
    return expect(close, "flash-attn is further from float32 than bfloat16's rounding", worst)
