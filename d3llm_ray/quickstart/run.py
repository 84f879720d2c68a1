"""Every stage in order, each skipped when its output is complete."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from openai import OpenAI

from d3llm_ray import cluster
from d3llm_ray.config import to_yaml
from d3llm_ray.distillation.run import run as distill
from d3llm_ray.errors import InputError, require
from d3llm_ray.evaluation.report import EvaluationReport
from d3llm_ray.evaluation.run import run as evaluate
from d3llm_ray.models import resolve_model
from d3llm_ray.output_folder import check_folder, claim, named, sole_writer
from d3llm_ray.paths import not_uploaded
from d3llm_ray.progress import Progress
from d3llm_ray.quickstart.contents import MARKER, clear, entries
from d3llm_ray.quickstart.memory import PeakMemory
from d3llm_ray.quickstart.settings import QuickstartSettings
from d3llm_ray.report import check_output, write_text
from d3llm_ray.serving.server import serve_in_background
from d3llm_ray.tasks import load_task
from d3llm_ray.trajectories.pipeline import write_trajectories
from d3llm_ray.tuning.run import run as tune

STAGES = ("trajectories", "distill", "tune", "evaluate", "serve")


@dataclass
class Stages:
    """Names the stage on the progress display and takes its time."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        self.progress.prefix = f"[{STAGES.index(name) + 1}/{len(STAGES)}] "
        started = time.perf_counter()
        yield self.progress
        self.progress.finish()
        self.seconds[name] = round(time.perf_counter() - started, 1)


@sole_writer
def run(settings: QuickstartSettings, progress: Progress | None = None) -> str:
    """Run what is not finished yet, print nothing; returns the table with the served answer and the timings.

    Leaves in `settings.output`: `trajectories/`, `student/`, `tuning/`, `settings.yaml` (decoding), `report.json`,
    `report.md`, `accuracy_vs_tpf.png` and `quickstart.yaml` / `quickstart.json` (these settings; times, memory,
    answer). Raises `InputError` before anything starts.
    """
    _check(settings)
    output = settings.output
    if settings.fresh:
        clear(output)
    claim(output, MARKER, settings)
    evaluation = settings.evaluate_settings()
    if evaluation.output == output:
        write_text(output / "evaluate.yaml", to_yaml(evaluation))  # the folder is that stage's as well
    stages, had_ray = Stages(progress or Progress()), ray.is_initialized()
    with PeakMemory() as memory:
        try:
            cluster.connect()
            with stages.stage("trajectories") as shown:
                write_trajectories(settings.trajectory_settings(), shown)
            with stages.stage("distill") as shown:
                distill(settings.distill_settings(), shown)
            with stages.stage("tune") as shown:
                write_text(settings.decoding, tune(settings.tune_settings(), shown, "return").read_text())
            with stages.stage("evaluate") as shown:
                report = evaluate(settings.evaluate_settings(), shown, "return")
            with stages.stage("serve") as shown, serve_in_background(settings.serve_settings(), shown) as url:
                answer = ask(url, settings.question)
        finally:
            if not had_ray:
                ray.shutdown()
    summary = {"seconds": stages.seconds, "peak_memory_gib": round(memory.peak / 2**30, 2), "answer": answer}
    write_text(output / "quickstart.json", json.dumps(summary, indent=2) + "\n")
    return _closing(settings, report, summary)


def _check(settings: QuickstartSettings) -> None:
    """Refuse what can be known to be wrong before minutes are spent on the first stage."""
    resolve_model(settings.teacher)
    problems = load_task(settings.task).problems("test", 1)
    require(problems[0].reference is not None, "task", settings.task, "a task whose problems have a reference")
    settings.serve_settings()
    outputs: dict[str, str | Path] = {
        "trajectories": settings.trajectory_settings().output,
        "distill": settings.distill_settings().output,
        "tune": settings.tune_settings().output,
        "evaluate": settings.evaluate_settings().output,
    }
    space = settings.tune_settings().space
    if not space.is_file():
        raise InputError(
            f"tune.space: no file {str(space)!r} from here; accepted: a search space in YAML{not_uploaded(space)}"
        )
    check_folder(settings.output, MARKER, QuickstartSettings)
    for name, output in outputs.items():
        if "://" not in str(output):
            check_output(output, f"{name}.output", folder=True)
    if settings.fresh and settings.output.is_dir() and (strange := entries(settings.output)[1]):
        raise InputError(
            f"output: {str(settings.output)!r} holds {named(strange)}, which no quickstart has written; accepted with "
            "--fresh: a quickstart's folder and nothing else in it"
        )


def ask(url: str, question: str) -> dict[str, Any]:
    """One question through the `openai` client, as any user of the endpoint would ask it."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=2) as client:
        model = client.models.list().data[0].id
        reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
    assert reply.usage is not None
    return {
        "model": model,
        "question": question,
        "text": reply.choices[0].message.content,
        "finish_reason": reply.choices[0].finish_reason,
        "usage": reply.usage.model_dump(),
    }


def _closing(settings: QuickstartSettings, report: EvaluationReport, summary: dict[str, Any]) -> str:
    answer, seconds = summary["answer"], summary["seconds"]
    usage = answer["usage"]
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return "\n".join(
        (
            report.rows_table(),
            f"asked     {answer['question']}",
            *(f"          {line}" for line in answer["text"].splitlines()),
            f"          ({usage['completion_tokens']} tokens in {usage['forwards']} forwards)",
            f"took      {sum(seconds.values()):.0f} s ({times}), peak memory {summary['peak_memory_gib']} GiB",
            f"written   {_relative(settings.output)}/: report.md, accuracy_vs_tpf.png, student/, settings.yaml",
            f"serve it  d3llm-ray serve --model {_relative(settings.student)} --decoder {_relative(settings.decoding)}",
        )
    )


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
