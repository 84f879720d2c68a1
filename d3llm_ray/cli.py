"""The command line: `d3llm-ray VERB --config FILE.yaml --key value`.

A verb is a settings class and a function that takes its settings. Both are imported only when their verb is
called: `--help` and bad input answer at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from typing import TYPE_CHECKING, Any

from d3llm_ray import __version__
from d3llm_ray.errors import STORAGE_FAILURES, InputError, StorageError, WorkError, one_line, unknown
from d3llm_ray.paths import not_uploaded

if TYPE_CHECKING:
    from d3llm_ray.config import Settings

DONE, FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
EXIT_CODES = {
    DONE: "done",
    FAILED: "the work failed, or some rows or parts of it have no result; storage or a connection failed",
    BAD_INPUT: "bad input: a setting, file, model or package that is not what was asked for",
    INTERRUPTED: "interrupted (Ctrl-C, SIGTERM)",
    UNREAD: "nobody reads the output any more (`d3llm-ray ... | head`)",
}
UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Verb:
    """Where a verb's settings and function are, as `module:name`, and one line about it."""

    settings: str
    run: str
    help: str
    resumes: bool = False  # the same command goes on from what an interrupted one has finished


VERBS = {
    "quickstart": Verb(
        "d3llm_ray.quickstart.settings:QuickstartSettings",
        "d3llm_ray.quickstart.run:run",
        "the whole pipeline on one machine: trajectories, student, tuned settings, report, a served answer",
        resumes=True,
    ),
    "generate": Verb("d3llm_ray.generate:GenerateSettings", "d3llm_ray.generate:run", "answer prompts offline"),
    "trajectories": Verb(
        "d3llm_ray.trajectories.settings:TrajectorySettings",
        "d3llm_ray.trajectories.pipeline:run",
        "let a teacher decode prompts and keep the order in which it revealed every token (Ray Data)",
        resumes=True,
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
        resumes=True,
    ),
    "ablate": Verb(
        "d3llm_ray.ablation.settings:AblateSettings",
        "d3llm_ray.ablation.run:run",
        "distil with and without each part of a recipe, several seeds each, and compare (Ray Tune)",
        resumes=True,
    ),
    "evaluate": Verb(
        "d3llm_ray.evaluation.settings:EvaluateSettings",
        "d3llm_ray.evaluation.run:run",
        "measure accuracy, tokens per forward, tokens per second and AUP",
        resumes=True,
    ),
    "leaderboard": Verb(
        "d3llm_ray.leaderboard.settings:LeaderboardSettings",
        "d3llm_ray.leaderboard.run:run",
        "measure every system, each with its own best settings, and rank them by AUP beside the published tables",
        resumes=True,
    ),
    "aup": Verb(
        "d3llm_ray.leaderboard.anyone:AupSettings",
        "d3llm_ray.leaderboard.anyone:run",
        "score anyone's points of accuracy and tokens per forward, or the published ones",
    ),
    "check": Verb(
        "d3llm_ray.checks.settings:CheckSettings",
        "d3llm_ray.checks.run:run",
        "ask one of the paper's claims about decoding again, with intervals and a verdict",
        resumes=True,
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
    "benchmark serve": Verb(
        "d3llm_ray.benchmark.serving_settings:ServeBenchmarkSettings",
        "d3llm_ray.benchmark.serving:run",
        "measure what users see of a served model at every load, and how far its engine is from that",
    ),
    "tune": Verb(
        "d3llm_ray.tuning.settings:TuneSettings",
        "d3llm_ray.tuning.run:run",
        "search decoding settings on validation problems (Ray Tune, Optuna)",
        resumes=True,
    ),
    "serve": Verb(
        "d3llm_ray.serving.settings:ServeSettings",
        "d3llm_ray.serving.server:run",
        "serve a model behind an OpenAI-compatible API (Ray Serve)",
    ),
    "batch": Verb(
        "d3llm_ray.clients.settings:BatchSettings",
        "d3llm_ray.clients.batch:run",
        "answer a file of requests in OpenAI's batch format",
        resumes=True,
    ),
    "chat": Verb(
        "d3llm_ray.clients.settings:ChatSettings",
        "d3llm_ray.clients.chat:run",
        "talk to a model in the terminal and watch its canvas fill",
    ),
}

RENAMED = {"distill benchmark": "benchmark distill", "trajectories benchmark": "benchmark trajectories"}


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    codes = "\n".join(f"  {code:<{width}}  {meaning}" for code, meaning in EXIT_CODES.items())
    return (
        f"usage: d3llm-ray VERB [--config FILE.yaml] [--key value ...]\n\n{verbs}\n\n"
        "d3llm-ray VERB --help lists a verb's settings; --print-config prints the resolved ones.\n\n"
        f"exit codes:\n{codes}\n"
    )


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt  # so that SIGTERM cleans up exactly as Ctrl-C does


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; what goes wrong is one line on stderr. Returns one of `EXIT_CODES`."""
    try:
        try:
            return _call(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where it is noticed that nobody reads, and not when the interpreter ends
    except BrokenPipeError:
        _hang_up()
        return UNREAD


def _call(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), end="")
        return DONE if words else BAD_INPUT
    if words[0] == "--version":
        print(f"d3llm-ray {__version__}")
        return DONE
    signal.signal(signal.SIGTERM, _interrupt)
    verb, settings = None, None
    try:
        from d3llm_ray.config import parse, to_yaml  # pydantic may be what is missing

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
            return DONE
        result = _load(verb.run)(settings)
        if result is not None:
            print(result)
        return DONE
    except KeyboardInterrupt:
        code, line = INTERRUPTED, f"interrupted; {_what_stays(verb)}"
    except InputError as error:
        code, line = BAD_INPUT, str(error)
    except WorkError as error:
        code, line = FAILED, str(error)
    except ModuleNotFoundError as error:
        code, line = BAD_INPUT, f"{error}: {_how_to_install(error)}"
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _hang_up():
            return UNREAD
        code, line = _os_error(error, verb, settings)
    print(f"d3llm-ray: {line}", file=sys.stderr)
    return code


def _what_stays(verb: Verb | None) -> str:
    if verb is not None and verb.resumes:
        return "what is finished is kept, and the same command goes on from there"
    return "nothing is kept, and the same command begins anew"


def _os_error(error: OSError, verb: Verb | None, settings: Settings | None) -> tuple[int, str]:
    """Exit code and line of an error of the operating system, of a library or of a network."""
    cause = getattr(error, "cause", None)  # of an error in a worker; Ray's own is the worker's traceback
    error = cause if isinstance(cause, OSError) else error
    said = one_line(error) or type(error).__name__
    output = getattr(settings, "output", None)
    ours = output is not None and isinstance(error.filename, str) and _is_below(error.filename, str(output))
    if ours or isinstance(error, StorageError) or error.errno in {*STORAGE_FAILURES, errno.EROFS}:
        return FAILED, f"{said}; {_what_stays(verb)}"
    if isinstance(error, UNREADABLE) and error.filename is not None:
        return BAD_INPUT, f"cannot read {str(error.filename)!r}: {error.strerror}{not_uploaded(str(error.filename))}"
    return FAILED, said if error.errno is None else f"{type(error).__name__}: {said}"


def _is_below(path: str, folder: str) -> bool:
    real, top = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, top]) == top


def _how_to_install(error: ModuleNotFoundError) -> str:
    """What to do about a package that is missing; the error itself again where it is no dependency of ours."""
    module = (error.name or "").partition(".")[0]
    if module == "d3llm_ray":
        raise error
    requirements = []
    with suppress(PackageNotFoundError):
        requirements = requires("d3llm-ray") or []
    for requirement in requirements:
        package = re.split(r"[^\w.-]", requirement)[0]
        if re.sub(r"[-.]", "_", package).lower() == module.lower():
            extra = re.search(r"extra == [\"'](\w+)[\"']", requirement)
            return f'pip install "d3llm-ray[{extra[1]}]"' if extra else "pip install d3llm-ray"
    return f"pip install {module}"


def _hang_up() -> bool:
    """Whether nobody reads stdout or stderr any more (`d3llm-ray ... | head`); what is left goes nowhere then."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a stream without a descriptor, as in a notebook
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                gone = True
    return gone


if __name__ == "__main__":
    sys.exit(main())
