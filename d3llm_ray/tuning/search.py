"""The search itself: Ray Tune with Optuna's TPE sampler over evaluators that stay warm between trials."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import optuna
from ray import cloudpickle, tune
from ray.tune import ResultGrid
from ray.tune.search.optuna import OptunaSearch

from d3llm_ray.errors import WorkError, one_line
from d3llm_ray.progress import Progress
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import Range, SearchSpace, ValueChoice
from d3llm_ray.tuning.trial import FIGURES, Pool, run_trial

SEARCH_FOLDER = "search"
_TRIAL_CPUS = 0.1  # a trial only waits for the evaluators


class _ShowTrials(tune.Callback):
    """Forwards finished trials to the progress display.

    The display is held by the class: Tune pickles its callbacks to be able to restore a search, and a display
    that draws on this process' terminal cannot go along.
    """

    display: ClassVar[Progress | None] = None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.display is None:
            return
        scores = [item.last_result["score"] for item in trials if "score" in (item.last_result or {})]
        self.display.update(len(scores), best=max(scores))


def search(
    settings: TuneSettings, space: SearchSpace, objective: SearchObjective, pool: Pool, progress: Progress
) -> list[TuneTrial]:
    """Run the trials that are missing in `settings.output / "search"`; returns all of them, in order of completion.

    An interrupted search goes on where it stopped: finished trials are kept, failed and unfinished ones run again. One
    whose state is torn or another version's begins anew, and this is said.

    Raises:
        RuntimeError: trials failed.
        KeyboardInterrupt: the search was stopped before its end.
    """
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, pool=pool, objective=objective, base=space.decoding_settings({})),
        {"cpu": _TRIAL_CPUS},
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the progress display says what matters
    folder = settings.output.resolve() / SEARCH_FOLDER
    tuner = _restored_tuner(trainable, folder, progress) or _new_tuner(settings, space, trainable, folder)
    with progress.stage("tune", settings.trials, "trial"):
        _ShowTrials.display = progress
        try:
            grid = tuner.fit()
        finally:
            _ShowTrials.display = None
    trials = _trials(grid, settings.trials)
    # Of a restored search too: what was measured holds, whatever anchor it was scored by.
    return [replace(trial, score=objective.score(trial.tpf, trial.accuracy, trial.tps)) for trial in trials]


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


def _new_tuner(settings: TuneSettings, space: SearchSpace, trainable: Any, folder: Path) -> tune.Tuner:
    default = space.default_point()
    # TPE learns from random trials first; with its own default of 10 a short search would be random throughout.
    sampler = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=max(2, min(10, settings.trials // 3)))
    algorithm = OptunaSearch(
        metric="score", mode="max", sampler=sampler, points_to_evaluate=[default] if default else None
    )
    return tune.Tuner(
        trainable,
        param_space={name: _domain(parameter) for name, parameter in space.parameters.items()},
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            num_samples=settings.trials,
            max_concurrent_trials=settings.concurrent_trials,
            metric="score",
            mode="max",
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,  # the default spells out every value
        ),
        run_config=tune.RunConfig(
            name=folder.name, storage_path=str(folder.parent), callbacks=[_ShowTrials()], verbose=0
        ),
    )


def _domain(parameter: Range | ValueChoice) -> Any:
    if isinstance(parameter, ValueChoice):
        return tune.choice(list(parameter.values))
    if parameter.type == "int":
        return tune.randint(int(parameter.low), int(parameter.high) + 1)
    return (tune.loguniform if parameter.type == "log_float" else tune.uniform)(parameter.low, parameter.high)


def _trials(grid: ResultGrid, expected: int) -> list[TuneTrial]:
    if grid.num_errors:
        reason = str(grid.errors[0]).strip().splitlines()[-1]  # below its traceback
        raise WorkError(f"{grid.num_errors} of {expected} trials failed, the first with: {reason}")
    finished = [
        result for result in (grid[index] for index in range(len(grid))) if result.metrics and "score" in result.metrics
    ]
    if len(finished) < expected:
        # Tune turns Ctrl-C into an orderly end of its own; for the caller it still is one.
        raise KeyboardInterrupt(f"search stopped after {len(finished)} of {expected} trials; run it again to go on")
    finished.sort(key=lambda result: float((result.metrics or {})["finished"]))  # a restored grid has another order
    return [_trial(number, result.config or {}, result.metrics or {}) for number, result in enumerate(finished)]


def _trial(number: int, values: dict[str, Any], metrics: dict[str, Any]) -> TuneTrial:
    return TuneTrial(
        number=number,
        values=dict(values),
        score=metrics["score"],
        **{name: metrics[name] for name in FIGURES},
        unanswered=tuple(json.loads(metrics["unanswered"])),
    )
