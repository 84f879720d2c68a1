"""Cells of a report spread over engine actors: shards of problems as work items, each kept when it is finished.

A cell is one (model, decoder, settings, task); a shard is a contiguous range of its problems that one actor decodes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from d3llm_ray.cluster import connect
from d3llm_ray.errors import require
from d3llm_ray.evaluation.kept import ENDING, read_row, write_row
from d3llm_ray.evaluation.pool import EngineWork, engine_pool, together
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.progress import Progress


@dataclass(frozen=True)
class ReportCell:
    """One row to measure. `key`: its name on disk; `problem_ids`: those of all its problems, in their order."""

    key: str
    model: str
    work: EngineWork
    problem_ids: Sequence[str]


@dataclass(frozen=True)
class EngineGroup:
    """The actors of one model, see `pool.PoolOptions`."""

    model: str
    dtype: str
    device: str
    max_batch_size: int
    actors: int
    cpus_per_actor: int
    gpus_per_actor: float
    resource_timeout_s: float


def shards_of(problems: int, shard_size: int, actors: int) -> list[range]:
    """Contiguous ranges of nearly equal length, `shard_size` at most, as many for every actor where there is enough."""
    rounds = -(-problems // (shard_size * actors))
    count = min(problems, rounds * actors)
    return [range(problems * part // count, problems * (part + 1) // count) for part in range(count)]


def slowest(timed: Sequence[tuple[int, float]]) -> float:
    """Seconds of the actor that worked longest, of (actor, seconds) of every shard."""
    of_actor: dict[int, float] = defaultdict(float)
    for actor, seconds in timed:
        of_actor[actor] += seconds
    return max(of_actor.values())


class KeptShards:
    """The finished shards of a cell, one file each, which names the actor for the sake of its seconds."""

    def __init__(self, folder: Path, cell: ReportCell, shards: Sequence[range], progress: Progress) -> None:
        self._folder, self._cell = folder, cell
        self._rows: dict[int, tuple[int, EvaluationRow]] = {}  # start -> actor and row
        starts = {shard.start: shard for shard in shards}
        for file in sorted(folder.glob(f"{cell.key}.*{ENDING}")):
            name = re.fullmatch(r"(\d+)-(\d+)\.(\d+)", file.name[len(cell.key) + 1 : -len(ENDING)])
            shard = starts.get(int(name[1])) if name else None
            if name is None or shard is None or shard.stop != int(name[2]):
                continue
            row = read_row(file, self._ids(shard))
            if isinstance(row, str):
                progress.note(f"measured again, as {file} cannot be used: {row}")
            else:
                self._rows[shard.start] = int(name[3]), row
        self.missing = [shard for shard in shards if shard.start not in self._rows]

    def add(self, shard: range, actor: int, row: EvaluationRow) -> None:
        """Keep a shard; `InputError` where an actor's problems are others, as of another file on its node."""
        ids = [sample.problem_id for sample in row.samples]
        where = f"tasks: {self._cell.work.task}: problems of actor {actor}"
        require(ids == self._ids(shard), where, "others", "the same files on every node")
        write_row(self._folder / f"{self._cell.key}.{shard.start}-{shard.stop}.{actor}{ENDING}", row)
        self._rows[shard.start] = actor, row
        self.missing.remove(shard)

    def row(self) -> EvaluationRow:
        """The whole cell's row."""
        found = [self._rows[start] for start in sorted(self._rows)]
        seconds = slowest([(actor, row.seconds) for actor, row in found])
        return together(self._cell.work, [row for _, row in found], seconds)

    def clear(self) -> None:
        """Remove the files, of whatever shards: the cell itself is kept."""
        for file in self._folder.glob(f"{self._cell.key}.*"):
            file.unlink()

    def _ids(self, shard: range) -> list[str]:
        return list(self._cell.problem_ids[shard.start : shard.stop])


def measure_cells(
    settings: EvaluateSettings, cells: Sequence[ReportCell], progress: Progress
) -> Iterator[tuple[str, EvaluationRow]]:
    """Key and row of every cell as it is finished; its shards are removed when the next one is asked for.

    One group of actors at a time, with one model; `progress` counts the problems of all cells.
    """
    folder = settings.output / "shards"
    folder.mkdir(exist_ok=True)
    size = (settings.shard_size, settings.actors)
    kept = {cell.key: KeptShards(folder, cell, shards_of(len(cell.problem_ids), *size), progress) for cell in cells}
    left = sum(len(shard) for shards in kept.values() for shard in shards.missing)
    done = 0
    if left:
        connect(min_cpus=settings.actors * settings.cpus_per_actor + 1)
    with progress.stage("evaluate", left, "problem"):
        for model, group in groupby(sorted(cells, key=lambda cell: cell.model), key=lambda cell: cell.model):
            own = list(group)
            for cell in (cell for cell in own if not kept[cell.key].missing):  # interrupted just before it was whole
                yield cell.key, kept[cell.key].row()
                kept[cell.key].clear()
            items = [(cell, shard) for cell in own for shard in kept[cell.key].missing]
            if not items:
                continue
            with engine_pool(_group(settings, model)) as pool:
                for index, actor, row in pool.each([(cell.work, shard) for cell, shard in items]):
                    cell, shard = items[index]
                    shards = kept[cell.key]
                    shards.add(shard, actor, row)
                    done += len(shard)
                    progress.update(done, accuracy=row.accuracy, tpf=row.tpf)
                    if not shards.missing:
                        yield cell.key, shards.row()
                        shards.clear()
    with suppress(OSError):  # shards of a run with other settings, which may go on
        folder.rmdir()


def _group(settings: EvaluateSettings, model: str) -> EngineGroup:
    return EngineGroup(
        model=model,
        dtype=settings.dtype,
        device=settings.device,
        max_batch_size=settings.max_batch_size,
        actors=settings.actors,
        cpus_per_actor=settings.cpus_per_actor,
        gpus_per_actor=settings.gpus_per_actor,
        resource_timeout_s=settings.resource_timeout_s,
    )
