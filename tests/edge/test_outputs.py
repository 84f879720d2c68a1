"""Nothing is deleted or overwritten that this project did not write: what each verb writes to, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from d3llm_ray import generate
from d3llm_ray.ablation.run import run as ablate
from d3llm_ray.ablation.settings import AblateSettings
from d3llm_ray.benchmark import run as benchmarks
from d3llm_ray.benchmark.distill import DistillBenchmarkSettings
from d3llm_ray.benchmark.distill import run as benchmark_distill
from d3llm_ray.benchmark.gpu_check import check as gpu_check
from d3llm_ray.benchmark.serving import run as benchmark_serve
from d3llm_ray.benchmark.serving_settings import ServeBenchmarkSettings
from d3llm_ray.benchmark.settings import (
    BenchmarkSettings,
    HostBenchmarkSettings,
    RefreshBenchmarkSettings,
    StepBenchmarkSettings,
)
from d3llm_ray.benchmark.trajectories import TrajectoryBenchmarkSettings
from d3llm_ray.benchmark.trajectories import run as benchmark_trajectories
from d3llm_ray.checks.run import run as check
from d3llm_ray.checks.settings import CheckSettings
from d3llm_ray.checks.transfer import TransferSettings
from d3llm_ray.checks.transfer import run as check_transfer
from d3llm_ray.cli import main
from d3llm_ray.config import Settings, build, to_yaml
from d3llm_ray.distillation.preparation import finished as student_finished
from d3llm_ray.distillation.preparation import work_folders
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.run import run as evaluate
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.generate import GenerateSettings
from d3llm_ray.leaderboard.anyone import AupSettings
from d3llm_ray.leaderboard.anyone import run as score_points
from d3llm_ray.leaderboard.run import run as leaderboard
from d3llm_ray.leaderboard.settings import LeaderboardSettings
from d3llm_ray.output_folder import check_folder, claim, is_written
from d3llm_ray.quickstart import run as quickstart
from d3llm_ray.quickstart.contents import clear, entries
from d3llm_ray.quickstart.settings import QuickstartSettings
from d3llm_ray.report import check_output, replacing, write_text
from d3llm_ray.trajectories.importer import ImportSettings
from d3llm_ray.trajectories.importer import run as import_rows
from d3llm_ray.trajectories.pipeline import run as write_trajectories
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.storage import Location
from d3llm_ray.tuning.run import run as tune
from d3llm_ray.tuning.settings import TuneSettings

# The verbs with a folder as output, and what they need to be called.
FOLDER_VERBS: dict[str, tuple[Callable[..., Any], type[Settings], dict[str, Any]]] = {
    "evaluate": (evaluate, EvaluateSettings, {"models": ["tiny-llada"], "count": 1}),
    "leaderboard": (leaderboard, LeaderboardSettings, {}),
    "aup": (score_points, AupSettings, {}),
    "check": (check, CheckSettings, {"check": "blocks"}),
    "check transfer": (check_transfer, TransferSettings, {}),
    "ablate": (ablate, AblateSettings, {}),
    "tune": (tune, TuneSettings, {}),
    "quickstart": (quickstart.run, QuickstartSettings, {}),
    "quickstart --fresh": (quickstart.run, QuickstartSettings, {"fresh": True}),
    "benchmark": (benchmarks.run, BenchmarkSettings, {}),
    "benchmark step": (benchmarks.run_step, StepBenchmarkSettings, {}),
    "benchmark host": (benchmarks.run_host, HostBenchmarkSettings, {}),
    "benchmark refresh": (benchmarks.run_refresh, RefreshBenchmarkSettings, {}),
    "benchmark distill": (benchmark_distill, DistillBenchmarkSettings, {}),
    "benchmark trajectories": (benchmark_trajectories, TrajectoryBenchmarkSettings, {}),
    "benchmark serve": (benchmark_serve, ServeBenchmarkSettings, {}),
    "trajectories": (write_trajectories, TrajectorySettings, {"count": 1}),
    "trajectories import": (import_rows, ImportSettings, {"source": "rows.parquet", "teacher": "tiny-llada"}),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def call(verb: str, output: Path) -> None:
    run, cls, values = FOLDER_VERBS[verb]
    run(build(cls, {**values, "output": str(output)}))


@pytest.mark.parametrize("verb", FOLDER_VERBS)
@pytest.mark.parametrize("name", ["src/main.py", "answers.parquet", "settings.yaml", "trajectories-00000.parquet"])
def test_folder_of_somebody_else_is_refused_and_stays(verb: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(InputError, match=rf"output: .*{Path(name).parts[0]}"):
        call(verb, tmp_path / "data")
    assert contents(tmp_path / "data") == {name: b"mine"}


@pytest.mark.parametrize("verb", FOLDER_VERBS)
@pytest.mark.parametrize("kind", ["pipe", "file", "below a file", "link to nowhere"])
def test_folder_verbs_refuse_what_is_no_folder(verb: str, kind: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(output)
    elif kind == "link to nowhere":
        output.symlink_to(output)  # to itself
    else:
        output.write_text("mine")
    with pytest.raises(InputError, match="^output: "):
        call(verb, output / "runs" if kind == "below a file" else output)
    assert os.listdir(tmp_path) == ["out"]


def test_folder_may_be_a_link_to_one_that_is_not_there_yet(tmp_path: Path) -> None:
    for name in ("claimed", "rows"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    claim(tmp_path / "claimed", "evaluate.yaml", EvaluateSettings(models=["tiny-llada"]))
    Location.of(tmp_path / "rows").make_folder()
    assert os.listdir(tmp_path / "disk" / "claimed") == ["evaluate.yaml"]
    assert os.listdir(tmp_path / "disk" / "rows") == [] and (tmp_path / "rows").is_symlink()


@pytest.mark.parametrize("verb", [verb for verb in FOLDER_VERBS if "trajectories" not in verb])
def test_settings_written_by_hand_are_nobodys_marker(verb: str, tmp_path: Path) -> None:
    marker = f"{verb.split()[0]}.yaml"
    (tmp_path / marker).write_text("# my experiment\nseed: 3\n")
    with pytest.raises(InputError, match=rf"output: .*{marker}"):
        call(verb, tmp_path)
    assert contents(tmp_path) == {marker: b"# my experiment\nseed: 3\n"}


def test_marker_is_what_a_run_of_that_verb_has_written(tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    settings = EvaluateSettings(models=["tiny-llada"])
    claim(tmp_path, file.name, settings)
    claim(tmp_path, file.name, settings.model_copy(update={"seed": 5}))  # the same folder, again
    assert yaml.safe_load(file.read_text())["seed"] == 5
    assert is_written(file, EvaluateSettings) and not is_written(file, QuickstartSettings)
    for text in (f"# seen\n{to_yaml(settings)}", "seed: 3\n", "[1]\n", "a: [", ""):
        file.write_text(text)
        assert not is_written(file, EvaluateSettings)
        with pytest.raises(InputError, match=r"output: .* holds 'evaluate.yaml'"):
            check_folder(tmp_path, file.name, EvaluateSettings)


def test_hidden_files_do_not_make_a_folder_somebodys(tmp_path: Path) -> None:
    (tmp_path / ".gitkeep").write_text("")
    check_folder(tmp_path, "evaluate.yaml", EvaluateSettings)
    check_folder(tmp_path / "new" / "folder", "evaluate.yaml", EvaluateSettings)


def test_gpu_check_refuses_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(InputError, match="output"):
        gpu_check("cpu", quick=True, output=tmp_path, limit_s=0.0)
    assert contents(tmp_path) == {"notes.json": b"{}"}


# --- quickstart --fresh


# What each stage leaves, finished or interrupted, as their docstrings list it.
QUICKSTARTS = [
    "quickstart.json",
    "settings.yaml",
    "evaluate.yaml",
    "report.md",
    "report.json",
    "accuracy_vs_tpf.png",
    "samples/tiny-d3llm-0a1b.jsonl",
    "samples/tiny-d3llm-0a1b.parquet",
    "prompts/tiny-arith-0a1b.txt",
    "student/config.json",
    "student/generation_config.json",
    "student/model.safetensors",
    "student/tokenizer.json",
    "student/tokenizer_config.json",
    "student/chat_template.jinja",
    "student/settings.yaml",
    "student/metrics.jsonl",
    "student/loss.png",
    "student/tensorboard/events.out.tfevents.1",
    "student/model-00001-of-00002.safetensors",
    "student/model.safetensors.index.json",
    "student/last/model.safetensors",
    "student/best/validation.json",
    "student/adapter/adapter_config.json",
    "student/adapter/adapter_model.safetensors",
    "tuning/tune.yaml",
    "tuning/space.yaml",
    "tuning/model.json",
    "tuning/anchor.yaml",
    "tuning/trials.csv",
    "tuning/trials.json",
    "tuning/pareto.png",
    "tuning/pareto.json",
    "tuning/heat_map.png",
    "tuning/report.md",
    "tuning/settings.yaml",
    "tuning/search/trial_1/result.json",
    "student/adapter/README.md",
    f".student.{'0a' * 6}.partial/checkpoints/step-1.pt",
    f".report.md.{'0a' * 16}.partial",
]
ROWS = [
    "trajectories-00000.parquet",
    "errors.parquet",
    "_SUCCESS",
    "_STARTED",
    "settings.yaml",
    "summary.json",
    "_partial.1a2b.summary.json",
    "_staging/manifest.json",
    "_staging/prompts/prompts-00000.parquet",
    "_staging/remaining/prompts-00000.parquet",
    "_staging/parts/part-000000000000-0a1b2c.parquet",
]


def quickstart_folder(output: Path, names: list[str] = QUICKSTARTS) -> QuickstartSettings:
    settings = QuickstartSettings(output=output, fresh=True)
    claim(output, quickstart.MARKER, settings)
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("")
    return settings


def test_fresh_knows_what_every_stage_leaves(tmp_path: Path) -> None:
    names = [*QUICKSTARTS, *(f"trajectories/{name}" for name in ROWS)]
    settings = quickstart_folder(tmp_path / "quickstart", names)
    ours, strange = entries(tmp_path / "quickstart")
    assert (sorted(ours), strange) == (sorted([quickstart.MARKER, *names]), [])
    quickstart._check(settings)
    (tmp_path / "quickstart" / "student" / ".keep").write_text("")
    clear(tmp_path / "quickstart")
    assert list(contents(tmp_path / "quickstart")) == ["student/.keep"]
    assert os.listdir(tmp_path / "quickstart") == ["student"]


def test_fresh_removes_what_a_quickstart_wrote(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "rows.parquet").write_text("shared")
    output = tmp_path / "quickstart"
    settings = quickstart_folder(output)
    (output / "trajectories").symlink_to(shared)
    (output / ".gitignore").write_text("*")
    quickstart._check(settings)
    clear(output)
    assert os.listdir(output) == [".gitignore"] and contents(shared) == {"rows.parquet": b"shared"}


@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex",
        "notes/thesis.tex",
        "student/thesis.tex",
        "student/best/thesis.tex",
        "student/other.safetensors",
        "trajectories/thesis.tex",
        "trajectories/mine.parquet",
        "trajectories/_staging/parts/mine.parquet",
        "tuning/thesis.tex",
        "samples/thesis.tex",
    ],
)
def test_fresh_refuses_a_quickstarts_folder_with_more_in_it(tmp_path: Path, name: str) -> None:
    settings = quickstart_folder(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"output: .* holds '{name}'"):
        quickstart.run(settings)
    assert contents(tmp_path) == before
    quickstart._check(settings.model_copy(update={"fresh": False}))  # nothing is removed without it
    clear(tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


# --- single files


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Tom has 5 apples."}\n')
    return file


def answer(checkpoint: Path, **values: Any) -> str:
    return generate.run(build(GenerateSettings, {"model": str(checkpoint), "max_tokens": 8, **values}))


def test_config_beside_the_answers_is_kept(tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    config, output = tmp_path / "exp1.yaml", tmp_path / "exp1.jsonl"
    text = f"# mine\nprompts: {prompts}\noutput: {output}\nmodel: {tiny_checkpoint}\nmax_tokens: 8\n"
    config.write_text(text)
    for _ in range(2):  # and again over the answers of the first time
        assert main(["generate", "--config", str(config)]) == 0
    assert config.read_text() == text
    assert json.loads(output.read_text())["forwards"] >= 1
    assert yaml.safe_load((tmp_path / "exp1.jsonl.settings.yaml").read_text())["prompts"] == str(prompts)


@pytest.mark.parametrize("name", ["p.jsonl", "config.yaml", "notes.txt", "link.jsonl", "hard.jsonl"])
def test_answers_never_replace_another_file(tiny_checkpoint: Path, prompts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").write_text("max_tokens: 8\n")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.jsonl").symlink_to(prompts)
    (tmp_path / "hard.jsonl").hardlink_to(prompts)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="^output: "):
        answer(tiny_checkpoint, prompts=prompts, output=tmp_path / name)
    assert contents(tmp_path) == before and (tmp_path / "link.jsonl").is_symlink()


def test_settings_by_hand_beside_the_answers_are_refused(tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.settings.yaml").write_text("# mine\n")
    with pytest.raises(InputError, match=r"output: .*a\.jsonl\.settings\.yaml"):
        answer(tiny_checkpoint, prompts=prompts, output=tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl.settings.yaml").read_text() == "# mine\n" and not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("there", [True, False])
def test_answers_go_through_a_link(tiny_checkpoint: Path, prompts: Path, tmp_path: Path, there: bool) -> None:
    real, link = tmp_path / "disk" / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(real)
    if there:
        real.parent.mkdir()
        real.write_text("")
    answer(tiny_checkpoint, prompts=prompts, output=link)
    assert link.is_symlink() and json.loads(real.read_text())["forwards"] >= 1
    assert [path.name for path in real.parent.iterdir()] == ["real.jsonl"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "link to a pipe", "below a file"])
def test_answers_go_to_regular_files_only(
    tiny_checkpoint: Path, prompts: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    server = socket.socket(socket.AF_UNIX)
    if kind == "pipe":
        os.mkfifo(output)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        output.symlink_to(tmp_path / "pipe")
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # its path has 108 bytes at most
        server.bind("out")
    elif kind == "folder":
        output.mkdir()
    else:
        output = prompts / "out"
    mode = os.lstat(output).st_mode if kind != "below a file" else None
    with pytest.raises(InputError, match="^output: .*accepted: a regular file"):
        answer(tiny_checkpoint, prompts=prompts, output=output)
    assert mode is None or os.lstat(output).st_mode == mode
    server.close()


def test_writing_replaces_what_a_link_points_to_and_no_pipe(tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(real)
    write_text(link, "through")
    assert link.is_symlink() and real.read_text() == "through"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="named pipe"):
        write_text(pipe, "never")
    assert pipe.is_fifo() and sorted(os.listdir(tmp_path)) == ["link", "pipe", "real"]


def test_writers_of_one_file_do_not_share_a_partial_file(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    with replacing(file) as first, replacing(file) as second:
        first.write_text("first")
        second.write_text("second")
        assert first.read_text() == "first"
    assert file.read_text() == "first" and os.listdir(tmp_path) == ["report.md"]


def test_failed_writer_leaves_nothing_and_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    file.write_text("whole")
    with pytest.raises(KeyboardInterrupt), replacing(file) as partial:
        partial.write_text("ha")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"report.md": b"whole"}


def test_long_names_have_room_for_a_partial_file(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "text")
    assert check_output(tmp_path / ("n" * 255), "output").read_text() == "text"


def test_student_is_not_written_over_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "student").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"^output: .*student"):
        student_finished(DistillSettings(trajectories="rows", output=str(tmp_path / "student")))


def test_a_students_work_folders_are_not_those_of_a_longer_name(tmp_path: Path) -> None:
    work = f"{'0a' * 6}.partial"
    for name in (f".s[1].{work}", f".s[1].v2.{work}", f".s1.{work}", ".s[1].mine.partial", "s[1]"):
        (tmp_path / name).mkdir()
    assert work_folders(tmp_path / "s[1]") == [tmp_path / f".s[1].{work}"]
