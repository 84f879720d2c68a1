"""The grid on Ray with students that only pretend, and one student that is real."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3llm_ray.ablation import run as verb
from d3llm_ray.ablation.plan import AblationTrial, make_design, plan_trials
from d3llm_ray.ablation.settings import AblateSettings
from d3llm_ray.ablation.trial import measure, read_record, record_file, write_record
from d3llm_ray.decoding import DiffusionLLM, decoding_settings
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.rows import EvaluatedSample, summarise
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import load_task

QUIET = Progress(quiet=True)
TPF = {"teacher": 1.0, "recipe": 3.0, "order-random": 2.0}


def pretend(trial: AblationTrial, settings: AblateSettings) -> None:
    """Stands for a student whose figures are known; breaks where the folder says so, and notes that it was called."""
    with (settings.output / ".calls").open("a") as calls:
        calls.write(f"{trial.variant}-{trial.seed}\n")
    if trial.variant == "order-random" and trial.seed == 1 and (settings.output / ".break").exists():
        raise RuntimeError("the student broke")
    tokens = round(1000 * (TPF[trial.variant] + trial.seed / 10))
    rows = []
    for chosen in trial.decoders:
        sample = EvaluatedSample("id", "", "1", "1", True, tokens, 1000, 1, "stop")
        labels = {"model": "m", "decoder": chosen.name, "task": "arith", "settings": decoding_settings(chosen)}
        labels |= {"max_tokens": 16, "temperature": 0.0, "seed": 0, "warmup": 0, "max_batch_size": 1}
        rows.append(summarise([sample], 1.0, **labels))
    write_record(settings, trial, {"distill": 1.0, "evaluate": 1.0}, rows)


def _calls(settings: AblateSettings) -> list[str]:
    path = settings.output / ".calls"
    calls = sorted(path.read_text().split())
    path.unlink()
    return calls


@pytest.mark.usefixtures("ray_cluster")
def test_a_grid_with_a_failure_is_reported_and_completed_by_the_next_call(make_settings):
    settings = make_settings(variants=["order-random"])
    settings.output.mkdir()
    (settings.output / ".break").touch()
    with pytest.raises(verb.FailedTrials, match=r"1 of 5 trials failed, order-random-seed1-\w+ with: .*broke"):
        verb.run(settings, QUIET, pretend)
    assert _calls(settings) == ["order-random-0", "order-random-1", "recipe-0", "recipe-1", "teacher-0"]
    text = (settings.output / "report.md").read_text()
    assert "| order | order-random | not resolved | +50.0 |" in text and "the student broke" in text

    (settings.output / ".break").unlink()
    report = verb.run(settings, QUIET, pretend)
    assert _calls(settings) == ["order-random-1"]
    gain = report.lines[1].tpf.gain
    assert gain.mean == pytest.approx(100 * ((3 / 2 + 3.1 / 2.1) / 2 - 1)) and gain.count == 2
    assert not report.failures and "the student broke" not in (settings.output / "report.md").read_text()

    assert verb.run(settings, QUIET, pretend).lines == report.lines
    assert not (settings.output / ".calls").exists()  # complete: nothing is repeated
    names = {path.name for path in settings.output.iterdir()}
    assert names >= {"ablate.yaml", "report.md", "report.json", "gains.png", "accuracy_vs_tpf.png"}


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_without_room_for_one_trial_is_refused(make_settings):
    hungry = make_settings(variants=["noise-fixed"], cpus_per_actor=1000, resource_timeout_s=1.0)
    with pytest.raises(InputError, match=r"cpus_per_actor.*1000 CPU"):
        verb.run(hungry, QUIET, pretend)


def test_bad_settings_and_rows_fail_before_ray_starts(make_settings, monkeypatch):
    monkeypatch.setattr(verb, "connect", lambda **_: pytest.fail("Ray was started"))
    for values, message in (
        ({"variants": ["orders"]}, "orders"),
        ({"trajectories": "no-folder"}, "no-folder"),
        ({"distill": {"batch_size": 64, "micro_batch_size": 8}}, "batch_size"),
    ):
        with pytest.raises(InputError, match=message):
            verb.run(make_settings(**values), QUIET, pretend)


def test_a_real_student_is_trained_measured_and_removed(make_settings, rows, tiny_checkpoint):
    settings = make_settings(variants=["window-fixed"], keep_students=True)
    teacher, student, *_ = plan_trials(make_design(settings), str(rows), None)
    for trial in (teacher, student):
        measure(trial, settings)
    record = read_record(record_file(settings, student))
    assert (record.variant, record.seed) == ("recipe", 0) and record.seconds["distill"] > 0
    assert [row.settings["entropy_threshold"] for row in record.rows] == [0.15, 0.45]

    task = load_task("arith")
    for folder, row in (
        (student.model, record.rows[0]),
        (tiny_checkpoint, read_record(record_file(settings, teacher)).rows[1]),
    ):
        llm = DiffusionLLM.from_pretrained(folder, decoder="d3llm-nocache", entropy_threshold=0.15)
        again = evaluate(llm, task, task.problems("test", 3), 16, progress=QUIET)
        assert (row.tokens, row.forwards, row.correct) == (again.tokens, again.forwards, again.correct)

    record_file(settings, student).unlink()
    measure(student, settings.model_copy(update={"keep_students": False}))
    assert record_file(settings, student).is_file() and not Path(student.model).exists()
