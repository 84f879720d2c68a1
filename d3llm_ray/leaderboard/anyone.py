"""The verb `aup`: anyone's points scored, with published tables beside them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from d3llm_ray.config import Settings
from d3llm_ray.evaluation.aup import ALPHA, OFFSET
from d3llm_ray.leaderboard.board import Board, score_tables
from d3llm_ray.leaderboard.points import open_points
from d3llm_ray.leaderboard.write import write_board
from d3llm_ray.output_folder import claim, sole_writer


class AupSettings(Settings):
    """Score points of accuracy and tokens per forward: `d3llm-ray aup FILE.yaml`."""

    verb: ClassVar[str] = "aup"
    positional: ClassVar[tuple[str, ...]] = ("points",)

    points: list[str] = Field(
        ["llada", "dream", "dream-coder"],
        min_length=1,
        description="points files (.yaml), or the published tables by their names: llada, dream, dream-coder",
    )
    alpha: float = Field(ALPHA, ge=0, allow_inf_nan=False, description="how fast accuracy below the best is discounted")
    offset: float = Field(
        OFFSET,
        ge=0,
        allow_inf_nan=False,
        description="points of accuracy that a method may lose before it counts no more",
    )
    output: Path = Field(Path("runs/aup"), description="folder of the report")


@sole_writer
def run(settings: AupSettings) -> Board:
    """Score every table by itself and write `report.md`, `report.json`, points and pictures to `settings.output`.

    Raises `InputError` for a file that is no points file (see `open_points`), before anything is written.
    """
    board = score_tables([open_points(name) for name in settings.points], settings.alpha, settings.offset)
    claim(settings.output, "aup.yaml", settings)
    write_board(board, settings.output)
    return board
