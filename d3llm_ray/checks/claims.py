"""The checks: what is asked, what was published, and what is measured against what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Figure = Literal["tpf", "tps", "aup"]
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.9, 1.2, 2.0)


@dataclass(frozen=True)
class CheckedDecoder:
    """One decoder of a check, and what it is called in its report."""

    label: str
    decoder: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A question to the decoders. `variants`: the first is what the others are compared with.

    `gain`: what was published for the others over the first, in percent of `figure`; None where nobody has. The gains
    are those that the authors' README attributes to parts of d3LLM (arXiv:2601.07568).
    """

    question: str
    figure: Figure
    variants: tuple[CheckedDecoder, ...]
    model: str = "tiny-llada-d3llm"
    task: str = "arith"
    gain: float | None = None


CHECKS: dict[str, Check] = {
    "thresholds": Check(
        "How far does entropy-based multi-block decoding carry a model that was not distilled for it?",
        "aup",
        (
            CheckedDecoder("one token a forward", "vanilla"),
            *(CheckedDecoder(f"{each:g}", "d3llm-nocache", {"entropy_threshold": each}) for each in THRESHOLDS),
        ),
        model="tiny-llada",
    ),
    "blocks": Check(
        "What does working on several blocks at a time add to entropy-based decoding?",
        "tpf",
        (
            CheckedDecoder("one block at a time", "dparallel", {"early_stop": True}),
            CheckedDecoder("several blocks", "d3llm-nocache"),
        ),
        gain=30.0,
    ),
    "early-stop": Check(
        "What does ending at the first stop token add?",
        "tpf",
        (
            CheckedDecoder("the whole canvas", "d3llm", {"early_stop": False}),
            CheckedDecoder("to the first stop token", "d3llm"),
        ),
        gain=5.0,
    ),
    "cache": Check(
        "What does the cache with refresh add on long prompts?",
        "tps",
        (
            CheckedDecoder("no cache", "d3llm-nocache"),
            CheckedDecoder("cache, refreshed every 4 forwards", "d3llm", {"refresh_interval": 4}),
        ),
        task="arith-long",
        gain=35.0,
    ),
    "refresh": Check(
        "What does refreshing the cache cost, and save of accuracy, on long prompts?",
        "tps",
        (
            CheckedDecoder("cache, never refreshed", "d3llm"),
            CheckedDecoder("cache, refreshed every 4 forwards", "d3llm", {"refresh_interval": 4}),
        ),
        task="arith-long",
    ),
}
