"""One worker's work around the loop, without Ray."""

from __future__ import annotations

from pathlib import Path

import torch

from d3llm_ray.distillation.training import checkpoints
from d3llm_ray.distillation.training.engines import EngineOptions, torch_engine
from d3llm_ray.distillation.training.job import save


def test_a_checkpoint_that_was_passed_over_does_not_displace_an_intact_one(tmp_path: Path) -> None:
    """A run resumed behind step 20 because steps 40 and 60 were damaged, and left step 80 half written."""
    options = EngineOptions(weight_decay=0.0, betas=(0.9, 0.999), clip=1.0, micro_batch_size=1, accumulation=1)
    engine = torch_engine(torch.nn.Linear(2, 2), options)
    save(engine, tmp_path, 20, keep=2)
    for left in ("step-000040", "step-000060", "step-000080.partial"):
        (tmp_path / left).mkdir()
    save(engine, tmp_path, 40, keep=2)
    newest, warnings = checkpoints.newest(tmp_path)
    assert newest == tmp_path / "step-000040" and len(warnings) == 1
    assert (tmp_path / "step-000020").is_dir()
    save(engine, tmp_path, 60, keep=2)
    assert checkpoints.newest(tmp_path) == (tmp_path / "step-000060", [])
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names) == ["step-000040", "step-000060", "step-000080.partial"]
