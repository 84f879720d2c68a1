"""The search itself: Ray Tune with Optuna's TPE sampler over evaluators that stay warm between trials."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import optuna
from ray import cloudpickle, tune
from ray.tune import ResultGrid
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from d3llm_ray.errors import WorkError, one_line
from d3llm_ray.evaluation.pool import EnginePool, EngineWork
from d3llm_ray.progress import Progress
from d3llm_ray.tuning.domains import domains
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial
from d3llm_ray.tuning.outcomes import deal
from d3llm_ray.tuning.racing import ExpectedFigures, Racing
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace
from d3llm_ray.tuning.trial import FIGURES, run_trial

SEARCH_FOLDER = "search"
_TRIAL_CPUS = 0.1  # a trial only waits for the evaluators


class _ShowTrials(tune.Callback):
    """Forwards finished trials to the progress display.

    The display is held by the class: Tune pickles its callbacks to be able to restore a search, and a display
    that draws on this process' terminal cannot go along.
    """

    display: ClassVar[Progress | None] = None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        results = [item.last_result for item in trials if "score" in (item.last_result or {})]
        whole = [result["score"] for result in results if not result["shards_left"]]
        if self.display is not None and whole:
            ended = sum(result["done"] for result in results)
            self.display.update(ended, best=max(whole), stopped=ended - len(whole))


def search(
    settings: TuneSettings,
    space: SearchSpace,
    points: Sequence[dict[str, Any]],
    objective: SearchObjective,
    pool: EnginePool,
    work: EngineWork,
    progress: Progress,
) -> list[TuneTrial]:
    """Run the trials that are missing in `settings.output / "search"`; returns all of them, in order of completion.

    `work` says what is measured of each; `points` are tried first. An interrupted search goes on where it stopped:
    finished and stopped trials are kept, failed and unfinished ones run again. One whose state is torn or another
    version's begins anew, and this is said.

    Raises:
        RuntimeError: trials failed, or none was finished within `time_budget_s`.
        KeyboardInterrupt: the search was stopped before its end.
    """
    shards = deal(settings.count, _shards(settings), settings.seed)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, pool=pool, work=work, objective=objective, shards=shards), {"cpu": _TRIAL_CPUS}
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the progress display says what matters
    folder = settings.output.resolve() / SEARCH_FOLDER
    tuner = _restored_tuner(trainable, folder, progress)
    tuner = tuner or _new_tuner(settings, space, points, objective, trainable, folder)
    with progress.stage("tune", settings.trials, "trial"):
        _ShowTrials.display = progress
        begun = time.monotonic()
        try:
            grid = tuner.fit()
        finally:
            _ShowTrials.display = None
    spent = settings.time_budget_s is not None and time.monotonic() - begun >= settings.time_budget_s
    trials = _trials(grid, settings.trials, spent)
    if len(trials) < settings.trials:
        progress.note(f"time_budget_s: {len(trials)} of {settings.trials} trials in {settings.time_budget_s:g} s")
    # Of a restored search too: what was measured holds, whatever anchor it was scored by.
    return [_rescored(trial, objective) for trial in trials]


def _rescored(trial: TuneTrial, objective: SearchObjective) -> TuneTrial:
    score = objective.score(trial.tpf, trial.accuracy, trial.tps)
    return replace(trial, score=score, aup=objective.aup(trial.tpf, trial.accuracy))


def _shards(settings: TuneSettings) -> int:
    """Without a race there is nothing to stop for; and every evaluator has a problem of each shard."""
    return 1 if settings.racing == "none" else max(1, min(settings.shards, settings.count // settings.actors))


def _restored_tuner(trainable: Any, folder: Path, progress: Progress) -> tune.Tuner | None:
    """The interrupted search in the folder; None where there is none, or what is there cannot be read."""
    if not folder.exists():
        return None
    try:
        read_state(folder)
        # A new trainable: the handles of the evaluators that the interrupted search knew are dead.
        return tune.Tuner.restore(str(folder), trainable=trainable, resume_errored=True)
    except Exception as error:  # pickles of a torn or other version's state fail in any way
        reason = one_line(f"{type(error).__name__}: {error}")
        aside = folder.with_name(f"{folder.name}.unusable-{len(list(folder.parent.glob(f'{folder.name}.*')))}")
        folder.rename(aside)
        progress.note(f"the search begins anew, as the interrupted one, now {aside}, cannot be restored: {reason}")
        return None


def read_state(folder: Path) -> None:
    """Read what Tune restores a search from, some of it only when it runs; raises anything where that would fail."""
    newest = max(folder.glob("experiment_state-*.json"), key=lambda path: path.name, default=None)
    if newest is None:
        raise FileNotFoundError("experiment_state-*.json")
    if not json.loads(newest.read_text(encoding="utf-8"))["trial_data"]:
        raise ValueError(f"{newest.name} has no trial")
    for file in (*folder.glob("*.pkl"), *folder.glob("search_gen_state-*.json")):  # a pickle, whatever its name
        cloudpickle.loads(file.read_bytes())


def _new_tuner(
    settings: TuneSettings,
    space: SearchSpace,
    points: Sequence[dict[str, Any]],
    objective: SearchObjective,
    trainable: Any,
    folder: Path,
) -> tune.Tuner:
    several = len(objective.goals) > 1
    algorithm = OptunaSearch(
        metric=list(objective.goals) if several else objective.goals[0],
        mode=["max"] * len(objective.goals) if several else "max",
        sampler=_sampler(settings, several),
        points_to_evaluate=list(points) or None,
    )
    return tune.Tuner(
        trainable,
        param_space=domains(space),
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            scheduler=_scheduler(settings, objective),
            num_samples=settings.trials,
            max_concurrent_trials=settings.concurrent_trials,
            time_budget_s=settings.time_budget_s,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,  # the default spells out every value
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[ExpectedFigures(objective), _ShowTrials()],  # the former before the loggers, which come last
            verbose=0,
        ),
    )


def _sampler(settings: TuneSettings, several: bool) -> optuna.samplers.BaseSampler:
    """Both learn from random trials first; by their own defaults, of 10 and 50, a short search would be random."""
    if several:
        return optuna.samplers.NSGAIISampler(seed=settings.seed, population_size=max(4, min(50, settings.trials // 5)))
    return optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=max(2, min(10, settings.trials // 3)))


def _scheduler(settings: TuneSettings, objective: SearchObjective) -> TrialScheduler | None:
    if settings.racing == "bound":
        return Racing(objective)
    if settings.racing == "none":
        return None
    return ASHAScheduler(metric="score", mode="max", max_t=_shards(settings), grace_period=1, reduction_factor=3)


def _trials(grid: ResultGrid, expected: int, spent: bool) -> list[TuneTrial]:
    """The trials that have ended, by themselves or in a race; fewer than `expected` only where the time is `spent`."""
    if grid.num_errors:
        reason = str(grid.errors[0]).strip().splitlines()[-1]  # below its traceback
        raise WorkError(f"{grid.num_errors} of {expected} trials failed, the first with: {reason}")
    results = [grid[index] for index in range(len(grid))]
    ended = [result for result in results if "score" in (found := result.metrics or {}) and found["done"]]
    if len(ended) < expected and not spent:
        # Tune turns Ctrl-C into an orderly end of its own; for the caller it still is one.
        raise KeyboardInterrupt(f"search stopped after {len(ended)} of {expected} trials; run it again to go on")
    if not any((result.metrics or {})["shards_left"] == 0 for result in ended):
        raise WorkError("time_budget_s: no trial was finished in this time; run it again to go on")
    ended.sort(key=lambda result: float((result.metrics or {})["finished"]))  # a restored grid has another order
    return [_trial(number, result.config or {}, result.metrics or {}) for number, result in enumerate(ended)]


def _trial(number: int, values: dict[str, Any], metrics: dict[str, Any]) -> TuneTrial:
    return TuneTrial(
        number=number,
        values=dict(values),
        score=metrics["score"],
        **{name: metrics[name] for name in FIGURES},
        unanswered=tuple(json.loads(metrics["unanswered"])),
        stopped=metrics["shards_left"] > 0,
        aup=metrics["aup"],
    )
