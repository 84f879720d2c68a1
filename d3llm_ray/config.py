"""Strict settings: one pydantic class a verb, filled from `--config FILE.yaml` and `--key value` overrides.

Every room at an edge defines its settings by subclassing `Settings`; the command line, the cluster jobs and the
YAML files all go through `parse`, so a default lives in one place and an unknown key is an error everywhere.
"""

from __future__ import annotations

import argparse
import re
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from d3llm_ray.errors import InputError, one_line
from d3llm_ray.paths import expanded, not_uploaded
from d3llm_ray.yaml_file import dump_yaml, parse_yaml
from d3llm_ray.yaml_file import read_yaml as read_yaml  # for those who read settings

S = TypeVar("S", bound="Settings")


def _as_in_yaml(values: Any) -> Any:
    """`--decoder-settings steps=64` gives text: take it as a YAML file's."""
    if not isinstance(values, dict):
        return values
    try:
        return {name: parse_yaml(value) if isinstance(value, str) else value for name, value in values.items()}
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


DecoderSettings = Annotated[dict[str, Any], BeforeValidator(_as_in_yaml)]  # setting of a decoder -> value


# Settings that are, or may be, a path; one name means the same in every verb. Those of type `Path` are paths anyway.
PATHS = {"model", "models", "teacher", "anchor_model", "anchors", "decoder", "decoders", "val_decoder", "task", "tasks"}
PATHS |= {"val_task", "prompts", "source", "trajectories", "reference_trajectories", "path", "output", "adapters"}
PATHS |= {"data_dir"}
PATHS_BY_NAME = {"anchors", "adapters"}  # mappings to paths


def _expanded(value: Any, field: str) -> Any:
    if isinstance(value, str | Path):
        return type(value)(expanded(value, field))
    if isinstance(value, dict):
        return {key: _expanded(inner, field) for key, inner in value.items()}
    return [_expanded(inner, field) for inner in value] if isinstance(value, list | tuple) else value


class SettingsGroup(BaseModel):
    """Base of settings within settings, such as one line of a list: frozen, unknown keys and old names refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    renamed: ClassVar[dict[str, str]] = {}  # old name -> today's, with a dot where it is inside another setting now

    @model_validator(mode="before")
    @classmethod
    def _expand_paths(cls, values: Any) -> Any:
        """`~` and environment variables, the same in every setting."""
        if not isinstance(values, dict):
            return values
        expanded_values = dict(values)
        for name in values.keys() & cls.model_fields.keys():
            value, annotation = values[name], cls.model_fields[name].annotation
            is_path = Path in (annotation, *get_args(annotation))
            group = isinstance(value, dict) and name not in PATHS_BY_NAME  # settings in themselves, as `tune`
            if is_path or (name in PATHS and not group):
                expanded_values[name] = _expanded(value, name)
        return expanded_values

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, values: Any) -> Any:
        names = {name: new for name, new in cls.renamed.items() if isinstance(values, dict) and name in values}
        if names:
            raise PydanticCustomError("renamed", "old names, and today's: {names}", {"names": names})
        return values


class Settings(SettingsGroup, BaseSettings):
    """Base of every verb's settings: a group that reads YAML and the command line, and no environment variables."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        protected_namespaces=(),
    )
    verb: ClassVar[str] = ""
    verbatim: ClassVar[frozenset[str]] = frozenset()  # lists of texts: a flag is an item, commas and brackets included
    positional: ClassVar[tuple[str, ...]] = ()  # settings that the words before the first flag are taken for, in order
    recipes: ClassVar[Path | None] = None  # folder of shipped YAML files, which `--config` takes by name as well

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class DecodingOptions(Settings):
    """What every verb that decodes with a model of its own is told."""

    max_tokens: int = Field(64, gt=0, description="canvas in tokens: what an answer may have at most")
    temperature: float = Field(0.0, ge=0.0, description="0 decodes greedily")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="sample from the likeliest tokens of this mass; 1: all")
    seed: int = Field(0, ge=0, description="seed of sampling")
    max_batch_size: int = Field(32, gt=0, description="requests decoded together")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("float32", description="precision of the weights")
    device: str = Field("cpu", description="cpu, cuda or cuda:N")


class TaskOptions(DecodingOptions):
    """What every verb that decodes the problems of named tasks is told."""

    data_dir: Path | None = Field(
        None, description="folder with the files of published tasks; null: that of D3LLM_RAY_DATA, else the Hub"
    )


def to_yaml(settings: Settings) -> str:
    return dump_yaml(settings.model_dump(mode="json"))


def recipe_file(name: str | Path, cls: type[Settings], field: str = "config") -> Path:
    """A YAML file by its path, or one that is shipped with these settings by its name; `InputError` for neither."""
    path = Path(expanded(name, field))
    if path.is_file() or cls.recipes is None:
        return path
    shipped = {file.stem: file for file in sorted(cls.recipes.glob("*.yaml"))}
    if str(name) not in shipped:
        accepted = f"a YAML file, or one of {', '.join(shipped)}"
        raise InputError(f"{field}: no file {str(name)!r}; accepted: {accepted}{not_uploaded(path)}")
    return shipped[str(name)]


def build(cls: type[S], values: dict[str, Any], within: str = "") -> S:
    """Validate `values`, or raise a one-line `InputError` that names each field at fault.

    `within`: the setting that holds the values, as `tune` of a quickstart does.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        raise InputError(_one_line(cls, error, within and f"{within}.")) from error


def _one_line(cls: type[Settings], error: ValidationError, prefix: str) -> str:
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "renamed":
            names = item["ctx"]["names"].items()
            lines += [_renamed(".".join([field, old] if field else [old]), new) for old, new in names]
        elif item["type"] == "extra_forbidden":
            accepted = ", ".join(_group_at(cls, item["loc"][:-1]).model_fields)
            lines.append(f"{field}: unknown setting; accepted: {accepted}")
        elif item["type"] == "missing":
            lines.append(f"{field}: required")
        elif message.startswith(field):  # a validator of ours (or of the whole model) has named the field itself
            lines.append(message)
        else:
            lines.append(f"{field}: got {item['input']!r}: {message}")
    return "; ".join(prefix + line for line in lines)


def _group_at(cls: type[SettingsGroup], location: tuple[int | str, ...]) -> type[SettingsGroup]:
    """The group of settings that is found at `location` within `cls`, such as one line of a list."""
    group = cls
    for part in location:
        if part in group.model_fields:
            kinds = [group.model_fields[str(part)].annotation]
            while kinds:
                kind = kinds.pop()
                if isinstance(kind, type) and issubclass(kind, SettingsGroup):
                    group = kind
                    break
                kinds += get_args(kind)
    return group


def _renamed(field: str, new: str) -> str:
    return f"{field}: is called {new} now"


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `override`, mappings within both likewise.

    A mapping that names another `name` is of another kind and replaces the whole; a text beside a mapping is a name.
    """
    merged = dict(base)
    for key, value in override.items():
        known = merged.get(key)
        if isinstance(known, dict) and isinstance(value, str):
            value = {"name": value}
        if isinstance(known, str) and isinstance(value, dict):
            known = {"name": known}
        if isinstance(known, dict) and isinstance(value, dict):
            same_kind = known.get("name", value.get("name")) == value.get("name", known.get("name"))
            value = merge(known, value) if same_kind else value
        merged[key] = value
    return merged


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `InputError`s (one line, exit code 2 at the command line)."""

    accepted = ""

    def error(self, message: str) -> NoReturn:
        accepted = f"; accepted: {self.accepted}" if "unrecognized arguments" in message else ""
        raise InputError(f"{self.prog}: {message}{accepted}")


def parse(cls: type[S], argv: list[str], prog: str | None = None) -> tuple[S, bool]:
    """Resolve defaults < YAML file < command line. Returns the settings and whether `--print-config` was given."""
    parser = _Parser(prog=prog or f"d3llm-ray {cls.verb}", description=(cls.__doc__ or "").strip(), allow_abbrev=False)
    parser.accepted = ", ".join(f"--{name.replace('_', '-')}" for name in ("config", "print_config", *cls.model_fields))
    named = " or the name of a shipped recipe" if cls.recipes else ""
    text = f"read settings from a YAML file{named}; flags override it"
    parser.add_argument("--config", metavar="FILE.yaml", help=text)
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and exit")
    common, rest = _split_own(parser, [_kebab(word, cls) for word in _name_positional(argv, cls)])
    texts, rest = _split_verbatim(rest, cls)
    source: CliSettingsSource[Any] = CliSettingsSource(cls, root_parser=parser, cli_prog_name=parser.prog)
    try:
        flags = source(args=rest)()
    except SettingsError as error:
        of = re.search(r"error encountered for (\w+)", str(error))
        line = f"{of[1]}: not in the form that is accepted: NAME=VALUE,..., or JSON" if of else str(error)
        raise InputError(one_line(line)) from error
    file_values = read_yaml(recipe_file(common.config, cls)) if common.config else {}
    values = merge(file_values, {**flags, **texts})
    for name in PATHS & values.keys() & cls.model_fields.keys():
        given = values[name] if isinstance(values[name], list) else [values[name]]
        if "" in given and cls.model_fields[name].default != "":  # else the working directory would be meant
            raise InputError(f"{name}: got ''; accepted: a name or a path")
    return build(cls, values), common.print_config


def _name_positional(argv: list[str], cls: type[Settings]) -> list[str]:
    """`batch IN OUT --url X` as `batch --input IN --output OUT --url X`."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))[: len(cls.positional)]
    return [*(f"--{name}={word}" for name, word in zip(cls.positional, words, strict=False)), *argv[len(words) :]]


def _kebab(word: str, cls: type[Settings]) -> str:
    """Accept `--max_tokens 5`, `--max_tokens=5` and `--no-early_exit`, as YAML files spell it, beside `--max-tokens`.

    `InputError` for a flag of an old name.
    """
    flag, equals, value = word.partition("=")
    name = flag[2:].removeprefix("no-") if flag.startswith("--") else ""
    old = name.replace("-", "_")
    if old in cls.renamed:
        raise InputError(_renamed(old, cls.renamed[old]))
    known = name.partition(".")[0] in cls.model_fields
    return f"{flag.replace('_', '-')}{equals}{value}" if known else word


def _split_verbatim(argv: list[str], cls: type[Settings]) -> tuple[dict[str, list[str]], list[str]]:
    """Values of `verbatim` flags by setting, and the other words."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in sorted(cls.verbatim):
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, action="append")
    values, rest = parser.parse_known_args(argv)
    return {name: texts for name, texts in vars(values).items() if texts is not None}, rest


def _split_own(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    own_parser = _Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    own_parser.add_argument("--config")
    own_parser.add_argument("--print-config", action="store_true")
    return own_parser.parse_known_args(argv)
