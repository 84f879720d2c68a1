"""What a quickstart leaves, file by file: `--fresh` removes that and nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path

from d3llm_ray.distillation.preparation import LAST, SETTINGS_FILE
from d3llm_ray.distillation.student import ADAPTER
from d3llm_ray.distillation.training.metrics_file import METRICS_FILE
from d3llm_ray.distillation.training.trackers import TENSORBOARD
from d3llm_ray.distillation.training.validation import BEST, SCORE_FILE
from d3llm_ray.models.checkpoint import TOKENIZER_FILES, WEIGHTS
from d3llm_ray.report import PARTIAL
from d3llm_ray.trajectories.schema import ERRORS
from d3llm_ray.trajectories.shards import SHARD, STAGING
from d3llm_ray.trajectories.storage import LEFTOVER, STARTED, SUCCESS

MARKER = "quickstart.yaml"


def _any(*patterns: str) -> str:
    return f"(?:{'|'.join(patterns)})"


_staged = _any(r"(?:prompts|remaining)/prompts-\d+\.parquet", r"parts/part-\d+-[0-9a-f]+\.parquet", r"manifest\.json")
_trajectories = _any(
    SHARD.pattern,
    *map(re.escape, (ERRORS, SUCCESS, STARTED, "settings.yaml", "summary.json")),
    f"{STAGING}/{_staged}",
)
_checkpoint = _any(
    WEIGHTS.pattern, *map(re.escape, (*TOKENIZER_FILES, "config.json", "generation_config.json", SCORE_FILE))
)
_student = _any(
    f"(?:(?:{BEST}|{LAST})/)?{_checkpoint}",
    f"(?:(?:{BEST}|{LAST})/)?{ADAPTER}/(?:adapter_[a-z.]+|README\\.md)",  # peft writes a card
    *map(re.escape, (SETTINGS_FILE, METRICS_FILE, "loss.png")),
    f"{TENSORBOARD}/.*",
)
_tuning = _any(
    *map(re.escape, ("tune.yaml", "space.yaml", "model.json", "decoder.json", "anchor.yaml", "settings.yaml")),
    *map(re.escape, ("trials.csv", "trials.json", "pareto.json", "pareto.png", "heat_map.png", "report.md")),
    "search/.*",  # Ray Tune's own
)
_top = (MARKER, "quickstart.json", "settings.yaml", "evaluate.yaml", "report.md", "report.json", "accuracy_vs_tpf.png")
OURS = re.compile(
    _any(
        *map(re.escape, _top),
        f"trajectories/{_trajectories}",
        f"student/{_student}",
        f"tuning/{_tuning}",
        r"samples/[\w-]+\.(?:parquet|jsonl)",
        r"prompts/[\w-]+\.txt",
        "trajectories|student|tuning|samples|prompts",  # where these are links
        r"\.student\.[0-9a-f]{12}\.partial/.*",  # half done
        rf"(?:.*/)?{_any(PARTIAL.pattern, LEFTOVER.pattern)}",
    )
)


def entries(output: Path) -> tuple[list[str], list[str]]:
    """Files below the folder by their names in it: those that a quickstart writes, and all others but hidden ones.

    A link counts as a file, whatever it leads to.
    """
    ours, strange = [], []
    for folder, folders, files in os.walk(output):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*files, *links]):
            path = os.path.relpath(os.path.join(folder, name), output)
            if OURS.fullmatch(path):
                ours.append(path)
            elif not name.startswith("."):
                strange.append(path)
    return ours, strange


def clear(output: Path) -> None:
    """Remove what quickstarts have written, the marker last: what is interrupted can be repeated."""
    for name in sorted(entries(output)[0], key=lambda name: name == MARKER):
        (output / name).unlink()
    for folder, folders, _ in os.walk(output, topdown=False):
        for name in folders:
            path = Path(folder, name)
            if not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()
