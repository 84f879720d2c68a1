"""Objectives: how a student is shown a sample, and what its predictions are graded on. Needs torch and numpy only."""

from d3llm_ray.distillation.objectives.base import Batch, LossModule, Objective, Scheduled
from d3llm_ray.distillation.objectives.block_diffusion import BlockDiffusion
from d3llm_ray.distillation.objectives.forcing import DiscreteForcing
from d3llm_ray.distillation.objectives.windows import LossWeights, MaskedWindows

__all__ = [
    "Batch",
    "BlockDiffusion",
    "DiscreteForcing",
    "LossModule",
    "LossWeights",
    "MaskedWindows",
    "Objective",
    "Scheduled",
]
