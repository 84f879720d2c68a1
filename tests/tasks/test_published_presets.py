"""The shipped settings of the published evaluation against algorithms.md 9.9, copied by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.config import parse
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.tasks import PUBLISHED

OFF = 10_000  # iterations between refreshes: never
# model and benchmark: task, problems, then d3LLM with its cache (threshold, delay, refresh, temperature), without
# (threshold, early stop, temperature), and dParallel's threshold.
MATRIX: dict[str, tuple[str, int, tuple[float, int, int, float], tuple[float, bool, float], float]] = {
    "llada-gsm8k": ("gsm8k-raw", 1319, (0.5, 2, 3, 0.0), (0.5, True, 0.0), 0.5),
    "llada-math": ("math500-raw", 500, (0.5, 1, OFF, 0.0), (0.5, True, 0.0), 0.5),
    "llada-humaneval": ("humaneval", 164, (0.5, 2, 4, 0.0), (0.5, False, 0.0), 0.5),
    "llada-mbpp": ("mbpp", 500, (0.4, 1, OFF, 0.0), (0.4, True, 0.0), 0.45),
    "llada-long-gsm8k": ("long-gsm8k-raw", 1319, (0.4, 2, OFF, 0.0), (0.4, True, 0.0), 0.5),
    "dream-gsm8k": ("gsm8k", 1319, (0.4, 1, OFF, 0.0), (0.4, False, 0.0), 0.45),
    "dream-math": ("math500", 500, (0.4, 2, OFF, 0.0), (0.4, False, 0.0), 0.45),
    "dream-humaneval": ("humaneval-instruct", 164, (0.5, 2, OFF, 0.1), (0.5, True, 0.1), 0.5),
    "dream-mbpp": ("mbpp-instruct", 500, (0.45, 2, OFF, 0.0), (0.4, False, 0.0), 0.5),
    "dream-long-gsm8k": ("long-gsm8k", 1319, (0.45, 1, OFF, 0.0), (0.4, False, 0.1), 0.45),
}
LLADA = ["gsm8k-raw", "math500-raw", "humaneval", "mbpp", "long-gsm8k-raw"]
DREAM = ["gsm8k", "math500", "humaneval-instruct", "mbpp-instruct", "long-gsm8k"]
# Baselines and the coder: tasks, problems, tokens, temperature, top_p, decoder, its settings.
OTHERS: dict[str, tuple[list[str], int, int, float, float, str, dict[str, Any]]] = {
    "llada-vanilla": (LLADA, 1319, 256, 0.0, 1.0, "vanilla", {"block_size": 32}),
    "dream-vanilla": (DREAM, 1319, 256, 0.1, 0.9, "vanilla", {"remasking": "entropy"}),
    "llada-fast-dllm-dual": (
        LLADA, 1319, 256, 0.0, 1.0, "fast-dllm-dual", {"block_size": 32, "confidence_threshold": 0.9}
    ),
    "dream-fast-dllm-dual": (
        DREAM, 1319, 256, 0.0, 1.0, "fast-dllm-dual", {"block_size": 32, "confidence_threshold": 0.9}
    ),
}  # fmt: skip
D2F: dict[str, tuple[str, int, int, float]] = {
    "llada-gsm8k-d2f": ("gsm8k-1shot", 1319, 256, 0.7),
    "llada-math-d2f": ("math500-raw", 500, 512, 0.1),
    "llada-humaneval-d2f": ("humaneval-raw", 164, 256, 0.1),
    "llada-mbpp-d2f": ("mbpp-raw", 500, 256, 0.9),
    "llada-long-gsm8k-d2f": ("long-gsm8k-raw", 1319, 256, 0.7),
}
CODER = {"coder-humaneval": ("humaneval-evalplus", 164), "coder-mbpp": ("mbpp-evalplus", 500)}


def table() -> dict[str, tuple[list[str], int, int, float, float, str, dict[str, Any]]]:
    """Every row of the matrix as a preset spells it."""
    rows = dict(OTHERS)
    for name, (task, count, cached, plain, dparallel) in MATRIX.items():
        whole = name == "llada-humaneval"  # the next block begins when the last one is done
        blocks = {"block_add_threshold": 1.0 if whole else 0.1, "decoded_token_threshold": 1.0 if whole else 0.95}
        threshold, delay, refresh, temperature = cached
        settings = {"block_size": 32, "entropy_threshold": threshold, **blocks, "early_stop": True}
        settings |= {"cache_delay": delay, "refresh_interval": refresh}
        rows[name] = ([task], count, 256, temperature, 1.0, "d3llm", settings)
        threshold, early_stop, temperature = plain
        settings = {"block_size": 32, "entropy_threshold": threshold, **blocks, "early_stop": early_stop}
        rows[f"{name}-nocache"] = ([task], count, 256, temperature, 1.0, "d3llm-nocache", settings)
        settings = {"block_size": 32, "entropy_threshold": dparallel}
        rows[f"{name}-dparallel"] = ([task], count, 256, 0.0, 1.0, "dparallel", settings)
    for name, (task, count, tokens, add) in D2F.items():
        settings = {"block_size": 32, "confidence_threshold": 0.9, "decoded_token_threshold": 0.95}
        rows[name] = ([task], count, tokens, 0.0, 1.0, "d2f", settings | {"block_add_threshold": add})
    for name, (task, count) in CODER.items():
        settings = {"block_size": 32, "entropy_threshold": 0.5, "early_stop": True, "cache_delay": 32}
        settings |= {"block_add_threshold": 0.1, "decoded_token_threshold": 0.95, "refresh_interval": OFF}
        rows[name] = ([task], count, 512, 0.0, 1.0, "d3llm", settings)
    return rows


def test_every_row_has_a_preset_and_every_preset_a_row() -> None:
    assert EvaluateSettings.recipes is not None
    assert {file.stem for file in EvaluateSettings.recipes.iterdir()} == set(table())


@pytest.mark.parametrize("name", table())
def test_a_preset_says_what_was_published(name: str, tmp_path: Path) -> None:
    words = ["--config", name, "--models", "a-model", "--data-dir", str(tmp_path)]
    settings, _ = parse(EvaluateSettings, words)
    tasks, count, tokens, temperature, top_p, decoder, decoder_settings = table()[name]
    assert (settings.tasks, settings.count, settings.max_tokens) == (tasks, count, tokens)
    assert (settings.temperature, settings.top_p) == (temperature, top_p)
    assert (settings.decoders, settings.decoder_settings) == ([decoder], decoder_settings)
    assert (settings.models, settings.data_dir, settings.max_batch_size) == (["a-model"], tmp_path, 1)
    assert set(tasks) <= set(PUBLISHED) and settings.split == "test" and not settings.sweep
