"""Every verb calls its own function with its own settings, and every setting of `generate` and `quickstart` arrives."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import yaml
from pydantic import BaseModel, Field

from d3llm_ray import generate, report
from d3llm_ray.cli import VERBS, main
from d3llm_ray.config import Settings, SettingsGroup, build, merge, parse, to_yaml
from d3llm_ray.decoding import Output, decoder
from d3llm_ray.distillation.objectives import PseudoTrajectory
from d3llm_ray.errors import DecodingError, IncompleteError, InputError
from d3llm_ray.evaluation.report import EvaluationReport
from d3llm_ray.generate import GenerateSettings
from d3llm_ray.progress import Progress
from d3llm_ray.quickstart import run as quickstart
from d3llm_ray.quickstart.settings import QuickstartSettings
from d3llm_ray.report import WrittenReport, digest

QUIET = Progress(quiet=True)


def named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


# --- the command line


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_a_function_of_its_own_settings(name: str) -> None:
    settings_class = named(VERBS[name].settings)
    taken = get_type_hints(named(VERBS[name].run))["settings"]
    assert taken is settings_class and settings_class.verb == name


def test_the_settings_reach_the_function_and_its_answer_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(generate, "run", lambda settings: called.append(settings) or "the answer")
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\nmax_tokens: 9\n")
    assert main(["generate", "--prompt", "x", "--config", str(file), "--seed", "4"]) == 0
    assert called == [GenerateSettings(prompt="x", seed=4, max_tokens=9)]
    assert capsys.readouterr().out == "the answer\n"
    monkeypatch.setattr(generate, "run", lambda settings: None)
    assert main(["generate"]) == 0 and capsys.readouterr().out == ""
    assert main(["generate", "--prompt", "x", "--seed", "4", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == GenerateSettings(prompt="x", seed=4).model_dump(mode="json")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("model: no"), 2), (DecodingError("request 0"), 1), (IncompleteError("prompts: 1 of 2"), 1),
        (OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_how_a_verb_ends_is_its_exit_code_and_one_line(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: Settings) -> None:
        raise error

    monkeypatch.setattr(generate, "run", fail)
    assert main(["generate", "--prompt", "x"]) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("d3llm-ray: ") and said.err.count("\n") == 1
    if not isinstance(error, KeyboardInterrupt):
        assert str(error) in said.err
    # `generate` keeps nothing of a run that did not end.
    assert ("nothing is kept" in said.err) == isinstance(error, OSError | KeyboardInterrupt)


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Settings) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(generate, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["generate", "--prompt", "x"])


# --- settings


class Deep(SettingsGroup):
    name: str = "a"
    left: int = 1
    right: int = 2


class Nested(Settings):
    verb = "nested"
    deep: Deep = Deep()
    free: dict[str, Any] = Field({})
    rate: float = 0.5


def test_settings_within_settings_are_merged_key_by_key(tmp_path: Path) -> None:
    """Defaults < file < flags, at every depth; another `name` is another kind, of which nothing old is left."""
    file = tmp_path / "mine.yaml"
    file.write_text("deep: {left: 5, right: 6}\nfree: {a: 1, b: {c: 2, d: 3}}\nrate: 0.25\n")
    settings, _ = parse(Nested, ["--config", str(file), "--deep.left", "7", "--free", '{"b": {"c": 4}, "e": 5}'])
    assert settings.deep == Deep(left=7, right=6) and settings.rate == 0.25
    assert settings.free == {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}
    assert parse(Nested, ["--rate", "0.75", "--config", str(file)])[0].rate == 0.75
    assert merge({"x": {"name": "p", "a": 1}}, {"x": {"name": "q", "b": 2}}) == {"x": {"name": "q", "b": 2}}
    assert merge({"x": {"name": "p", "a": 1}}, {"x": "p"}) == {"x": {"name": "p", "a": 1}}
    assert merge({"x": "p"}, {"x": {"a": 1}}) == {"x": {"name": "p", "a": 1}}
    assert build(Nested, yaml.safe_load(to_yaml(settings))) == settings


# --- generate


class FakeLLM:
    """Answers every prompt; the second one fails."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def generate(self, prompts: Any, **options: Any) -> list[Output]:
        self.calls.append((prompts, options))
        answers = [
            Output(f"text {n}", [n], "stop", 2, [5, 6], 3, 0.5, [1], [0.5], [-0.25], [n, 1])
            for n in range(len(prompts))
        ]
        return [Output.failed("broken", [7]) if n == 1 else answer for n, answer in enumerate(answers)]


def test_every_setting_of_generate_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one", "id": 11}\n{"prompt": "two"}\n{"prompt": "three", "id": "c"}\n')
    given: dict[str, Any] = {
        "max_tokens": 24, "temperature": 0.3, "top_p": 0.8, "seed": 5, "max_batch_size": 7, "dtype": "bfloat16",
        "device": "cuda:1",
        "model": "tiny-dream", "prompt": None, "prompts": prompts, "output": tmp_path / "out" / "answers.jsonl",
        "decoder": "dparallel", "decoder_settings": {"entropy_threshold": 0.7},
    }  # fmt: skip
    assert given.keys() == GenerateSettings.model_fields.keys()
    llm, loaded = FakeLLM(), []
    monkeypatch.setattr(
        generate.DiffusionLLM, "from_pretrained", lambda *values, **options: loaded.append((values, options)) or llm
    )
    settings = build(GenerateSettings, given)
    with pytest.raises(IncompleteError, match=r"^prompts: 1 of 3 not answered, .*answers\.jsonl: row 2: broken$"):
        generate.run(settings, QUIET)
    chosen = decoder("dparallel", entropy_threshold=0.7)
    assert loaded == [(("tiny-dream", chosen, "bfloat16", "cuda:1"), {"max_batch_size": 7})]
    options = {"max_tokens": 24, "temperature": 0.3, "top_p": 0.8, "seed": 5}
    messages = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    assert llm.calls == [(messages, {**options, "progress": QUIET, "errors": "return"})]
    lines = [json.loads(line) for line in settings.output.read_text().splitlines()]
    assert lines[0] == {
        "id": 11, "text": "text 0", "token_ids": [0], "finish_reason": "stop", "prompt_tokens": 2,
        "prompt_ids": [5, 6], "forwards": 3, "tokens_per_forward": 0.5, "reveal_steps": [1], "reveal_entropies": [0.5],
        "reveal_logprobs": [-0.25], "response_ids": [0, 1],
    }  # fmt: skip
    assert lines[1].keys() == {"id", "error"} and lines[1]["error"] == "broken" and lines[2]["id"] == "c"
    kept = yaml.safe_load((tmp_path / "out" / "answers.jsonl.settings.yaml").read_text())
    assert build(GenerateSettings, kept) == settings
    alone = settings.model_copy(update={"prompt": "one", "prompts": None})
    assert generate.run(alone, QUIET) == "text 0"
    assert llm.calls[1] == (["one"], options)


# --- quickstart

STAGES = {"trajectories", "distill", "tune", "evaluate", "serve"}
OVERRIDES = {
    "trajectories": {"attempts": 2, "temperatures": [0.0, 0.1]}, "distill": {"max_steps": 4}, "tune": {"count": 8},
    "evaluate": {"warmup": 3}, "serve": {"max_queue": 9},
}  # fmt: skip


def quick(tmp_path: Path, **values: Any) -> QuickstartSettings:
    given = {
        "teacher": "tiny-dream", "task": "arith-long", "rows": 11, "count": 12, "trials": 13, "max_tokens": 96,
        "seed": 14, "output": tmp_path / "quick", "fresh": True, "question": "how many?",
        **{name: {} for name in STAGES},
    }  # fmt: skip
    assert given.keys() == QuickstartSettings.model_fields.keys()
    return build(QuickstartSettings, given | values)


def of(settings: BaseModel, *names: str) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}


def test_every_setting_of_quickstart_reaches_its_stages(tmp_path: Path) -> None:
    settings, output = quick(tmp_path), tmp_path / "quick"
    assert of(
        settings.trajectory_settings(), "teacher", "prompts", "count", "attempts", "max_tokens", "seed", "output"
    ) == {
        "teacher": "tiny-dream", "prompts": "arith-long", "count": 11, "attempts": 1, "max_tokens": 96, "seed": 14,
        "output": str(output / "trajectories"),
    }  # fmt: skip
    assert of(settings.distill_settings(), "teacher", "trajectories", "keep", "seed", "output") == {
        "teacher": "tiny-dream", "trajectories": str(output / "trajectories"), "keep": "correct", "seed": 14,
        "output": str(output / "student"),
    }  # fmt: skip
    # The recipe says otherwise than the settings' defaults.
    assert settings.distill_settings().objective.window_domain == "canvas" != PseudoTrajectory().window_domain
    tuning = settings.tune_settings()
    names = ("model", "anchor_model", "task", "trials", "max_tokens", "seed", "output")
    assert of(tuning, *names) == {
        "model": str(output / "student"), "anchor_model": "tiny-dream", "task": "arith-long", "trials": 13,
        "max_tokens": 96, "seed": 14, "output": output / "tuning",
    }  # fmt: skip
    evaluation = settings.evaluate_settings()
    assert of(evaluation, "tasks", "count", "max_tokens", "seed", "output", "anchors") == {
        "tasks": ["arith-long"], "count": 12, "max_tokens": 96, "seed": 14, "output": output,
        "anchors": {"student": "tiny-dream"},
    }  # fmt: skip
    student, tuned = str(output / "student"), str(output / "settings.yaml")
    assert [(pair.model, pair.decoder, pair.decoder_label) for pair in evaluation.pairs] == [
        ("tiny-dream", "vanilla", None),
        ("tiny-dream", "d3llm", None),
        ("tiny-dream", tuned, "d3llm (tuned)"),
        (student, "d3llm-nocache", None),
        (student, tuned, "d3llm (tuned)"),
    ]
    assert of(settings.serve_settings(), "model", "decoder", "max_tokens", "port") == {
        "model": student, "decoder": tuned, "max_tokens": 96, "port": 0,
    }  # fmt: skip


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_the_overrides_of_a_stage_reach_that_stage_alone(stage: str, tmp_path: Path) -> None:
    plain, changed = quick(tmp_path), quick(tmp_path, **{stage: OVERRIDES[stage]})
    builders = {name: f"{'trajectory' if name == 'trajectories' else name}_settings" for name in STAGES}
    for name, method in builders.items():
        before, after = (
            getattr(plain, method)().model_dump(mode="json"),
            getattr(changed, method)().model_dump(mode="json"),
        )
        assert {key: value for key, value in after.items() if value != before[key]} == (
            OVERRIDES[stage] if name == stage else {}
        )


class Table(WrittenReport):
    def to_dict(self) -> dict[str, Any]:
        return {}

    def to_markdown(self) -> str:
        return f"{self.rows_table()}, and more"

    def rows_table(self) -> str:
        return "| a table |"


def test_a_report_is_complete_where_its_json_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(report, "write_text", lambda path, text: written.append(path.name))
    Table().write(tmp_path)
    assert written == ["report.md", "report.json"]


def test_a_digest_is_of_the_content_alone() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2}) and digest([1, 2]) != digest([2, 1])


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Stand-ins for every stage of a quickstart; what each was given, in order."""
    called: list[Any] = []

    def stage(name: str, result: Callable[[Any], Any] = lambda _: None) -> Callable[..., Any]:
        def run(settings: Any, progress: Progress, *rest: Any) -> Any:
            called.append((name, settings, progress.prefix, *rest))
            return result(settings)

        return run

    def tuned(settings: Any) -> Path:
        chosen = tmp_path / "chosen.yaml"
        chosen.write_text("decoder: d3llm\n")
        return chosen

    monkeypatch.setattr(quickstart.cluster, "connect", lambda: called.append("connect"))
    monkeypatch.setattr(quickstart.ray, "shutdown", lambda: called.append("shutdown"))
    monkeypatch.setattr(quickstart, "write_trajectories", stage("trajectories"))
    monkeypatch.setattr(quickstart, "distill", stage("distill"))
    monkeypatch.setattr(quickstart, "tune", stage("tune", tuned))
    monkeypatch.setattr(quickstart, "evaluate", stage("evaluate", lambda _: Table()))
    monkeypatch.setattr(
        quickstart, "serve_in_background", stage("serve", lambda _: contextlib.nullcontext("http://here:7"))
    )
    return called


def test_a_quickstart_runs_its_stages_in_order_and_keeps_what_they_say(
    stages: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    answer = {"question": "how many?", "text": "#### 9", "usage": {"completion_tokens": 5, "forwards": 2}}
    monkeypatch.setattr(quickstart, "ask", lambda *values: asked.append(values) or answer)
    monkeypatch.setattr(quickstart.ray, "is_initialized", lambda: False)
    settings = quick(tmp_path)
    printed = quickstart.run(settings, QUIET)
    order = [item if isinstance(item, str) else item[0] for item in stages]
    assert order == ["connect", "trajectories", "distill", "tune", "evaluate", "serve", "shutdown"]
    given = {item[0]: item[1:] for item in stages if not isinstance(item, str)}
    assert given == {
        "trajectories": (settings.trajectory_settings(), "[1/5] "),
        "distill": (settings.distill_settings(), "[2/5] "),
        "tune": (settings.tune_settings(), "[3/5] ", "return"),  # a problem without an answer ends no quickstart
        "evaluate": (settings.evaluate_settings(), "[4/5] ", "return"),
        "serve": (settings.serve_settings(), "[5/5] "),
    }
    assert asked == [("http://here:7", "how many?")]
    output = tmp_path / "quick"
    assert (output / "settings.yaml").read_text() == "decoder: d3llm\n"
    summary = json.loads((output / "quickstart.json").read_text())
    assert summary["answer"] == answer and summary["seconds"].keys() == STAGES and summary["peak_memory_gib"] > 0
    assert parse(QuickstartSettings, ["--config", str(output / "quickstart.yaml")])[0] == settings
    assert "| a table |" in printed and "(5 tokens in 2 forwards)" in printed and "#### 9" in printed
    (output / "student").mkdir()
    quickstart.run(settings, QUIET)  # fresh
    assert not (output / "student").exists()
    (output / "student").mkdir()
    quickstart.run(settings.model_copy(update={"fresh": False}), QUIET)
    assert (output / "student").exists()


def test_a_failing_stage_ends_the_ray_that_the_quickstart_began(
    stages: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: Any, progress: Progress) -> EvaluationReport:
        raise OSError("disk full")

    monkeypatch.setattr(quickstart, "distill", fail)
    for had_ray in (False, True):
        stages.clear()
        monkeypatch.setattr(quickstart.ray, "is_initialized", lambda had_ray=had_ray: had_ray)
        with pytest.raises(OSError, match="disk full"):
            quickstart.run(quick(tmp_path), QUIET)
        assert ("shutdown" in stages) != had_ray


def test_the_question_goes_to_the_served_model_as_any_client_would_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []

    message = SimpleNamespace(message=SimpleNamespace(content="#### 9"), finish_reason="stop")
    reply = SimpleNamespace(choices=[message], usage=SimpleNamespace(model_dump=lambda: {"forwards": 2}))

    class Client(contextlib.nullcontext):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            made.append(options)
            completions = SimpleNamespace(create=lambda **call: asked.append(call) or reply)
            models = SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="student")]))
            super().__init__(SimpleNamespace(models=models, chat=SimpleNamespace(completions=completions)))

    monkeypatch.setattr(quickstart, "OpenAI", Client)
    found = quickstart.ask("http://here:7", "how many?")
    assert made[0]["base_url"] == "http://here:7/v1"
    assert asked == [{"model": "student", "messages": [{"role": "user", "content": "how many?"}]}]
    assert found == {
        "model": "student", "question": "how many?", "text": "#### 9", "finish_reason": "stop",
        "usage": {"forwards": 2},
    }  # fmt: skip
