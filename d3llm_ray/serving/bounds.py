"""What a request may ask of its decoder: every number under `diffusion` has a largest value here.

A decoder takes any block size or number of steps; a server must not, as a canvas costs what its blocks make it.
"""

from __future__ import annotations

from typing import Any

from d3llm_ray.decoding import Decoder
from d3llm_ray.errors import require
from d3llm_ray.models import Family

LARGEST_NUMBER = 10_000  # thresholds, scales and temperatures; far above all that makes a difference
LONGEST_INTERVAL = 10_000  # forwards between refreshes; d3LLM's own default, which means never
_IN_TOKENS = ("block_size", "sub_block_size", "steps", "cache_delay")


def check_overrides(
    overrides: dict[str, Any], usual: Decoder, family: Family, max_tokens: int, max_tokens_limit: int
) -> None:
    """Raise `InputError` for a number that is larger than a request may ask for.

    `usual` is the server's decoder: what its operator has set is within bounds. `max_tokens` is the answer's length.
    Blocks, steps and delays may have as many tokens or forwards as the longest answer, in whole blocks of the
    model's own, and an answer's canvas one such block more. What is no number is left to the decoder's own check.
    """
    own = usual.settings()
    longest = _whole_blocks(usual, family, max_tokens, max_tokens_limit)
    for name, value in overrides.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        bound = largest(name, usual, family, max_tokens, max_tokens_limit)
        accepted = f"1 to {bound}" if name in (*_IN_TOKENS, "refresh_interval") else f"at most {bound}"
        require(value <= bound, name, value, accepted)
    size = overrides.get("block_size")
    if isinstance(size, int) and size > 0 and size != own.get("block_size"):
        canvas = -(-max_tokens // size) * size
        most = longest + usual.block_length(family, max_tokens)
        accepted = f"a size whose whole blocks around max_tokens {max_tokens} are at most {most} tokens"
        require(canvas <= most, "block_size", size, accepted)


def largest(name: str, usual: Decoder, family: Family, max_tokens: int, max_tokens_limit: int) -> int | float:
    """The largest number that a request may set `name` of its decoder to."""
    bound: int | float = LARGEST_NUMBER
    if name in _IN_TOKENS:
        bound = _whole_blocks(usual, family, max_tokens, max_tokens_limit)
    if name == "refresh_interval":
        bound = LONGEST_INTERVAL
    own = usual.settings().get(name)
    return max(bound, own) if isinstance(own, int | float) else bound


def _whole_blocks(usual: Decoder, family: Family, max_tokens: int, max_tokens_limit: int) -> int:
    """The longest answer's length in whole blocks."""
    block = usual.block_length(family, max_tokens)
    return -(-max_tokens_limit // block) * block
