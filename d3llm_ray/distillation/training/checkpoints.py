"""Resumable checkpoints that do not depend on the number of workers, the ZeRO stage or the engine.

A checkpoint is a folder. Each worker writes one shard of it: some of the trained parameters, whole, with their
optimizer state, in a safetensors file, and then a JSON file of the same name that says what the checkpoint is and
seals the shard with a digest of both files. Frozen parameters are not stored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from d3llm_ray.distillation.training.engines import AdamState, TrainingEngine
from d3llm_ray.errors import InputError
from d3llm_ray.report import replacing, write_text

NAME = re.compile(r"step-\d+")
SHARD = re.compile(r"shard-\d+-of-(\d+)\.(?:json|safetensors)")


class DamagedCheckpoint(InputError):
    """A checkpoint with a file missing, cut short or changed."""

    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(f"checkpoint {directory.name} is damaged ({reason})")


@dataclass(frozen=True)
class Shard:
    """One worker's part: its tensors' file and what the sealing file says about it."""

    tensors: Path
    record: Mapping[str, Any]


def name_of(step: int) -> str:
    """The folder's name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def step_of(directory: Path) -> int:
    """The steps taken before a checkpoint, from its name."""
    return int(directory.name.removeprefix("step-"))


def write(engine: TrainingEngine, directory: Path, step: int, extra: Mapping[str, Any]) -> None:
    """Write this worker's shard; collective. The workers' folders may be local ones that are merged afterwards.

    `extra`: JSON values for `read` to return; worker 0's are kept. The checkpoint is complete when all workers have
    returned.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{_shard_name(engine.rank, engine.world_size)}.safetensors"
    names = _share(engine.trained, engine.rank, engine.world_size)
    states = engine.collect(names)
    tensors = {_key(kind, name): tensor for name in names for kind, tensor in states[name]._asdict().items()}
    with replacing(file) as partial:
        save_file(tensors, partial)
    record = {
        "step": step,
        "updates": engine.updates,
        "world_size": engine.world_size,
        "shapes": {name: list(engine.trained[name]) for name in names},
        "bytes": file.stat().st_size,
        "extra": json.loads(json.dumps(extra)) if engine.rank == 0 else {},  # as it will be read
    }
    write_text(file.with_suffix(".json"), json.dumps({**record, "digest": _digest(file, record)}, indent=2) + "\n")


def read(engine: TrainingEngine, directory: Path) -> tuple[int, dict[str, Any]]:
    """Load a checkpoint into an engine of any kind; collective. Returns the step and worker 0's `extra`.

    Raises `InputError` when it is damaged or is of another model. Each worker checks the digests of its share of the
    shards.
    """
    shards = _shards(directory)
    for shard in shards[engine.rank :: engine.world_size]:
        _check_digest(shard)
    place = {name: shard for shard in shards for name in shard.record["shapes"]}
    _check_fit(directory, engine.trained, {name: shard.record["shapes"][name] for name, shard in place.items()})
    with ExitStack() as stack:
        opened = {shard.tensors: stack.enter_context(safe_open(shard.tensors, "pt")) for shard in shards}

        def load(name: str) -> AdamState:
            file = opened[place[name].tensors]
            return AdamState(*(file.get_tensor(_key(kind, name)) for kind in AdamState._fields))

        engine.restore(load, shards[0].record["updates"])
    return shards[0].record["step"], shards[0].record["extra"]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint among `folder/step-*`, and a line of warning for each newer one."""
    damages = []
    intact = None
    for directory in sorted(_named(folder), key=step_of, reverse=True):
        try:
            for shard in _shards(directory):
                _check_digest(shard)
        except DamagedCheckpoint as error:
            damages.append(str(error))
        else:
            intact = directory
            break
    instead = f"using {intact.name}" if intact else "there is none before it"
    return intact, [f"{damage}: {instead}" for damage in damages]


def _named(folder: Path) -> list[Path]:
    """What looks like a checkpoint, and not like one that is being written."""
    return [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]


def _shards(directory: Path) -> list[Shard]:
    """The checkpoint's shards in order, after a check that all are there and of their recorded size."""
    counts = {int(match[1]) for path in directory.glob("shard-*") if (match := SHARD.fullmatch(path.name))}
    damage = DamagedCheckpoint(directory, "it has no shards")
    # A run that was restarted with other workers may have left part of a first attempt.
    for count in sorted(counts):
        try:
            return [_shard(directory, _shard_name(rank, count)) for rank in range(count)]
        except DamagedCheckpoint as error:
            damage = error
    raise damage


def _shard(directory: Path, name: str) -> Shard:
    tensors, seal = directory / f"{name}.safetensors", directory / f"{name}.json"
    for file in (seal, tensors):
        if not file.is_file():
            raise DamagedCheckpoint(directory, f"{file.name} is missing")
    try:
        record = json.loads(seal.read_text(encoding="utf-8"))
        expected = record["bytes"]
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(directory, f"{seal.name} is unreadable") from None
    size = tensors.stat().st_size
    if size != expected:
        raise DamagedCheckpoint(directory, f"{tensors.name} has {size:,} of {expected:,} bytes")
    return Shard(tensors, record)


def _check_digest(shard: Shard) -> None:
    record = {key: value for key, value in shard.record.items() if key != "digest"}
    if _digest(shard.tensors, record) != shard.record.get("digest"):
        raise DamagedCheckpoint(shard.tensors.parent, f"the digest of {shard.tensors.stem} does not match")


def _digest(tensors: Path, record: Mapping[str, Any]) -> str:
    """blake2b over a shard's tensors and what its sealing file says."""
    with tensors.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b")
    digest.update(json.dumps(record, sort_keys=True).encode())
    return digest.hexdigest()


def _check_fit(directory: Path, trained: Mapping[str, torch.Size], stored: Mapping[str, list[int]]) -> None:
    shapes = [name for name in trained if name in stored and list(trained[name]) != stored[name]]
    faults = {
        "lacks": [name for name in trained if name not in stored],
        "has in excess": [name for name in stored if name not in trained],
        "has in another shape": [f"{name} {stored[name]} for {list(trained[name])}" for name in shapes],
    }
    said = [f"{what} {_listed(names)}" for what, names in faults.items() if names]
    if said:
        raise InputError(
            f"checkpoint {directory.name} is not of this model: it {'; it '.join(said)}; accepted: a checkpoint of "
            "the same model with the same trained parameters"
        )


def _listed(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _share(trained: Mapping[str, torch.Size], rank: int, world_size: int) -> list[str]:
    """The names that a worker writes: the largest first, each to the worker with the least so far."""
    loads = [0] * world_size
    mine = []
    for name in sorted(trained, key=lambda name: trained[name].numel(), reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += trained[name].numel()
        if lightest == rank:
            mine.append(name)
    return mine


def _shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:03d}-of-{world_size:03d}"


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"
