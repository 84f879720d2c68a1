"""Objectives: how a student is shown a sample, and what its predictions are graded on. Needs torch and numpy only.

A new objective is a file here and an entry in `OBJECTIVES`: its parameters are settings, its facts are asked for.
"""

from d3llm_ray.distillation.objectives.base import Batch, LossModule, Moment, Objective
from d3llm_ray.distillation.objectives.block_diffusion import BlockDiffusion
from d3llm_ray.distillation.objectives.discrete_forcing import DiscreteForcing
from d3llm_ray.distillation.objectives.pseudo_trajectory import PseudoTrajectory

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (PseudoTrajectory, DiscreteForcing, BlockDiffusion)
}

__all__ = [
    "OBJECTIVES",
    "Batch",
    "BlockDiffusion",
    "DiscreteForcing",
    "LossModule",
    "Moment",
    "Objective",
    "PseudoTrajectory",
]
