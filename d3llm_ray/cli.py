"""The command line: `d3llm-ray VERB --config FILE.yaml --key value`.

A verb is a settings class and a function that takes its settings. Both are imported only when their verb is
called: `--help` and bad input answer at once.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d3llm_ray import __version__
from d3llm_ray.config import Settings, parse, to_yaml
from d3llm_ray.errors import DecodingError, IncompleteError, InputError, unknown


@dataclass(frozen=True)
class Verb:
    """Where a verb's settings and function are, as `module:name`, and one line about it."""

    settings: str
    run: str
    help: str


VERBS = {
    "quickstart": Verb(
        "d3llm_ray.quickstart.settings:QuickstartSettings",
        "d3llm_ray.quickstart.run:run",
        "the whole pipeline on one machine: trajectories, student, tuned settings, report, a served answer",
    ),
    "generate": Verb("d3llm_ray.generate:GenerateSettings", "d3llm_ray.generate:run", "answer prompts offline"),
    "trajectories": Verb(
        "d3llm_ray.trajectories.settings:TrajectorySettings",
        "d3llm_ray.trajectories.pipeline:run",
        "let a teacher decode prompts and keep the order in which it revealed every token (Ray Data)",
    ),
    "trajectories import": Verb(
        "d3llm_ray.trajectories.importer:ImportSettings",
        "d3llm_ray.trajectories.importer:run",
        "turn a published trajectory or distillation dataset into trajectory rows",
    ),
    "trajectories inspect": Verb(
        "d3llm_ray.trajectories.inspection:InspectSettings",
        "d3llm_ray.trajectories.inspection:run",
        "say what a trajectory dataset holds, draw one row and play it in the terminal",
    ),
    "distill": Verb(
        "d3llm_ray.distillation.settings:DistillSettings",
        "d3llm_ray.distillation.run:run",
        "train a student on a teacher's trajectories (Ray Train, DeepSpeed, LoRA)",
    ),
    "ablate": Verb(
        "d3llm_ray.ablation.settings:AblateSettings",
        "d3llm_ray.ablation.run:run",
        "distil with and without each part of a recipe, several seeds each, and compare (Ray Tune)",
    ),
    "evaluate": Verb(
        "d3llm_ray.evaluation.settings:EvaluateSettings",
        "d3llm_ray.evaluation.run:run",
        "measure accuracy, tokens per forward, tokens per second and AUP",
    ),
    "benchmark": Verb(
        "d3llm_ray.benchmark.settings:BenchmarkSettings",
        "d3llm_ray.benchmark.run:run",
        "measure decoding speed against what the machine allows, on a model or on a published shape",
    ),
    "benchmark host": Verb(
        "d3llm_ray.benchmark.settings:HostBenchmarkSettings",
        "d3llm_ray.benchmark.run:run_host",
        "measure the host's share of a decoding step, with a model that costs nothing",
    ),
    "benchmark step": Verb(
        "d3llm_ray.benchmark.settings:StepBenchmarkSettings",
        "d3llm_ray.benchmark.run:run_step",
        "measure one optimizer step of a distillation, on a model or on a published shape",
    ),
    "benchmark distill": Verb(
        "d3llm_ray.benchmark.distill:DistillBenchmarkSettings",
        "d3llm_ray.benchmark.distill:run",
        "measure samples a second of a bare loop, of the job, and of the job with more workers",
    ),
    "benchmark trajectories": Verb(
        "d3llm_ray.benchmark.trajectories:TrajectoryBenchmarkSettings",
        "d3llm_ray.benchmark.trajectories:run",
        "measure rows a second of one process, of the job, and of the job with more actors",
    ),
    "tune": Verb(
        "d3llm_ray.tuning.settings:TuneSettings",
        "d3llm_ray.tuning.run:run",
        "search decoding settings on validation problems (Ray Tune, Optuna)",
    ),
    "serve": Verb(
        "d3llm_ray.serving.settings:ServeSettings",
        "d3llm_ray.serving.server:run",
        "serve a model behind an OpenAI-compatible API (Ray Serve)",
    ),
}

RENAMED = {"distill benchmark": "benchmark distill", "trajectories benchmark": "benchmark trajectories"}


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return (
        f"usage: d3llm-ray VERB [--config FILE.yaml] [--key value ...]\n\n{verbs}\n\n"
        "d3llm-ray VERB --help lists a verb's settings; --print-config prints the resolved ones.\n"
    )


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt  # so that SIGTERM cleans up exactly as Ctrl-C does


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 storage that fails or rows without a result, 2 bad input (one line
    on stderr each), 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"d3llm-ray {__version__}")
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        pair = " ".join(words[:2])
        if pair in RENAMED:
            raise InputError(f"verb: {pair!r} is called {RENAMED[pair]!r} now")
        length = 2 if pair in VERBS else 1
        name = " ".join(words[:length])
        if name not in VERBS:
            raise unknown("verb", name, VERBS)
        verb = VERBS[name]
        settings_class: type[Settings] = _load(verb.settings)
        settings, print_only = parse(settings_class, words[length:])
        if print_only:
            print(to_yaml(settings), end="")
            return 0
        result = _load(verb.run)(settings)
        if result is not None:
            print(result)
        return 0
    except InputError as error:
        print(f"d3llm-ray: {error}", file=sys.stderr)
        return 2
    except (DecodingError, IncompleteError) as error:
        print(f"d3llm-ray: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a lost network share
        print(f"d3llm-ray: {error}; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "d3llm-ray: interrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
