"""The anchor of a search: what one token a forward reaches, kept with a name of all that it depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from d3llm_ray.config import read_yaml
from d3llm_ray.errors import InputError, require
from d3llm_ray.progress import Progress
from d3llm_ray.report import write_text
from d3llm_ray.tuning.outcomes import read_outcomes
from d3llm_ray.yaml_file import dump_yaml


@dataclass(frozen=True)
class Anchor:
    """Tokens per forward and accuracy (percent) of the plain decoder; `unanswered` counted as wrong.

    `held_out`: its outcomes on the held-out problems as `write_outcomes` has them, empty where there are none, with
    `held_out_tps`.
    """

    tpf: float
    accuracy: float
    key: str  # of the model, problems and settings that it was measured with
    unanswered: tuple[str, ...] = ()
    held_out: str = ""
    held_out_tps: float = 0.0


def write_anchor(path: Path, anchor: Anchor) -> None:
    write_text(path, dump_yaml({**asdict(anchor), "unanswered": list(anchor.unanswered)}))


def read_anchor(path: Path) -> Anchor:
    """What `write_anchor` has written; `InputError` for anything else."""
    values = read_yaml(path, "anchor")
    try:
        figures = float(values["tpf"]), float(values["accuracy"])
        held_out = str(values["held_out"]), float(values["held_out_tps"])
        read_outcomes(held_out[0] or "[]")
        return Anchor(*figures, str(values["key"]), tuple(map(str, values["unanswered"])), *held_out)
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(f"anchor: {path} is damaged or another version's: {type(error).__name__}: {error}") from error


def known_anchor(path: Path, key: str, progress: Progress) -> Anchor | None:
    """The anchor that is kept under this key; None where there is none, which is said where there is another."""
    if not path.is_file():
        return None
    try:
        anchor = read_anchor(path)
        require(anchor.key == key, "anchor", anchor.key, f"{key}; {path} was measured with other settings")
        return anchor
    except InputError as error:
        progress.note(f"the anchor is measured again: {error}")
        return None
