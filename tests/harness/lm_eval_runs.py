"""Runs of lm-eval, as it is, and small tasks of local files for it. Nothing leaves this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "OPENAI_API_KEY": "none"}


@contextmanager
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        yield


def local_task(folder: Path, rows: Sequence[dict[str, Any]], **config: Any) -> dict[str, Any]:
    """A task `local` over `rows`, which are written into `folder`, with what a task of generated answers needs."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **config,
    }


def run(model: str, model_args: dict[str, Any], task: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list]:
    """Metrics of a task, and what the model answered to each row, in order."""
    harness = pytest.importorskip("lm_eval")
    if model == "d3llm":
        from d3llm_ray.harness.model import register

        register()
    from lm_eval.tasks import TaskManager

    with offline():
        results = harness.simple_evaluate(
            model=model,
            model_args=model_args,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),  # else thousands of files are read first
            log_samples=True,
            bootstrap_iters=0,
            **options,
        )
    by_doc: dict[int, list[Any]] = {}
    for sample in results["samples"][task["task"]]:
        by_doc[sample["doc_id"]] = [answer[0] for answer in sample["resps"]]
    return results["results"][task["task"]], [by_doc[number] for number in sorted(by_doc)]
