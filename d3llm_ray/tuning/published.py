"""Settings that published evaluations chose task by task: where a search begins, beside the preset's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def _cached(entropy_threshold: float, cache_delay: int, refresh_interval: int, **more: float) -> dict[str, Any]:
    settings = {"entropy_threshold": entropy_threshold, "cache_delay": cache_delay}
    return {**settings, "refresh_interval": refresh_interval, **more}


# Family -> preset -> the rows of the evaluation scripts of d3LLM (arXiv:2601.07568), dParallel (arXiv:2509.26488) and
# D2F (arXiv:2508.09192), each row once.
PUBLISHED: dict[str, dict[str, list[dict[str, Any]]]] = {
    "llada": {
        "d3llm": [
            _cached(0.5, 2, 3),  # GSM8K
            _cached(0.5, 1, 10000),  # MATH
            _cached(0.5, 2, 4, block_add_threshold=1.0, decoded_token_threshold=1.0),  # HumanEval
            _cached(0.4, 1, 10000),  # MBPP
            _cached(0.4, 2, 10000),  # long GSM8K
        ],
        "d3llm-nocache": [{"entropy_threshold": 0.5}, {"entropy_threshold": 0.4}],
        "dparallel": [{"entropy_threshold": 0.5}, {"entropy_threshold": 0.45}],
        "d2f": [
            {"block_size": 64, "block_add_threshold": 0.7},  # GSM8K
            {"block_size": 32, "block_add_threshold": 0.9},  # MBPP
            {"block_size": 32, "block_add_threshold": 0.1},  # MATH, HumanEval
        ],
    },
    "dream": {
        "d3llm": [
            _cached(0.4, 1, 10000),  # GSM8K
            _cached(0.4, 2, 10000),  # MATH
            _cached(0.5, 2, 10000),  # HumanEval
            _cached(0.45, 2, 10000),  # MBPP
            _cached(0.45, 1, 10000),  # long GSM8K
            _cached(0.5, 32, 10000),  # Dream-Coder: HumanEval, MBPP
        ],
        "d3llm-nocache": [{"entropy_threshold": 0.4}, {"entropy_threshold": 0.5}],
        "dparallel": [{"entropy_threshold": 0.45}, {"entropy_threshold": 0.5}],
    },
}


def published_settings(family: str, decoder: str) -> Iterator[dict[str, Any]]:
    """The published settings of a preset for models of a family; none where nobody has published any."""
    yield from PUBLISHED.get(family, {}).get(decoder, [])
