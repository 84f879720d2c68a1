"""The verb `check`: decode a task's problems with every decoder of a check, by turns, and say what follows."""

from __future__ import annotations

from pathlib import Path

from d3llm_ray.checks.claims import CHECKS
from d3llm_ray.checks.report import CheckReport, same_answers
from d3llm_ray.checks.settings import CheckSettings
from d3llm_ray.errors import WorkError
from d3llm_ray.evaluation import run as evaluation
from d3llm_ray.evaluation.rows import EvaluationRow, check_answered, unanswered
from d3llm_ray.evaluation.settings import EvaluateSettings, MeasureOptions, Pair
from d3llm_ray.output_folder import claim, sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import can_plot


@sole_writer
def run(settings: CheckSettings, progress: Progress | None = None) -> CheckReport:
    """Measure and write; returns the report.

    Files in `settings.output`: `check.yaml` (these settings), `rounds/` (reports of `evaluate` with every answer; an
    interrupted check goes on from them), `check.png`, `report.md` and, last, `report.json`.

    Raises:
        InputError: a model, task or setting that is none, or does not fit the check's decoders; before any is loaded.
        WorkError: a decoder gave other tokens in another round, as none may.
        IncompleteError: some problems have no answer and count as wrong; the report is written, but where a decoder has
            answered none, or not the same ones in every round.
    """
    progress = progress or Progress()
    check = CHECKS[settings.check]
    model, task = settings.model or check.model, settings.task or check.task
    pairs = [
        Pair(model=model, decoder=each.decoder, decoder_settings=each.settings, decoder_label=each.label)
        for each in check.variants
    ]
    claim(settings.output, "check.yaml", settings)
    rows: list[list[EvaluationRow]] = [[] for _ in pairs]
    for number in range(settings.rounds):
        first = number % len(pairs)
        order = [*range(first, len(pairs)), *range(first)]  # who comes first on a machine that warms up changes
        given = EvaluateSettings(
            **settings.model_dump(include={*MeasureOptions.model_fields, "split", "count"}),
            pairs=[pairs[place] for place in order],
            tasks=[task],
            output=settings.output / "rounds" / str(number + 1),
        )
        measured = evaluation.run(given, progress, errors="return").rows
        for place, row in zip(order, measured, strict=True):
            rows[place].append(row)
    failures = [f"{row.decoder}, {text}" for rounds in rows for row in rounds for text in unanswered(row.samples)]
    failures = list(dict.fromkeys(failures))  # the same in every round
    for variant, rounds in zip(check.variants, rows, strict=True):
        if failures and not (same_answers(rounds) and rounds[0].tokens):
            check_answered(failures, settings.output / "rounds")  # nothing to compare
        if not same_answers(rounds):
            raise WorkError(f"rounds: {variant.label!r} gave other answers in another round; see {settings.output}")
    measured_on = Path(model).name, rows[0][0].task
    report = CheckReport(settings.check, check, *measured_on, tuple(tuple(rounds) for rounds in rows))
    if can_plot(picture := settings.output / "check.png"):
        from d3llm_ray.checks.plots import plot_check

        plot_check(report, picture)
    report.write(settings.output)
    check_answered(failures, settings.output / "report.md")
    return report
