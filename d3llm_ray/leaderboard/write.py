"""A board on disk: report, points of every table, pictures."""

from __future__ import annotations

import re
from pathlib import Path

from d3llm_ray.config import to_yaml
from d3llm_ray.leaderboard.board import Board
from d3llm_ray.report import can_plot, write_text


def write_board(board: Board, folder: Path) -> None:
    """Write `points/NAME.yaml` (each a file for `d3llm-ray aup`), pictures, `report.md` and, last, `report.json`."""
    (folder / "points").mkdir(exist_ok=True)
    names = _names([scored.table.title for scored in board.tables])
    for name, scored in zip(names, board.tables, strict=True):
        write_text(folder / "points" / f"{name}.yaml", to_yaml(scored.table))
    if can_plot(*(folder / f"{name}-curves.png" for name in names)):
        from d3llm_ray.leaderboard.plots import plot_table

        for name, scored in zip(names, board.tables, strict=True):
            plot_table(scored, folder, name)
    board.write(folder)


def _names(titles: list[str]) -> list[str]:
    """A file name for each title, none twice."""
    names: list[str] = []
    for number, title in enumerate(titles, start=1):
        name = re.sub(r"\W+", "-", title.lower()).strip("-")[:40] or "table"
        names.append(f"{name}-{number}" if name in names else name)
    return names
