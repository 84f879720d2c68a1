"""Settings of the verb `leaderboard`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from d3llm_ray.evaluation.settings import MeasureOptions


class LeaderboardSettings(MeasureOptions):
    """Measure systems, each with its own best settings, and rank them by AUP beside the published tables."""

    verb: ClassVar[str] = "leaderboard"

    systems: Path | None = Field(None, description="systems file (.yaml); null: the paper's systems on embedded models")
    tasks: list[str] = Field(
        ["arith", "arith-long"], min_length=1, description="embedded or published tasks, or task files"
    )
    count: int = Field(300, gt=0, description="test problems per task, which the figures are of")
    validation_count: int = Field(100, gt=0, description="validation problems per task, which settings are chosen on")
    published: list[str] = Field(
        ["llada", "dream", "dream-coder"],
        description="tables beside the measured one: published ones by name, points files (.yaml); []: none",
    )
    output: Path = Field(Path("runs/leaderboard"), description="folder of the report")
