"""Trajectories of the embedded task, written without the package's own writer, and settings for the random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from d3llm_ray.ablation.settings import AblateSettings
from d3llm_ray.config import build
from d3llm_ray.tasks import load_task
from d3llm_ray.trajectories.schema import SCHEMA

ROWS, WRONG, CANVAS = 40, 4, 64


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """40 rows of the task's first training prompts, of which every tenth is wrong: "#### " and the reference."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    rng, lines = np.random.default_rng(0), []
    for number, problem in enumerate(load_task("arith").problems("train", ROWS)):
        prompt = tokenizer.apply_chat_template(problem.messages, tokenize=False, add_generation_prompt=True)
        answer = tokenizer(f"\n#### {problem.reference}", add_special_tokens=False)["input_ids"]
        lines.append(
            {
                "prompt_id": f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}",
                "messages": problem.messages,
                "prompt_ids": tokenizer(prompt, add_special_tokens=False)["input_ids"],
                "response_ids": answer + [tokenizer.eos_token_id] * (CANVAS - len(answer)),
                "reveal_step": rng.permutation(CANVAS).tolist(),
                "reference": problem.reference,
                "answer": problem.reference,
                "is_correct": number % (ROWS // WRONG) != 0,
                "forwards": CANVAS,
            }
        )
    folder = tmp_path_factory.mktemp("rows")
    pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), folder / "trajectories-00000.parquet")
    (folder / "_SUCCESS").touch()
    return folder


@pytest.fixture
def make_settings(tiny_checkpoint: Path, rows: Path, tmp_path: Path) -> Callable[..., AblateSettings]:
    """`make_settings(**values) -> AblateSettings`: two seeds, two steps each, three problems."""

    def make(**values: Any) -> AblateSettings:
        defaults = {
            "teacher": str(tiny_checkpoint),
            "trajectories": str(rows),
            "distill": {"epochs": 1, "batch_size": 16, "micro_batch_size": 8, "lora_rank": 4, "precision": "float32"},
            "seeds": 2,
            "count": 3,
            "max_tokens": 16,
            "thresholds": (0.15, 0.45),
            "output": tmp_path / "ablation",
        }
        return build(AblateSettings, defaults | values)

    return make
