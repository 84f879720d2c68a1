"""Trajectory datasets with a rule that a student can learn, written without the package's own writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d3llm_ray.trajectories.schema import SCHEMA

# A run of two workers on such rows that learns the rule within a minute.
SMALL_RUN = {
    "epochs": 100,
    "batch_size": 8,
    "micro_batch_size": 4,
    "lr": 1e-2,
    "lora_rank": 8,
    "lora_alpha": 16,
    "precision": "float32",
    "zero_stage": 2,
    "checkpoint_every": 20,
}


def write_rows(
    folder: Path, *, rows: int, canvas: int, vocab_size: int, mask_token_id: int, repeat_first: bool = False
) -> Path:
    """Write `rows` rows: a prompt of 4 to 11 tokens, of which the last one, plus its place, says every response token.

    Only tokens other than the mask occur, except with `mask_token_id=-1`, when every id up to `vocab_size` does.
    """
    rng = np.random.default_rng(0)
    tokens = np.array([token for token in range(1, vocab_size) if token != mask_token_id])
    lines = []
    for n in range(rows):
        prompt = rng.choice(tokens, rng.integers(4, 12))
        response = tokens[(prompt[-1] + np.arange(canvas)) % len(tokens)]
        block = 16
        reveal = np.concatenate(
            [first + rng.permutation(min(block, canvas - first)) for first in range(0, canvas, block)]
        )
        lines.append(
            {
                "prompt_id": f"{0 if repeat_first else n:016x}",
                "prompt": None,
                "prompt_ids": prompt.tolist(),
                "response_ids": response.tolist(),
                "reveal_step": reveal.tolist(),
                "reveal_entropy": None,
                "is_correct": (True, False, None)[n % 3],
                "forwards": canvas,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), folder / "part-0.parquet")
    (folder / "_SUCCESS").touch()
    return folder
