"""Every setting of every verb, from the command line or a file, arrives in what the verb's function receives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml

from d3llm_ray import cli
from d3llm_ray.cli import VERBS, main
from d3llm_ray.config import Settings

# Where a value made up from the type alone would be refused, or where order and commas matter.
OWN: dict[str, Any] = {
    "device": "cuda",
    "zero_stage": 3,
    "betas": [0.25, 0.75],
    "anchor": [1.5, 62.5],
    "texts": ["five apples, and two more", "[a, b]"],
    "pairs": [{"model": "tiny-dream", "decoder": "dparallel", "decoder_settings": {"entropy_threshold": 0.5}}],
    "anchors": {"student": "teacher"},
    "adapters": {"tuned": "own/adapter"},
    "cors_origins": ["https://one.example", "https://two.example"],
    "sweep": {"entropy_threshold": [0.25, 0.75]},
    "objective": {"name": "block-diffusion"},
    "min_actors": 1,
    "attempts": 2,
    "dtype": "bfloat16",
    "workers": 3,
    "micro_batch_size": 4,
    "batch_size": 24,
    "trajectories": {"attempts": 3},
    "distill": {"lr": 0.25},
    "tune": {"count": 9},
    "evaluate": {"count": 7},
    "serve": {"max_queue": 5},
    "row": "0123456789abcdef",
}
OF_VERB: dict[tuple[str, str], Any] = {
    ("distill", "trajectories"): "data/rows",
    ("benchmark distill", "trajectories"): "data/rows",
    ("ablate", "trajectories"): "data/rows",
    ("benchmark trajectories", "temperatures"): [0.25, 0.5],
    ("benchmark", "count"): 64,
    ("benchmark", "scripted_tpf"): 1.5,
    ("benchmark", "machine"): "a100",
    ("benchmark host", "shape"): "dream-7b",
    ("benchmark host", "machine"): "a100",
    ("benchmark host", "count"): 65,
    ("benchmark refresh", "block_sizes"): [8],
    ("benchmark refresh", "max_tokens"): 96,
    ("benchmark refresh", "tpf"): 1.5,
    ("benchmark refresh", "count"): 66,
    ("benchmark step", "answer_tokens"): 80,
    ("benchmark step", "window"): 16,
    ("benchmark step", "micro_batch_size"): 6,
    ("benchmark step", "machine"): "a100",
    ("benchmark distill", "warmup_steps"): 86,
    ("benchmark serve", "url"): "http://127.0.0.1:8123",
    ("benchmark distill", "log_every"): 43,
}
# Given instead of another setting, not beside it.
ALONE: dict[tuple[str, str], Any] = {
    ("benchmark", "shape"): "dream-7b",
    ("benchmark", "prompt_tokens"): 99,
    ("benchmark refresh", "shape"): "dream-7b",
    ("benchmark step", "shape"): "dream-7b",
}


def settings_class(verb: str) -> type[Settings]:
    return cli._load(VERBS[verb].settings)  # type: ignore[no-any-return]


def value_of_its_own(name: str, annotation: Any, default: Any, number: int) -> Any:
    """A value that neither is the default nor another setting's; plain data."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Literal:
        return next(choice for choice in reversed(get_args(annotation)) if choice != default)
    if get_origin(annotation) in (list, tuple):
        item = get_args(annotation)[0]
        return [value_of_its_own(name, item, None, number + offset) for offset in (0, 1)]
    if get_origin(annotation) is dict:
        return {"threshold": number / 128}
    if annotation is bool:
        return not default
    if annotation is int:
        return number + 2
    if annotation is float:
        return number / 128
    return f"own/{name}-{number}"


def own_values(verb: str) -> dict[str, Any]:
    values = {}
    for number, (name, field) in enumerate(settings_class(verb).model_fields.items(), start=1):
        if (verb, name) in ALONE or (verb, name) == ("benchmark step", "device"):  # one that this machine has
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        made = OWN[name] if name in OWN else value_of_its_own(name, field.annotation, default, number)
        values[name] = OF_VERB.get((verb, name), made)
        assert values[name] != default
    return values


def flags(name: str, value: Any) -> list[str]:
    """One setting as words of a command line."""
    if name == "path":
        return [value]
    if name == "texts":
        return [word for text in value for word in ("--texts", text)]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Call the command line with these words and return, as plain data, what the verb's function was given."""
    load, got = cli._load, []

    def fake(name: str) -> Any:
        return load(name) if name.endswith("Settings") else got.append

    def call(*words: str) -> dict[str, Any]:
        got.clear()
        monkeypatch.setattr(cli, "_load", fake)
        assert main(words) == 0
        monkeypatch.setattr(cli, "_load", load)
        (settings,) = got
        return settings.model_dump(mode="json")  # type: ignore[no-any-return]

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_arrives_in_either_spelling_and_from_a_file(
    verb: str, received: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = own_values(verb)
    wanted = settings_class(verb)(**values).model_dump(mode="json")
    assert {name for name, value in values.items() if wanted[name] != value} <= {"objective", "pairs"}  # with defaults
    given = [(name, flags(name, value)) for name, value in values.items()]
    assert received(*verb.split(), *(word for _, words in given for word in words)) == wanted
    kebab = [[words[0].replace("_", "-"), *words[1:]] if name != "path" else words for name, words in given]
    assert received(*verb.split(), *(word for words in kebab for word in words)) == wanted
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(values))
    assert received(*verb.split(), "--config", str(file)) == wanted


def test_what_excludes_another_setting_arrives_without_it(received: Callable[..., dict[str, Any]]) -> None:
    for verb in ("benchmark", "benchmark refresh", "benchmark step"):
        values = {name: value for (of, name), value in ALONE.items() if of == verb}
        got = received(*verb.split(), *(word for item in values.items() for word in flags(*item)))
        assert {name: got[name] for name in values} == values


GROUPS = [
    ("generate", "decoder_settings", {"steps": 8, "suffix": "none"}, "steps=4", {"steps": 4, "suffix": "none"}),
    ("trajectories", "decoder_settings", {"steps": 8, "block_size": 4}, "steps=4", {"steps": 4, "block_size": 4}),
    ("distill", "val_decoder_settings", {"steps": 8, "block_size": 4}, "steps=4", {"steps": 4, "block_size": 4}),
    ("ablate", "distill", {"lr": 0.5, "epochs": 3}, "lr=0.25", {"lr": "0.25", "epochs": 3}),
    ("evaluate", "anchors", {"a": "b", "c": "d"}, "a=e", {"a": "e", "c": "d"}),
    ("quickstart", "tune", {"count": 9, "actors": 1}, "count=7", {"count": "7", "actors": 1}),
    ("serve", "decoder_settings", {"steps": 8, "suffix": "none"}, "steps=4", {"steps": 4, "suffix": "none"}),
]


@pytest.mark.parametrize(("verb", "group", "in_file", "on_line", "wanted"), GROUPS)
def test_a_groups_flags_are_merged_with_its_file(
    verb: str,
    group: str,
    in_file: dict[str, Any],
    on_line: str,
    wanted: dict[str, Any],
    received: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    file = tmp_path / "own.yaml"
    needed = {name: "x" for name, field in settings_class(verb).model_fields.items() if field.is_required()}
    file.write_text(yaml.safe_dump({**needed, group: in_file}))
    assert received(*verb.split(), "--config", str(file), f"--{group}", on_line)[group] == wanted


def test_an_objective_is_merged_with_its_file_unless_it_is_another(
    received: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    objective = {"name": "windows", "noise_max": 0.875, "ce_weight": 0.125}
    file.write_text(yaml.safe_dump({"trajectories": "rows", "output": "student", "objective": objective}))
    words = ["distill", "--config", str(file)]
    got = received(*words, "--objective.ce-weight", "0.75")["objective"]
    assert (got["name"], got["noise_max"], got["ce_weight"]) == ("windows", 0.875, 0.75)
    got = received(*words, "--objective", '{"name": "block-diffusion"}')["objective"]
    assert got["name"] == "block-diffusion" and "noise_max" not in got
