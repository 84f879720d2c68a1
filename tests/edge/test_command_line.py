"""The command line: verbs, strict settings, one-line errors with exit code 2 before any model is loaded."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from pydantic import Field

from d3llm_ray.cli import VERBS, main
from d3llm_ray.config import Settings, SettingsGroup, build, parse
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.generate import GenerateSettings
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.storage import Location
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.yaml_file import dump_yaml, parse_yaml, read_yaml


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["--help"]) == 0
    usage = capsys.readouterr().out
    for verb in VERBS:
        assert verb in usage
        with pytest.raises(SystemExit) as exit_:
            main([verb, "--help"])
        assert exit_.value.code == 0
        assert "--print-config" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("d3llm-ray 0.")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fly"], ["verb", "fly", "quickstart", "serve"]),
        (["generate", "--bogus", "1"], ["--bogus"]),
        (["generate", "--max-tokens", "0", "--prompt", "x"], ["max_tokens", "greater than 0"]),
        (["generate", "--max-tokens", "many"], ["max_tokens", "many"]),
        (["generate"], ["--prompt", "--prompts"]),
        (["generate", "--prompt", "x", "--model", "gpt-9"], ["model", "gpt-9", "tiny-llada"]),
        (["generate", "--prompt", "x", "--decoder", "d9"], ["decoder", "d9", "d3llm-nocache"]),
        (["generate", "--prompts", "no.jsonl"], ["prompts", "no.jsonl"]),
        (["generate", "--config", "no.yaml"], ["config", "no.yaml"]),
        (["evaluate", "--tasks", "chess"], ["task", "chess", "arith"]),
        (["evaluate", "--models", "gpt-9"], ["model", "gpt-9"]),
        (["trajectories", "--teacher", "gpt-9"], ["gpt-9", "tiny-llada"]),
        (["trajectories", "--prompts", "no.parquet"], ["no.parquet"]),
        (["distill", "--trajectories", "no-folder", "--output", "x"], ["no-folder"]),
        (["distill", "--trajectories", "t", "--output", "s3://bucket/x"], ["output", "s3://bucket/x", "mount"]),
        (["distill", "--config", "lada"], ["config", "lada", "llada", "dream-coder", "fast-dllm-v2", "tiny"]),
        (["ablate", "--recipe", "lada"], ["recipe", "lada", "llada"]),
        (["tune", "--space", "no.yaml"], ["no.yaml"]),
        (["serve", "--model", "gpt-9"], ["model", "gpt-9"]),
        (["serve", "--decoder", "d9"], ["decoder", "d9"]),
        (["quickstart", "--teacher", "gpt-9"], ["model", "gpt-9"]),
        (["quickstart", "--task", "chess"], ["task", "chess"]),
        (["quickstart", "--distill", "lrr=1"], ["lrr"]),
        (["generate", "--prompt", "x", "--decoder", "no.yaml"], ["decoder", "no.yaml"]),
        (["generate", "--prompt", "x", "--decoder-settings", "speed=1"], ["speed", "entropy_threshold"]),
        (["evaluate", "--decoder-settings", "speed=1"], ["decoder_settings", "speed", "entropy_threshold"]),
        (["trajectories", "--steps", "8"], ["steps: is called decoder_settings.steps now"]),
        (["trajectories", "--no-early-stop"], ["early_stop: is called decoder_settings.early_stop now"]),
        (["tune", "--start-timeout-s", "8"], ["start_timeout_s: is called resource_timeout_s now"]),
        (["serve", "--decoder-config", "x.yaml"], ["decoder_config: is called decoder now"]),
        (["quickstart", "--problems", "8"], ["problems: is called count now"]),
        (["quickstart", "--trajectories", "batch_size=8"], ["batch_size: is called max_batch_size now"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    argv: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert not any(path.is_file() for path in tmp_path.rglob("*.safetensors"))


EARLY = {
    "generate": ["--prompt", "x", "--model"],
    "evaluate": ["--decoders", "d3llm", "--models"],
    "tune": ["--space", "space.yaml", "--model"],
    "ablate": ["--decoder", "d3llm", "--teacher"],
    "benchmark": ["--decoders", "d3llm", "--model"],
    "serve": ["--decoder", "d3llm", "--model"],
    "trajectories": ["--decoder", "d3llm", "--teacher"],
}


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fail where a weight is read or Ray is started."""

    def started(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("d3llm_ray.decoding.api.load_model", started)
    monkeypatch.setattr("d3llm_ray.benchmark.workload.load_model", started)
    monkeypatch.setattr("d3llm_ray.models.checkpoint.load_model", started)
    monkeypatch.setattr("ray.init", started)
    (tmp_path / "space.yaml").write_text("decoder: d3llm\nparameters: {cache_delay: {type: int, low: 1, high: 2}}")


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("verb", EARLY)
def test_a_decoder_that_does_not_fit_the_family_is_refused_before_anything_starts(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*EARLY[verb], "tiny-ar"] + (["--decoder", "d3llm"] if verb == "generate" else [])
    assert main([verb, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "decoder: 'd3llm' cannot decode a" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("device", ["cdua", "cuda:99", "cuda:x", "meta"])
@pytest.mark.parametrize("verb", EARLY)
def test_a_device_that_is_misspelt_or_absent_is_refused_before_anything_starts(
    verb: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_cluster = verb not in ("generate", "evaluate", "benchmark")  # other machines may have it
    if on_a_cluster and device == "cuda:99":
        return
    fitting = "tiny-dream" if verb == "ablate" else "tiny-llada"
    assert main([verb, *EARLY[verb], fitting, "--device", device]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert f"device: got {device!r}" in captured.err and "cuda" in captured.err


def test_flags_override_the_file_and_the_result_can_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("max_tokens: 48\nseed: 7\n")
    argv = ["generate", "--config", str(file), "--max_tokens", "32", "--temperature=0.5", "--print-config"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert (values["max_tokens"], values["seed"], values["temperature"]) == (32, 7, 0.5)
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert parse(GenerateSettings, ["--config", str(again)])[0] == parse(GenerateSettings, argv[1:])[0]


def test_shipped_recipes_go_by_name_and_a_file_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["distill", "--trajectories", "rows", "--output", "student", "--print-config", "--config"]
    for name, rate, rank in (("llada", 2e-5, 256), ("dream-coder", 2e-6, 0), ("tiny", 1e-3, 64)):
        assert main([*argv, name]) == 0
        values = yaml.safe_load(capsys.readouterr().out)
        assert (values["lr"], values["lora_rank"]) == (rate, rank)
    (tmp_path / "tiny").mkdir()  # models may lie beside
    assert main([*argv, "tiny"]) == 0
    capsys.readouterr()
    (tmp_path / "llada").write_text("lr: 0.5\n")
    assert main([*argv, "llada"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["lr"] == 0.5


def test_decoder_settings_of_a_command_line_are_read_as_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("decoder_settings: {steps: 64, early_stop: false, remasking: null, suffix: none, cfg_scale: 0.5}\n")
    words = ["--decoder-settings", "steps=64,early_stop=false,remasking=null,suffix=none,cfg_scale=0.5"]
    wanted = {"steps": 64, "early_stop": False, "remasking": None, "suffix": "none", "cfg_scale": 0.5}
    for argv in (words, ["--config", str(file)]):
        assert parse(GenerateSettings, argv)[0].decoder_settings == wanted


def test_broken_files_are_named(tmp_path: Path) -> None:
    for content, message in (("a: [", "not YAML"), ("- 1", "mapping"), ("speed: 3", "speed: unknown setting")):
        file = tmp_path / "bad.yaml"
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            parse(GenerateSettings, ["--config", str(file)])


class Line(SettingsGroup):
    """A group whose setting has moved."""

    renamed: ClassVar[dict[str, str]] = {"colour": "paint.colour"}
    paint: dict[str, str] = Field({})


class Renamed(Settings):
    """Settings with old names."""

    verb: ClassVar[str] = "renamed"
    renamed: ClassVar[dict[str, str]] = {"batch_size": "max_batch_size", "no_gpu": "device", "use_gpu": "device"}
    max_batch_size: int = 4
    device: str = "cpu"
    lines: list[Line] = Field([])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--batch-size", "8"], "batch_size: is called max_batch_size now"),
        (["--batch_size", "8"], "batch_size: is called max_batch_size now"),
        (["--batch-size=8"], "batch_size: is called max_batch_size now"),
        (["--batch_size=8", "--max-batch-size", "4"], "batch_size: is called max_batch_size now"),
        (["--use-gpu"], "use_gpu: is called device now"),
        (["--no-use-gpu"], "use_gpu: is called device now"),
        (["--no-use_gpu"], "use_gpu: is called device now"),
        (["--lines", '[{"paint": {}}, {"colour": "red"}]'], "lines.1.colour: is called paint.colour now"),
    ],
)
def test_flags_of_old_names_are_refused_with_the_new_ones(words: list[str], line: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse(Renamed, words)
    assert str(refusal.value) == line


def test_keys_of_old_names_are_refused_with_the_new_ones(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("batch_size: 8\nuse_gpu: true\n")
    both = "batch_size: is called max_batch_size now; use_gpu: is called device now"
    for refuse in (
        lambda: parse(Renamed, ["--config", str(file)]),
        lambda: build(Renamed, yaml.safe_load(file.open())),
    ):
        with pytest.raises(InputError) as refusal:
            refuse()
        assert str(refusal.value) == both
    with pytest.raises(InputError, match=r"^lines\.0\.colour: is called paint\.colour now$"):
        build(Renamed, {"lines": [{"colour": "red"}]})
    with pytest.raises(ValueError, match="max_batch_size"):
        Renamed(batch_size=8)  # type: ignore[call-arg]
    kept = build(Renamed, {"max_batch_size": 8, "lines": [{"paint": {"colour": "red"}}]})
    assert (kept.max_batch_size, kept.lines[0].paint) == (8, {"colour": "red"})
    with pytest.raises(InputError, match="^size: unknown setting"):
        build(Renamed, {"size": 8})


@pytest.mark.parametrize("verb", VERBS)
def test_old_names_of_verbs_lead_to_names_that_exist(verb: str) -> None:
    module, _, name = VERBS[verb].settings.partition(":")
    cls: type[Settings] = getattr(importlib.import_module(module), name)
    for old, new in cls.renamed.items():
        assert old not in cls.model_fields and new.partition(".")[0] in cls.model_fields


def test_environment_variables_do_not_leak_into_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "from-the-environment")
    assert parse(GenerateSettings, [])[0].model == "tiny-llada"


def test_bad_input_answers_before_torch_is_imported() -> None:
    code = (
        "import sys; from d3llm_ray.cli import main; main(['fly']); main(['--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_generate_writes_a_line_a_prompt(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Tom has 5 apples."}\n{"prompt": "Ann has 3 pens."}\n')
    output = tmp_path / "out" / "answers.jsonl"
    argv = ["generate", "--model", str(tiny_checkpoint), "--prompts", str(prompts), "--output", str(output)]
    assert main([*argv, "--max-tokens", "16"]) == 0
    lines = [yaml.safe_load(line) for line in output.read_text().splitlines()]
    assert len(lines) == 2 and all(line["forwards"] <= 16 and len(line["response_ids"]) == 16 for line in lines)
    assert yaml.safe_load((output.parent / "answers.jsonl.settings.yaml").read_text())["max_tokens"] == 16
    assert not list(output.parent.glob(".*partial"))


def test_paths_are_expanded_alike_in_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "runs/today")
    monkeypatch.delenv("NOWHERE", raising=False)
    for cls, name, many in (
        (GenerateSettings, "output", False),
        (GenerateSettings, "prompts", False),
        (GenerateSettings, "model", False),
        (GenerateSettings, "decoder", False),
        (TrajectorySettings, "output", False),
        (TrajectorySettings, "prompts", False),
        (EvaluateSettings, "models", True),
        (EvaluateSettings, "tasks", True),
        (TuneSettings, "space", False),
    ):
        for written, meant in (
            ("~/a.yaml", f"{tmp_path}/a.yaml"),
            ("$RUNS/a", "runs/today/a"),
            ("~/${RUNS}", f"{tmp_path}/runs/today"),
            ("s3://bucket/~/$RUNS", "s3://bucket/~/$RUNS"),
        ):
            if "://" in written and cls.model_fields[name].annotation not in (str, list[str]):
                continue
            value = getattr(build(cls, {name: [written] if many else written}), name)
            assert str(value[0] if many else value) == meant
        with pytest.raises(InputError, match=rf"{name}: .*environment variable NOWHERE is not set"):
            build(cls, {name: ["$NOWHERE/a"] if many else "$NOWHERE/a"})
    assert build(GenerateSettings, {"prompt": "~ $5 and $NOWHERE"}).prompt == "~ $5 and $NOWHERE"
    assert Location.of("~/runs/t").path == f"{tmp_path}/runs/t"
    (tmp_path / "a.yaml").write_text("max_tokens: 7\noutput: ~/out/a.jsonl\n")
    settings = parse(GenerateSettings, ["--config=~/a.yaml"])[0]
    assert settings.max_tokens == 7 and settings.output == tmp_path / "out/a.jsonl"


def test_a_key_comes_once(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text, lines in (("seed: 1\nmodel: a\nseed: 1\n", "1 and again in line 3"), ("x: {seed: 1, seed: 2}", "1")):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"config: '{path}': key 'seed' stands in line {lines}.*every key once"):
            read_yaml(path)
    path.write_text("a: &a {x: 1, y: 2}\nb: &b\n  <<: *a\n  x: 3\nc: {<<: *b, y: 4}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    path, values = tmp_path / "a.yaml", [3e-1, 3e5, -2.0e3, 5e-3, 0.3, 1e-5]
    path.write_text("values: [3e-1, 3E5, -2.e3, .5e-2, 0.3, 1e-05]\ntexts: ['3e-1', e3, 1e, 3e-1x]\n")
    read = read_yaml(path)
    assert read == {"values": values, "texts": ["3e-1", "e3", "1e", "3e-1x"]}
    assert parse_yaml(dump_yaml(read)) == read
    settings = parse(GenerateSettings, ["--decoder-settings", "entropy_threshold=3e-1"])[0]
    assert settings.decoder_settings == {"entropy_threshold": 0.3}
    with pytest.raises(InputError, match="decoder_settings: .*not YAML"):
        parse(GenerateSettings, ["--decoder-settings", "entropy_threshold=[3"])


def test_a_text_is_a_prompt_commas_included() -> None:
    texts = ["five apples, and two more", "[a, b]", 'say "5"']
    words = [word for text in texts for word in ("--texts", text)]
    assert parse(TrajectorySettings, words)[0].texts == texts
    assert parse(TrajectorySettings, [f"--texts={text}" for text in texts])[0].texts == texts
    assert parse(EvaluateSettings, ["--tasks", "arith,arith-long"])[0].tasks == ["arith", "arith-long"]


@pytest.mark.parametrize(
    ("argv", "content", "line"),
    [
        (["generate", "--config", "a.yaml"], "1: 2\n", "config: 'a.yaml' holds the key 1; accepted: names of settings"),
        (["generate", "--prompt", "x", "--decoder", "a.yaml"], "1: 2\n", "decoder: 'a.yaml' holds the key 1; "),
        (["tune", "--space", "a.yaml"], "- 1\n", "space: 'a.yaml' holds list; accepted: a mapping of settings"),
        (["ablate", "--variants-file", "a.yaml"], "- 1\n", "variants_file: 'a.yaml' holds list; "),
        (["ablate", "--recipe", "a.yaml"], "- 1\n", "recipe: 'a.yaml' holds list; "),
        (["ablate", "--distill", "x=1"], "", "distill.x: unknown setting; "),
        (["quickstart", "--tune", "trials=0"], "", "tune.trials: got '0': "),
        (["quickstart", "--evaluate", "bogus=1"], "", "evaluate.bogus: unknown setting; "),
        (["quickstart", "--trajectories", "batch_size=8"], "", "trajectories.batch_size: is called max_batch_size now"),
        (["quickstart", "--tune", "trials"], "", "tune: not in the form that is accepted: NAME=VALUE,..., or JSON"),
        (["generate", "--prompt", "x", "--decoder-settings", "{"], "", "decoder_settings: not in the form that is "),
        (["generate", "--prompt", "x", "--model", ""], "", "model: got ''; accepted: a name or a path"),
        (["evaluate", "--output", ""], "", "output: got ''; accepted: a name or a path"),
        (["evaluate", "--models", ""], "", "models: got ''; accepted: a name or a path"),
    ],
)
def test_what_is_wrong_is_named_as_the_user_wrote_it(
    argv: list[str],
    content: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(content)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
