"""Cells spread over actors: rows as in one process, and what was finished before a kill is not decoded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray.exceptions import RayActorError

from d3llm_ray.decoding import DiffusionLLM, decoder, decoding_settings
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation import run as verb
from d3llm_ray.evaluation import spread
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.pool import EngineWork
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.evaluation.spread import EngineGroup, shards_of, slowest
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import load_task
from tests.wiring import Notes

SETTINGS: dict[str, Any] = {"decoders": ["d3llm", "vanilla"], "count": 10, "max_tokens": 24, "max_batch_size": 4}
QUIET = Progress(quiet=True)


def test_shards_cover_all_problems_and_keep_every_actor_busy() -> None:
    assert shards_of(10, 3, 2) == [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
    assert shards_of(500, 128, 2) == [range(125 * part, 125 * (part + 1)) for part in range(4)]
    assert shards_of(100, 128, 2) == [range(0, 50), range(50, 100)]
    assert shards_of(1, 128, 2) == [range(0, 1)]
    for problems in range(1, 30):
        for size in (1, 2, 7):
            for actors in (1, 2, 3):
                shards = shards_of(problems, size, actors)
                assert [number for shard in shards for number in shard] == list(range(problems))
                assert max(map(len, shards)) <= size


def test_seconds_are_those_of_the_actor_that_worked_longest() -> None:
    assert slowest([(0, 2.0), (1, 3.0), (0, 2.5), (1, 1.0)]) == 4.5


class FakePool:
    """Measures in this process; fails when it is asked for the shard after `survives`. `asked` of its class."""

    asked: ClassVar[list[tuple[str, range]]] = []
    groups: ClassVar[list[EngineGroup]] = []
    survives = 100

    def __init__(self, group: EngineGroup) -> None:
        self.groups.append(group)
        self._llm = DiffusionLLM.from_pretrained(group.model, max_batch_size=group.max_batch_size)

    def each(self, items: list[tuple[EngineWork, range]]) -> Iterator[tuple[int, int, EvaluationRow]]:
        for index, (work, shard) in reversed(list(enumerate(items))):
            if len(self.asked) >= self.survives:
                raise RayActorError
            self.asked.append((work.decoding_settings["decoder"], shard))
            task = load_task(work.task, **work.task_options)
            problems = task.problems(work.split, work.count)[shard.start : shard.stop]
            options = {**work.sampling, **work.decoding_settings}
            yield index, index % 2, evaluate(self._llm, task, problems, progress=QUIET, warmup=0, **options)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakePool]:
    class Own(FakePool):
        asked, groups = [], []

    @contextmanager
    def pool(group: EngineGroup) -> Iterator[FakePool]:
        yield Own(group)

    monkeypatch.setattr(spread, "engine_pool", pool)
    monkeypatch.setattr(spread, "connect", lambda **_named: None)
    monkeypatch.setattr(verb, "can_plot", lambda *_: False)
    return Own


def untimed(rows: Any) -> list[Any]:
    return [(replace(row, seconds=1.0, tps=1.0), row.samples) for row in rows]


def test_rows_are_those_of_one_process_and_nothing_but_the_rest_is_decoded_after_a_kill(
    fake: type[FakePool], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = EvaluateSettings(**SETTINGS, models=[str(tiny_checkpoint)], temperature=0.7, output=tmp_path / "one")
    expected = verb.run(settings, QUIET)
    several = settings.model_copy(update={"actors": 2, "shard_size": 3, "output": tmp_path / "two"})
    fake.survives = 5
    with pytest.raises(RayActorError):
        verb.run(several, QUIET)
    assert len(fake.asked) == 5
    assert len(list((several.output / "samples").iterdir())) == 1  # of the second cell, which is whole
    (only,) = (several.output / "shards").iterdir()
    fake.survives = 100
    report = verb.run(several, QUIET)
    assert len(fake.asked) == 8 and len(set(fake.asked)) == 8
    assert untimed(report.rows) == untimed(expected.rows)
    assert not (several.output / "shards").exists() and not only.exists()
    verb.run(several, QUIET)
    assert len(fake.asked) == 8


def test_a_torn_shard_is_said_and_decoded_again(fake: type[FakePool], tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(
        **SETTINGS | {"decoders": ["d3llm"]},
        models=[str(tiny_checkpoint)],
        actors=1,
        shard_size=5,
        output=tmp_path / "r",
    )
    fake.survives = 1
    with pytest.raises(RayActorError):
        verb.run(settings, QUIET)
    (shard,) = (settings.output / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-20])
    fake.survives, notes = 100, Notes()
    verb.run(settings, notes)
    assert len(fake.asked) == 3 and shard.name in notes.said[1]
    assert notes.said[0].startswith("the first prompt of arith for tiny-random")


def test_settings_arrive_in_the_group_and_the_work(
    fake: type[FakePool], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works: list[EngineWork] = []
    asked: list[Any] = []
    monkeypatch.setattr(spread, "connect", lambda **named: asked.append(named))
    monkeypatch.setattr(verb, "check_device_name", asked.append)
    each = fake.each
    monkeypatch.setattr(fake, "each", lambda pool, items: works.extend(w for w, _ in items) or each(pool, items))
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)], decoders=["d3llm"], count=3, split="validation", warmup=2, max_tokens=24,
        temperature=0.7, top_p=0.9, seed=11, max_batch_size=5, dtype="bfloat16", device="cuda:3", actors=3,
        cpus_per_actor=4, gpus_per_actor=0.25, resource_timeout_s=17.0, output=tmp_path / "r",
    )  # fmt: skip
    (row,) = verb.run(settings, QUIET).rows
    assert fake.groups == [EngineGroup(str(tiny_checkpoint), "bfloat16", "cuda:3", 5, 3, 4, 0.25, 17.0)]
    sampling = {"max_tokens": 24, "temperature": 0.7, "top_p": 0.9, "seed": 11}
    chosen = decoding_settings(decoder("d3llm"))
    assert works == [EngineWork("arith", "validation", 3, chosen, sampling, 2, {"data_dir": None})] * 3
    assert asked == ["cuda:3", {"min_cpus": 13}]
    assert (row.warmup, row.seed, row.problems) == (2, 11, 3)


def test_problems_of_another_file_on_another_node_are_refused(
    fake: type[FakePool], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = fake.each

    def other(pool: Any, items: Any) -> Iterator[Any]:
        for index, actor, row in each(pool, items):
            samples = tuple(replace(sample, problem_id="another") for sample in row.samples)
            yield index, actor, replace(row, samples=samples)

    monkeypatch.setattr(fake, "each", other)
    settings = EvaluateSettings(**SETTINGS, models=[str(tiny_checkpoint)], actors=2, output=tmp_path / "r")
    with pytest.raises(InputError, match="tasks: arith: problems of actor .* same files on every node"):
        verb.run(settings, QUIET)


@pytest.mark.slow
def test_actors_on_ray_give_the_rows_of_one_process(ray_cluster: None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(**SETTINGS, models=[str(tiny_checkpoint)], temperature=0.7, output=tmp_path / "one")
    expected = verb.run(settings, QUIET)
    for actors in (1, 2):
        given = {"actors": actors, "shard_size": 3, "output": tmp_path / f"{actors} actors"}
        report = verb.run(settings.model_copy(update=given), QUIET)
        assert untimed(report.rows) == untimed(expected.rows)
