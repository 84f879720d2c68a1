"""Engine actors: whichever answers, tokens are those of this process, and seconds those of the slowest."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation import actor as actors
from d3llm_ray.evaluation import pool as pools
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.pool import EnginePool, EngineWork, engine_pool, together
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import Problem, Task, load_task

WORK = EngineWork("arith", "test", 7, {"decoder": "vanilla", "steps": 5}, {"max_tokens": 24, "seed": 3}, warmup=2)


@dataclass(frozen=True)
class Options:
    model: str = "tiny-llada"
    dtype: str = "float32"
    device: str = "cpu"
    max_batch_size: int = 6
    actors: int = 2
    cpus_per_actor: int = 1
    gpus_per_actor: float = 0.0
    resource_timeout_s: float = 60.0


def row_of(numbers: list[int], seconds: float) -> EvaluationRow:
    """One right answer in two, 6 tokens each."""
    samples = [EvaluatedSample(f"p{n}", "", "1", "1", n % 2 == 0, 6, 3, 4, "stop") for n in numbers]
    labels: dict[str, Any] = {name: name for name in ("model", "decoder", "task")}
    labels |= {"settings": {}, "max_tokens": 8, "temperature": 0.0, "seed": 0, "warmup": 0, "max_batch_size": 1}
    return summarise(samples, seconds, **labels)


def fake_pool(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> tuple[EnginePool, list[Any]]:
    """Actors that answer at once, and what they were asked."""
    asked: list[Any] = []

    def remote(part: int) -> Any:
        def measure(work: EngineWork, numbers: list[int]) -> EvaluationRow:
            asked.append((part, work, numbers))
            return row_of(numbers, seconds[part])

        return SimpleNamespace(measure=SimpleNamespace(remote=measure))

    monkeypatch.setattr(pools.ray, "get", lambda values, timeout=None: values)
    return EnginePool([remote(part) for part in range(len(seconds))]), asked


def test_problems_are_dealt_to_all_actors_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, asked = fake_pool(monkeypatch, [2.0, 6.0, 1.0])
    row = pool.measure(WORK, range(10, 17))
    assert asked == [(0, WORK, [10, 13, 16]), (1, WORK, [11, 14]), (2, WORK, [12, 15])]
    assert [sample.problem_id for sample in row.samples] == [f"p{n}" for n in range(10, 17)]
    assert (row.seconds, row.tokens, row.tps, row.warmup, row.correct) == (6.0, 42, 7.0, 2, 4)
    few = pool.measure(WORK, [5])
    assert (few.problems, few.seconds, few.warmup) == (1, 2.0, 1)
    with pytest.raises(InputError, match="problems: got 0"):
        pool.measure(WORK, [])


def test_no_shard_is_begun_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, asked = fake_pool(monkeypatch, [1.0])
    rows = pool.measure_shards(WORK, [range(0, 2), range(2, 5)])
    assert next(rows).problems == 2 and len(asked) == 1
    second = next(rows)
    assert [sample.problem_id for sample in second.samples] == ["p2", "p3", "p4"]
    both = together(WORK, [row_of([0, 1], 1.0), second], 5.0)
    assert ([sample.problem_id for sample in both.samples], both.seconds) == ([f"p{n}" for n in range(5)], 5.0)


@pytest.mark.parametrize(("device", "cpus", "threads"), [("cuda:3", 4, 0), ("cpu", 4, 4), ("cpu", 0, 1)])
def test_options_arrive_in_the_actors(monkeypatch: pytest.MonkeyPatch, device: str, cpus: int, threads: int) -> None:
    made: list[Any] = []
    killed: list[Any] = []

    def options(**named: Any) -> Any:
        def remote(*words: Any) -> Any:
            made.append((named, words))
            return SimpleNamespace(ready=SimpleNamespace(remote=lambda: len(made)))

        return SimpleNamespace(remote=remote)

    waits: list[Any] = []
    ray = SimpleNamespace(get=lambda ready, timeout: waits.append((len(ready), timeout)), kill=killed.append)
    monkeypatch.setattr(actors, "EngineActor", SimpleNamespace(options=options))
    monkeypatch.setattr(pools, "ray", ray)
    given = Options("m", "bfloat16", device, 9, 3, cpus, 0.25, 17.0)
    with engine_pool(given) as pool:
        assert len(pool.actors) == 3 and killed == []
    assert made == [({"num_cpus": cpus, "num_gpus": 0.25}, ("m", "bfloat16", device, 9, threads))] * 3
    assert waits == [(3, 17.0)] and killed == list(pool.actors)

    def too_late(_ready: Any, timeout: float) -> None:
        raise GetTimeoutError

    ray.get, ray.available_resources = too_late, lambda: {"CPU": 2.0}
    line = rf"^actors: 3 of {cpus} CPUs and 0.25 GPUs did not start in 17 s \(resource_timeout_s\); free .*: 2 CPUs, 0"
    with pytest.raises(InputError, match=line), engine_pool(given):
        pass
    assert len(killed) == 6


def test_work_arrives_in_an_actor_which_warms_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"threads": []}
    problems = [Problem(str(number), [{"role": "user", "content": "?"}], "1") for number in range(7)]
    task = Task("t", lambda split, count: asked.update(split=split, count=count) or problems)
    monkeypatch.setattr(actors, "load_task", lambda name, **named: asked.update(task=(name, named)) or task)
    monkeypatch.setattr(actors.torch, "set_num_threads", asked["threads"].append)
    monkeypatch.setattr(
        actors.DiffusionLLM, "from_pretrained", lambda *words, **named: asked.update(model=(words, named)) or "llm"
    )
    monkeypatch.setattr(actors, "evaluate", lambda *words, **named: (words, named))
    plain = actors.EngineActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    engine = plain("m", "bfloat16", "cpu", 6, 4)
    work = replace(WORK, split="train", task_options={"colour": "red"})
    words, named = engine.measure(work, [1, 4])
    assert asked == {
        "threads": [4], "task": ("arith", {"colour": "red"}), "split": "train", "count": 7,
        "model": (("m",), {"dtype": "bfloat16", "device": "cpu", "max_batch_size": 6}),
    }  # fmt: skip
    assert words == ("llm", task, [problems[1], problems[4]])
    assert isinstance(named.pop("progress"), Progress)
    assert named == {"warmup": 2, "max_tokens": 24, "seed": 3, "decoder": "vanilla", "steps": 5}
    assert [engine.measure(each, [0])[1]["warmup"] for each in (work, WORK, WORK, work)] == [0, 2, 0, 2]


def _end_process(_actor: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_actors_answer_as_one_process_does_and_come_back(ray_cluster: None, tiny_checkpoint: Path) -> None:
    decoding = {"decoder": "d3llm", "entropy_threshold": 3.0}
    work = EngineWork("arith", "test", 9, decoding, {"max_tokens": 24, "temperature": 0.8, "seed": 3}, warmup=1)
    llm, task = DiffusionLLM.from_pretrained(tiny_checkpoint, max_batch_size=4), load_task("arith")
    expected = evaluate(llm, task, task.problems("test", 9), 24, 0.8, 3, Progress(quiet=True), 1, **decoding)
    with engine_pool(Options(str(tiny_checkpoint), max_batch_size=4)) as pool:
        row = pool.measure(work, range(9))
        assert row.samples == expected.samples
        assert replace(row, seconds=1.0, tps=1.0) == replace(expected, seconds=1.0, tps=1.0)
        pool.actors[0].__ray_call__.remote(_end_process)
        items = [(work, range(start, start + 3)) for start in (0, 3, 6)]
        parts = {index: (actor, part) for index, actor, part in pool.each(items)}
        assert [sample for index in range(3) for sample in parts[index][1].samples] == list(expected.samples)
        with pytest.raises(InputError, match=r"^entropy_treshold: ") as caught:
            pool.measure(replace(work, decoding_settings={"decoder": "d3llm", "entropy_treshold": 1.0}), [0, 1])
        assert "\n" not in str(caught.value)
