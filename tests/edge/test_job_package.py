"""A verb inside a Ray job, whose working directory is the package that Ray has unpacked: no Ray is started here."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from d3llm_ray.benchmark.gpu_check import check as gpu_check
from d3llm_ray.cli import VERBS, _load, main
from d3llm_ray.config import PATHS, Settings
from d3llm_ray.errors import InputError
from d3llm_ray.models import read_configs
from d3llm_ray.paths import in_job_package, not_uploaded
from d3llm_ray.report import check_output
from tests.distillation.rows import write_rows

ROOT = Path(__file__).parents[2]
SPACE = str(ROOT / "tune_spaces" / "tiny.yaml")
# What a verb needs to get as far as its output.
NEEDED = {
    "quickstart": ["--tune", f"space={SPACE}"],
    "generate": ["--prompts", "prompts.jsonl"],
    "trajectories": ["--count", "1"],
    "trajectories import": ["--source", "rows.jsonl", "--teacher", "tiny-llada"],
    "trajectories inspect": [],
    "distill": ["--trajectories", "rows"],
    "ablate": [],
    "evaluate": ["--models", "tiny-llada", "--count", "1"],
    "leaderboard": [],
    "aup": [],
    "check": ["--check", "blocks"],
    "check transfer": ["--space", SPACE],
    "benchmark": [],
    "benchmark host": [],
    "benchmark refresh": [],
    "benchmark step": [],
    "benchmark distill": [],
    "benchmark trajectories": [],
    "benchmark serve": [],
    "tune": ["--space", SPACE],
    "batch": ["--input", "prompts.jsonl"],
}
WITHOUT_OUTPUT = {"serve", "chat"}
NO_DEFAULT = {"trajectories import", "distill"}


def settings_class(verb: str) -> type[Settings]:
    return _load(VERBS[verb].settings)  # type: ignore[no-any-return]


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job as `ray job submit --working-dir` makes it, with a file of prompts in it."""

    def started(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("ray.init", started)
    monkeypatch.setattr("d3llm_ray.models.checkpoint.load_model", started)
    (folder / "prompts.jsonl").write_text('{"prompt": "2 + 3 ="}\n')
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder of trajectories, on storage that all nodes see."""
    folder = tmp_path_factory.mktemp("share") / "rows"
    return write_rows(
        folder, rows=4, canvas=32, vocab_size=4, mask_token_id=read_configs("tiny-llada")[1].mask_token_id
    )


def test_every_verb_has_an_output_or_is_known_to_have_none() -> None:
    assert NEEDED.keys() | WITHOUT_OUTPUT == VERBS.keys()
    for verb in VERBS:
        assert ("output" in settings_class(verb).model_fields) == (verb in NEEDED)


@pytest.mark.parametrize("verb", NEEDED)
@pytest.mark.parametrize("given", ["default", "relative", "absolute"])
def test_an_output_in_the_package_is_refused_before_the_work(
    verb: str, given: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if given == "default" and verb in NO_DEFAULT:
        return
    outputs = {"default": [], "relative": ["--output", "runs/a"], "absolute": ["--output", str(package / "runs/a")]}
    assert main([*verb.split(), *NEEDED[verb], *outputs[given]]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("d3llm-ray: output: ") and "package of this Ray job" in captured.err
    assert "absolute path on storage that all nodes see" in captured.err
    assert contents(package) == ["prompts.jsonl"]


def test_scripts_refuse_it_too(package: Path) -> None:
    with pytest.raises(InputError, match="^output: 'runs/gpu-check' lies in the package of this Ray job"):
        gpu_check("cpu", quick=True, output=Path("runs/gpu-check"), limit_s=0.0)
    assert contents(package) == ["prompts.jsonl"]


def test_a_quickstarts_stages_are_checked_with_it(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("trajectories", "distill", "evaluate"):
        words = ["--output", str(tmp_path / "quick"), f"--{stage}", "output=runs/here"]
        assert main(["quickstart", *NEEDED["quickstart"], *words]) == 2
        assert f"d3llm-ray: {stage}.output: 'runs/here' lies in the package" in capsys.readouterr().err
    assert contents(package) == ["prompts.jsonl"] and not (tmp_path / "quick").exists()


def test_an_output_elsewhere_is_taken(package: Path, tmp_path: Path) -> None:
    (package / "runs").symlink_to(tmp_path / "share")  # a link that was uploaded and leads out of the package
    assert check_output(tmp_path / "out", "output", folder=True) == (tmp_path / "out").resolve()
    assert check_output("runs/a", "output", folder=True) == (tmp_path / "share/a").resolve()
    assert check_output("../../../own", "output") == (tmp_path / "session_1/own").resolve()
    (tmp_path / "into").symlink_to(package)
    with pytest.raises(InputError, match="package of this Ray job"):
        check_output(tmp_path / "into" / "a", "output")


NO_PATHS = {
    ("quickstart", "trajectories"),  # settings of that stage
    ("benchmark", "decoders"),  # presets alone
    ("benchmark host", "decoder"),
    ("benchmark serve", "models"),  # it needs `model`, beside which there are none
    ("benchmark distill", "val_task"),  # read by the job
    ("benchmark distill", "val_decoder"),
}


def path_settings() -> list[tuple[str, str]]:
    """(verb, setting) of everything that is read from a path."""
    return [
        (verb, name)
        for verb in VERBS
        for name, field in settings_class(verb).model_fields.items()
        if (name in PATHS or Path in (field.annotation, *get_args(field.annotation)))
        and name not in ("output", "anchors")  # of evaluate's, names of models in the report
        and (verb, name) not in NO_PATHS
    ] + [(verb, "config") for verb in VERBS]


VALIDATION = {"val_every": "1", "val_rows": "1", "batch_size": "1", "micro_batch_size": "1", "workers": "1"}
# What it takes for a setting to be read: another one asks for it, or is read first.
WITH = {
    ("distill", "val_decoder"): {"val_task": "arith", **VALIDATION},
    ("distill", "val_task"): VALIDATION,
    ("trajectories import", "teacher"): {"source": "prompts.jsonl"},
    ("batch", "api_key_file"): {"url": "http://127.0.0.1:9"},
    ("chat", "api_key_file"): {"url": "http://127.0.0.1:9"},
    ("evaluate", "api_key_file"): {"url": "http://127.0.0.1:9"},
    **{("check", name): {"check": "blocks"} for name in ("data_dir", "model", "task")},
    **{("check transfer", name): {"space": SPACE} for name in ("model", "source", "task", "data_dir")},
    **{("tune", name): {"space": SPACE} for name in ("model", "anchor_model", "task", "data_dir")},
}
IGNORED = "data/mine/ignored.yaml"
# How a setting is written that holds more than a path.
SPELT = {
    ("serve", "models"): f'[{{"model": "{IGNORED}"}}]',
    ("serve", "adapters"): f"tuned={IGNORED}",
    ("benchmark serve", "adapters"): f"tuned={IGNORED}",
}


@pytest.mark.parametrize(("verb", "setting"), path_settings())
def test_what_was_not_uploaded_is_named_as_such(
    verb: str, setting: str, package: Path, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {
        "generate": {"prompt": "x"},
        "distill": {"trajectories": str(rows)},
        "batch": {"input": "prompts.jsonl"},
    }.get(verb, {})
    fields = settings_class(verb).model_fields
    values = {name: "tiny-llada" for name, field in fields.items() if field.is_required()} | needed
    values |= WITH.get((verb, setting), {}) | ({"output": str(tmp_path / "out")} if "output" in fields else {})
    values |= {setting: SPELT.get((verb, setting), IGNORED)}
    if setting == "prompts":
        values.pop("prompt", None)
    flags = [[value] if name == "path" else [f"--{name}", value] for name, value in values.items()]
    assert main([*verb.split(), *(word for flag in flags for word in flag)]) == 2
    *notes, said = capsys.readouterr().err.splitlines()
    assert "ignored.yaml" in said and "files that git ignores are not uploaded" in said
    assert all(note.startswith("2 rows to train on") for note in notes)  # distill decodes with both when it validates


def test_what_is_in_the_package_or_outside_of_a_job_is_another_matter(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not_uploaded("data/a.jsonl") and not_uploaded(package / "a") and not_uploaded(".")
    assert not not_uploaded("prompts.jsonl") and not not_uploaded("s3://bucket/a") and not not_uploaded("/data/a")
    assert in_job_package(package) and not in_job_package(package.parent)
    monkeypatch.chdir(tmp_path)
    assert not not_uploaded("data/a.jsonl") and check_output("runs/a", "output")
