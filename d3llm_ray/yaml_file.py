"""Reading a YAML file, for the core as well as for settings: no pydantic here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from d3llm_ray.errors import InputError, one_line
from d3llm_ray.paths import expanded, not_uploaded


class DuplicateKey(yaml.YAMLError):
    """A mapping says a key twice; YAML's own loaders take the last in silence."""


class _Loader(yaml.SafeLoader):
    """YAML as users expect it: a key comes once, and `3e-1` is a number (YAML 1.1 wants `3.0e-1`)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before `<<` is resolved, which may repeat a key
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise DuplicateKey(f"key {key.value!r} stands in line {lines[name]} and again in line {line}")
            lines[name] = line
        return node


class _Dumper(yaml.SafeDumper):
    """What `_Loader` reads back unchanged."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str) -> Any:
    """The content of YAML; `yaml.YAMLError` where it is none, also for a key that comes twice."""
    return yaml.load(text, _Loader)


def dump_yaml(values: Any) -> str:
    """YAML that `parse_yaml` reads back unchanged, keys in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


def read_yaml(path: str | Path, field: str = "config") -> dict[str, Any]:
    """Read a YAML mapping, or raise `InputError` naming `field`, the file and what is wrong with it."""
    try:
        content = parse_yaml(Path(expanded(path, field)).read_text())
    except OSError as error:
        raise InputError(
            f"{field}: cannot read {str(path)!r}: {error.strerror}; accepted: a readable YAML file"
            f"{not_uploaded(expanded(path, field))}"
        ) from error
    except DuplicateKey as error:
        raise InputError(f"{field}: {str(path)!r}: {error}; accepted: every key once") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise InputError(f"{field}: {str(path)!r} is not YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{field}: {str(path)!r} holds {type(content).__name__}; accepted: a mapping of settings")
    for name in content:
        if not isinstance(name, str):
            raise InputError(f"{field}: {str(path)!r} holds the key {name!r}; accepted: names of settings")
    return content
