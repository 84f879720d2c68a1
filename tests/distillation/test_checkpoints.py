from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d3llm_ray.distillation.training import checkpoints
from d3llm_ray.distillation.training.engines import TorchEngine, torch_engine
from d3llm_ray.errors import InputError
from tests.distillation.toy_training import ToyLoss, in_group, options, train, values_of

pytestmark = pytest.mark.timeout(900)  # two processes that wait for each other take long on a busy machine

PLACES = [(0, False), (2, False), (3, False), (2, True), (3, True)]
BEFORE, AFTER = range(3), range(3, 6)
EXTRA = {"best": {"step": 2, "loss": 0.125}, "names": ["a", "b"]}


def alone(steps: range = BEFORE, *, rank: int = 0, world_size: int = 1, bfloat16: bool = False) -> TorchEngine:
    """A trained engine in this process, which may pose as one worker of several."""
    engine = TorchEngine(ToyLoss(), options(accumulation=4, bfloat16=bfloat16))
    train(engine, steps, accumulation=4)
    engine.rank, engine.world_size = rank, world_size
    return engine


def go_on(engine: Any, directory: Path | None, accumulation: int = 2) -> dict[str, Any]:
    """Train to the end, from a checkpoint if one is given."""
    read = None if directory is None else checkpoints.read(engine, directory)
    figures = train(engine, AFTER, accumulation=accumulation)
    return {"read": read, "updates": engine.updates, "figures": figures, "values": values_of(engine)}


def resumptions(folder: Path) -> dict[Any, Any]:
    """For every place: training without a break, and after a restart; then from checkpoints of other places."""
    from d3llm_ray.distillation.training.deepspeed_engine import deepspeed_engine

    def fresh(zero_stage: int, *, bfloat16: bool = False, **changes: Any) -> Any:
        return deepspeed_engine(ToyLoss(), options(zero_stage=zero_stage, bfloat16=bfloat16, **changes))

    results: dict[Any, Any] = {}
    for zero_stage, bfloat16 in PLACES:
        directory = folder / f"zero-{zero_stage}-{bfloat16}" / checkpoints.name_of(3)
        engine = fresh(zero_stage, bfloat16=bfloat16)
        train(engine, BEFORE)
        checkpoints.write(engine, directory, 3, EXTRA)
        torch.distributed.barrier()
        results[zero_stage, bfloat16] = go_on(engine, None), go_on(fresh(zero_stage, bfloat16=bfloat16), directory)
    for zero_stage in (0, 3):
        results["from 2", zero_stage] = go_on(fresh(zero_stage), folder / "zero-2-False" / checkpoints.name_of(3))
    for zero_stage, offload in ((1, "none"), (3, "all")):
        engine = fresh(zero_stage, offload=offload)
        results["from one", zero_stage] = go_on(engine, folder / "one" / checkpoints.name_of(3))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def workers(folder: Path) -> list[Any]:
    checkpoints.write(alone(), folder / "one" / checkpoints.name_of(3), 3, EXTRA)
    return in_group(resumptions, folder)


@pytest.mark.parametrize(("zero_stage", "bfloat16"), PLACES)
def test_resuming_changes_nothing(workers: list[Any], zero_stage: int, bfloat16: bool) -> None:
    for worker in workers:
        unbroken, resumed = worker[zero_stage, bfloat16]
        assert resumed["read"] == (3, EXTRA)
        assert resumed["updates"] == 6
        assert resumed["figures"] == unbroken["figures"]
        assert all(torch.equal(resumed["values"][name], unbroken["values"][name]) for name in unbroken["values"])


@pytest.mark.parametrize("bfloat16", [False, True])
def test_resuming_in_one_process_changes_nothing(tmp_path: Path, bfloat16: bool) -> None:
    engine = alone(bfloat16=bfloat16)
    checkpoints.write(engine, tmp_path, 3, EXTRA)
    unbroken, resumed = go_on(engine, None, 4), go_on(alone(range(0), bfloat16=bfloat16), tmp_path, 4)
    assert resumed["read"] == (3, EXTRA)
    assert resumed["figures"] == unbroken["figures"]
    assert all(torch.equal(resumed["values"][name], unbroken["values"][name]) for name in unbroken["values"])


def assert_same(result: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert result["read"] == (3, EXTRA)
    assert result["updates"] == 6
    assert set(result["values"]) == set(expected)
    for name, value in result["values"].items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_resuming_at_another_stage_or_number_of_workers(workers: list[Any], folder: Path) -> None:
    expected = values_of(alone(range(6)))
    for worker in workers:
        for place in (("from 2", 0), ("from 2", 3), ("from one", 1), ("from one", 3)):
            assert_same(worker[place], expected)
    for zero_stage in (2, 3):
        directory = folder / f"zero-{zero_stage}-False" / checkpoints.name_of(3)
        assert_same(go_on(alone(range(0)), directory, 4), expected)


def write_as_two(directory: Path, step: int) -> Path:
    """A checkpoint of two workers."""
    for rank in range(2):
        checkpoints.write(alone(range(1), rank=rank, world_size=2), directory, step, EXTRA)
    return directory


def test_what_is_written(tmp_path: Path) -> None:
    directory = write_as_two(tmp_path / "step-000007", 7)
    names = ["shard-000-of-002", "shard-001-of-002"]
    files = [name + suffix for name in names for suffix in (".json", ".safetensors")]
    assert sorted(file.name for file in directory.iterdir()) == files
    records = [json.loads((directory / f"{name}.json").read_text()) for name in names]
    assert [set(record["shapes"]) for record in records] == [
        {"mixer.weight"},
        {"mixer.bias", "down.weight", "up.weight"},
    ]
    assert [(record["step"], record["updates"], record["world_size"]) for record in records] == [(7, 1, 2)] * 2
    assert [record["extra"] for record in records] == [EXTRA, {}]
    engine = alone(range(1))
    stored = load_file(directory / f"{names[0]}.safetensors") | load_file(directory / f"{names[1]}.safetensors")
    moments = {name: engine.optimizer.state[parameter] for name, parameter in engine.parameters.items()}
    expected = {f"value/{name}": parameter for name, parameter in engine.parameters.items()}
    expected |= {f"{kind}/{name}": state[kind] for name, state in moments.items() for kind in ("exp_avg", "exp_avg_sq")}
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[key], expected[key]) for key in expected)


def cut(directory: Path) -> None:
    with (directory / "shard-000-of-002.safetensors").open("r+b") as file:
        file.truncate(100)


def flip(directory: Path) -> None:
    with (directory / "shard-001-of-002.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        byte = file.read(1)
        file.seek(-5, 2)
        file.write(bytes([byte[0] ^ 1]))


def lose(directory: Path) -> None:
    (directory / "shard-001-of-002.safetensors").unlink()


def forge(directory: Path) -> None:
    seal = directory / "shard-000-of-002.json"
    seal.write_text(seal.read_text().replace('"updates": 1', '"updates": 3'))


def garble(directory: Path) -> None:
    (directory / "shard-000-of-002.json").write_text('{"step": 40, "by')


def half_written(directory: Path) -> None:
    """Worker 1 was killed while it wrote."""
    (directory / "shard-001-of-002.json").unlink()
    file = directory / "shard-001-of-002.safetensors"
    file.rename(directory / f".{file.name}.partial")


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut, "shard-000-of-002.safetensors has 100 of 1,23"),
    (flip, "the digest of shard-001-of-002 does not match"),
    (forge, "the digest of shard-000-of-002 does not match"),
    (garble, "shard-000-of-002.json is unreadable"),
    (
        lambda directory: (directory / "shard-001-of-002.safetensors").unlink(),
        "shard-001-of-002.safetensors is missing",
    ),
    (lambda directory: (directory / "shard-001-of-002.json").unlink(), "shard-001-of-002.json is missing"),
    (half_written, "shard-001-of-002.json is missing"),
    (empty, "it has no shards"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_damage_falls_back(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    older, newer = (write_as_two(tmp_path / checkpoints.name_of(step), step) for step in (20, 40))
    assert checkpoints.newest(tmp_path) == (newer, [])
    damage(newer)
    found, (warning,) = checkpoints.newest(tmp_path)
    assert found == older
    assert warning.startswith(f"checkpoint step-000040 is damaged ({said}")
    assert warning.endswith("): using step-000020")
    with pytest.raises(InputError, match="checkpoint step-000040 is damaged"):
        checkpoints.read(alone(range(0)), newer)


def test_none_is_left(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "nowhere") == (None, [])
    cut(write_as_two(tmp_path / "step-000020", 20))
    (tmp_path / "step-000040").mkdir()
    found, warnings = checkpoints.newest(tmp_path)
    assert found is None
    assert [warning.rpartition(": ")[2] for warning in warnings] == ["there is none before it"] * 2
    assert [warning[:22] for warning in warnings] == ["checkpoint step-000040", "checkpoint step-000020"]


def test_other_folders_and_leftovers_are_passed_over(tmp_path: Path) -> None:
    """Order is by number, not by name; part of a first attempt with other workers does no harm."""
    directory = write_as_two(tmp_path / "step-1000000", 1_000_000)
    checkpoints.write(alone(range(0), rank=1, world_size=3), directory, 1_000_000, {})
    for name in ("step-000040.partial", "step-best", "best"):
        (tmp_path / name).mkdir()
    write_as_two(tmp_path / "step-999999", 999_999)
    assert checkpoints.newest(tmp_path) == (directory, [])
    engine = alone(range(0))
    assert checkpoints.read(engine, directory) == (1_000_000, EXTRA)
    assert engine.updates == 1
    assert checkpoints.step_of(directory) == 1_000_000


class OtherLoss(ToyLoss):
    """`up` is frozen, `head` is trained, and `down` is wider."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Linear(331, 4, bias=False)
        self.up.requires_grad_(False)
        self.head.requires_grad_(True)


def test_another_model_is_refused(tmp_path: Path) -> None:
    directory = write_as_two(tmp_path / "step-000001", 1)
    said = (
        r"checkpoint step-000001 is not of this model: it lacks head.weight, head.bias; it has in excess up.weight; "
        r"it has in another shape down.weight \[3, 331\] for \[4, 331\]; accepted: a checkpoint of the same model"
    )
    with pytest.raises(InputError, match=said):
        checkpoints.read(torch_engine(OtherLoss(), options()), directory)
