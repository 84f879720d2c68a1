"""`evaluate` and the verb around it, on a fake model with known answers and on a small random checkpoint."""

from __future__ import annotations

import json
import threading
from typing import ClassVar

import pytest
import torch

from d3llm_ray.config import build, parse
from d3llm_ray.decoding import DiffusionLLM, Engine, api, decoder, engine
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation import run as verb
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.judging import ProgramJudge
from d3llm_ray.models import KVCache
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import Task, load_task
from tests.evaluation.fakes import FakeLLM, problem

QUIET = Progress(quiet=True)


def test_figures_are_those_of_the_outputs_and_warmup_is_not_counted():
    llm = FakeLLM({"a": ("1 + 1 = 2.\n#### 2", 12, 4), "b": ("#### 9", 6, 2), "c": ("no answer", 2, 4)})
    problems = [problem("a", "2"), problem("b", "8"), problem("c", "1")]
    row = evaluate(llm, load_task("arith"), problems, 64, 0.0, 3, QUIET, 2, entropy_threshold=0.3)
    assert (row.correct, row.problems, row.tokens, row.forwards) == (1, 3, 20, 10)
    assert row.tpf == 2.0
    assert row.tps == pytest.approx(20 / row.seconds)
    assert [sample.answer for sample in row.samples] == ["2", "9", None]
    assert [call[0] for call in llm.calls] == [2, 3]
    assert (
        llm.calls[0][1]
        == llm.calls[1][1]
        == {
            "max_tokens": 64,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 3,
            "decoder": decoder("d3llm", entropy_threshold=0.3),
            "errors": "return",
            "stop": (),
        }
    )
    assert row.settings["decoder"] == "d3llm" and row.settings["entropy_threshold"] == 0.3
    assert (row.warmup, row.task, row.model) == (2, "arith", "fake")


def test_bad_calls_are_refused_before_anything_is_decoded():
    llm, task = FakeLLM({}), load_task("arith")
    with pytest.raises(InputError, match="problems"):
        evaluate(llm, task, [], progress=QUIET)
    with pytest.raises(InputError, match="reference"):
        evaluate(llm, task, [problem("a", None)], progress=QUIET)
    with pytest.raises(InputError, match=r"entropy_treshold.*accepted.*entropy_threshold"):
        evaluate(llm, task, [problem("a", "1")], progress=QUIET, entropy_treshold=0.3)
    assert llm.calls == []


def test_a_checkpoint_counts_as_its_outputs_say(tiny_checkpoint):
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder="d3llm")
    task = load_task("arith")
    problems = task.problems("test", 12)
    row = evaluate(llm, task, problems, max_tokens=32, progress=QUIET, entropy_threshold=3.0)
    outputs = llm.generate([problem.messages for problem in problems], max_tokens=32, entropy_threshold=3.0)
    assert row.tokens == sum(len(output.token_ids) for output in outputs)
    assert row.forwards == sum(max(output.reveal_steps) + 1 for output in outputs)
    assert [sample.text for sample in row.samples] == [output.text for output in outputs]
    assert row.correct == sum(task.is_correct(o.text, p.reference) for o, p in zip(outputs, problems, strict=True))


def test_a_decoder_may_be_a_name_a_file_or_an_object_and_holds_for_one_call(tiny_checkpoint, tmp_path):
    file = tmp_path / "fast.yaml"
    file.write_text("decoder: dparallel\nentropy_threshold: 3.0\n")
    llm, prompts = DiffusionLLM.from_pretrained(tiny_checkpoint), ["Tom has 5 apples.", "Ann has 3 pens."]
    assert llm.engine.decoder == decoder("d3llm")
    alone = DiffusionLLM.from_pretrained(tiny_checkpoint, file).generate(prompts, 32)
    for chosen in (str(file), file, decoder("dparallel", entropy_threshold=3.0)):
        assert llm.generate(prompts, 32, decoder=chosen) == alone
    assert llm.generate(prompts, 32, decoder="dparallel", entropy_threshold=3.0) == alone
    assert llm.generate(prompts, 32) == DiffusionLLM.from_pretrained(tiny_checkpoint, "d3llm").generate(prompts, 32)
    with pytest.raises(InputError, match="'autoregressive' cannot decode a 'llada' model"):
        llm.generate(prompts, 32, decoder="autoregressive")


def test_many_decoders_are_measured_by_one_engine_with_one_pool(settings, tiny_checkpoint, monkeypatch):
    engines, pools = [], []
    monkeypatch.setattr(api, "Engine", lambda *rest, **options: engines.append(1) or Engine(*rest, **options))
    monkeypatch.setattr(engine, "KVCache", lambda *rest, **options: pools.append(1) or KVCache(*rest, **options))
    names = ["vanilla", "d3llm", "fast-dllm-dual", "d2f", "dparallel"]
    report = verb.run(settings.model_copy(update={"decoders": names}), QUIET)
    assert (len(engines), len(pools)) == (1, 1)
    prompts = [problem.messages for problem in load_task("arith").problems("test", 6)]
    for name, row in zip(names, report.rows, strict=True):
        outputs = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder=name).generate(prompts, max_tokens=32)
        assert [(sample.text, sample.tokens, sample.forwards) for sample in row.samples] == [
            (output.text, len(output.token_ids), output.forwards) for output in outputs
        ]


@pytest.fixture
def settings(tiny_checkpoint, tmp_path) -> EvaluateSettings:
    return EvaluateSettings(
        models=[str(tiny_checkpoint)],
        decoders=["vanilla", "d3llm"],
        count=6,
        max_tokens=32,
        output=tmp_path / "report",
    )


def test_the_verb_writes_a_complete_report(settings):
    report = verb.run(settings, QUIET)
    names = {path.name for path in settings.output.iterdir()}
    assert names == {"evaluate.yaml", "samples", "prompts", "report.md", "report.json", "accuracy_vs_tpf.png"}
    assert [(row.model, row.decoder) for row in report.rows] == [("tiny-random", "vanilla"), ("tiny-random", "d3llm")]
    assert report.rows[0].tpf <= 1.0  # one token a forward at most: the anchor is measured, not set
    written = json.loads((settings.output / "report.json").read_text())
    assert written["rows"] == [row.to_dict() for row in report.rows]
    again, _ = parse(EvaluateSettings, ["--config", str(settings.output / "evaluate.yaml")])
    assert again == settings


def test_what_was_measured_is_not_measured_again(settings, monkeypatch):
    first = verb.run(settings, QUIET)
    calls = []
    monkeypatch.setattr(verb, "evaluate", lambda *rest, **more: calls.append(rest[-1].name) or evaluate(*rest, **more))
    wider = settings.model_copy(update={"decoders": ["dparallel", "d3llm", "vanilla"]})
    report = verb.run(wider, QUIET)
    assert calls == ["dparallel"]
    assert [row.decoder for row in report.rows] == ["dparallel", "d3llm", "vanilla"]
    assert report.rows[1].tokens == first.rows[1].tokens and report.rows[1].seconds == first.rows[1].seconds
    assert len(report.rows[1].samples) == 6
    verb.run(settings.model_copy(update={"count": 5}), QUIET)
    assert calls == ["dparallel", "vanilla", "d3llm"]


def test_pairs_files_labels_and_sweeps(settings, tiny_checkpoint, tmp_path):
    file = tmp_path / "tuned.yaml"
    file.write_text("decoder: d3llm\nentropy_threshold: 2.5\n")
    pairs = [
        {"model": str(tiny_checkpoint), "decoder": "vanilla", "model_label": "teacher"},
        {"model": str(tiny_checkpoint), "decoder": str(file)},
        {"model": str(tiny_checkpoint), "decoder": str(file), "decoder_label": "d3llm (best)"},
    ]
    values = settings.model_dump() | {
        "pairs": pairs,
        "sweep": {"refresh_interval": [2, 10000]},
        "anchors": {"tiny-random": "teacher"},
    }
    report = verb.run(build(EvaluateSettings, values), QUIET)
    labels = [(row.model, row.decoder, row.settings.get("refresh_interval")) for row in report.rows]
    assert labels == [
        ("teacher", "vanilla", None),
        ("tiny-random", "d3llm (tuned)", 2),
        ("tiny-random", "d3llm (tuned)", 10000),
        ("tiny-random", "d3llm (best)", 2),
        ("tiny-random", "d3llm (best)", 10000),
    ]
    assert {row.settings["entropy_threshold"] for row in report.rows[1:]} == {2.5}


def test_decoder_settings_override_those_that_have_them_and_a_pairs_own_go_last(settings, tiny_checkpoint, tmp_path):
    file = tmp_path / "tuned.yaml"
    file.write_text("decoder: d3llm\nentropy_threshold: 2.5\n")
    pairs = [
        {"model": str(tiny_checkpoint), "decoder": name, "decoder_settings": pair}
        for name, pair in (("vanilla", {"steps": 8}), (str(file), {}), ("d3llm", {"entropy_threshold": 3.5}))
    ]
    common = {"entropy_threshold": 1.5, "block_size": 8}
    report = verb.run(
        build(EvaluateSettings, settings.model_dump() | {"pairs": pairs, "decoder_settings": common}), QUIET
    )
    names = ("decoder", "block_size", "steps", "entropy_threshold")
    assert [tuple(row.settings.get(name) for name in names) for row in report.rows] == [
        ("vanilla", 8, 8, None),
        ("d3llm", 8, None, 1.5),
        ("d3llm", 8, None, 3.5),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_settings": {"speed": 1}}, "decoder_settings: unknown value 'speed'; accepted: .*entropy_threshold"),
        (
            {"pairs": [{"model": "tiny-llada", "decoder": "vanilla", "decoder_settings": {"speed": 1}}]},
            "^speed: no sett",
        ),
        ({"models": ["no-such-model"]}, "no-such-model.*accepted.*tiny-llada"),
        ({"decoders": ["fastest"]}, "decoder.*fastest.*accepted.*vanilla"),
        ({"decoders": ["missing.yaml"]}, "missing.yaml"),
        ({"tasks": ["gsm9k"]}, "gsm9k.*accepted.*arith"),
        ({"sweep": {"entropy_threshold": [-1.0]}}, "entropy_threshold"),
        ({"anchors": {"student": "tiny-random"}}, "anchors.*student.*accepted.*tiny-random"),
        ({"count": 0}, "count"),
        ({"colour": "red"}, "colour.*unknown setting"),
    ],
)
def test_bad_settings_fail_before_a_model_loads(settings, monkeypatch, change, message):
    monkeypatch.setattr(verb.DiffusionLLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=message):
        verb.run(build(EvaluateSettings, settings.model_dump() | change), QUIET)
    assert not (settings.output / "report.json").exists()


def test_a_settings_file_with_a_bad_key_is_named(settings, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("decoder: d3llm\nentropy_treshold: 0.3\n")
    with pytest.raises(InputError, match=r"bad.yaml: entropy_treshold"):
        verb.run(settings.model_copy(update={"decoders": [str(file)]}), QUIET)
    file.write_text("entropy_threshold: 0.3\n")
    with pytest.raises(InputError, match=r"bad.yaml: decoder"):
        verb.run(settings.model_copy(update={"decoders": [str(file)]}), QUIET)


def test_two_models_may_not_share_a_label(settings, tiny_checkpoint, tmp_path):
    twin = tmp_path / "copy" / tiny_checkpoint.name
    twin.parent.mkdir()
    twin.symlink_to(tiny_checkpoint)
    with pytest.raises(InputError, match="model_label"):
        verb.run(settings.model_copy(update={"models": [str(tiny_checkpoint), str(twin)]}), QUIET)


class Together(ProgramJudge):
    """Says yes to an answer when another one is judged at the same time."""

    meeting: ClassVar[threading.Barrier] = threading.Barrier(2)

    def is_correct(self, text: str, reference: str) -> bool:
        try:
            self.meeting.wait(5)
        except threading.BrokenBarrierError:
            return False
        return text == reference


def test_programs_are_judged_side_by_side_and_their_verdicts_keep_their_places(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    llm = FakeLLM({"a": ("1", 4, 2), "b": "too long", "c": ("2", 4, 2), "d": ("3", 4, 2), "e": ("3", 4, 2)})
    problems = [problem(name, reference) for name, reference in zip("abcde", "11233", strict=True)]
    row = evaluate(llm, Task("own", lambda *_: problems, Together()), problems, progress=QUIET)
    assert [sample.correct for sample in row.samples] == [True, False, True, True, True]
    row = evaluate(llm, Task("own", lambda *_: problems), problems, progress=QUIET)  # final answers: no threads
    assert row.correct == 4
