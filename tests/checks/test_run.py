"""The verb `check`: decoders by turns, what arrives, and the report with its verdicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from PIL import Image

from d3llm_ray.checks import run as verb
from d3llm_ray.checks.claims import CHECKS
from d3llm_ray.checks.settings import CheckSettings
from d3llm_ray.cli import main
from d3llm_ray.config import build
from d3llm_ray.decoding import decoder
from d3llm_ray.errors import IncompleteError, InputError, WorkError
from d3llm_ray.evaluation.report import EvaluationReport
from d3llm_ray.evaluation.rows import EvaluatedSample, summarise
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.models import read_configs
from tests.wiring import Notes


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for `evaluate`: the n-th variant takes 10 - n forwards for 20 tokens; `calls`: what it was asked."""
    stand = SimpleNamespace(calls=[], error=None, error_in=range(99), all_bad=False, unlike=False)

    def evaluated(settings: EvaluateSettings, progress: Any, errors: str) -> EvaluationReport:
        stand.calls.append(settings)
        rows = []
        for pair in settings.pairs:
            labels = [variant.label for variant in next(c.variants for c in CHECKS.values() if variant_of(c, pair))]
            forwards = 10 - labels.index(pair.decoder_label) + (stand.unlike and len(stand.calls) > 1)
            samples = [
                EvaluatedSample(str(each), "", None, "1", each > 3, 20, forwards, 5, "stop") for each in range(40)
            ]
            if stand.error and len(stand.calls) in stand.error_in:
                bad = samples if stand.all_bad else samples[:1]
                samples[: len(bad)] = [replace(each, tokens=0, forwards=0, error=stand.error) for each in bad]
            given = {"model": pair.model, "decoder": pair.decoder_label, "task": settings.tasks[0], "settings": {}}
            seconds = forwards**2 * len(stand.calls)
            rows.append(
                summarise(samples, seconds, **given, max_tokens=64, temperature=0.0, seed=0, warmup=0, max_batch_size=4)
            )
        return EvaluationReport(tuple(rows), {})

    def variant_of(check: Any, pair: Any) -> bool:
        return pair.decoder_label in [variant.label for variant in check.variants]

    monkeypatch.setattr(verb.evaluation, "run", evaluated)
    return stand


def test_every_check_can_be_asked_for_and_decoded() -> None:
    assert set(get_args(CheckSettings.model_fields["check"].annotation)) == set(CHECKS)
    for check in CHECKS.values():
        family = read_configs(check.model)[1]
        decoders = [decoder(each.decoder, **each.settings) for each in check.variants]
        for each in decoders:
            each.check(family)
        assert len({(each.name, str(each.settings())) for each in decoders}) == len(decoders) >= 2


def test_the_published_gains() -> None:
    """As the authors' README has them: multi-block +30 % TPF, cache with refresh +35 % TPS, early stop +5 % TPF."""
    gains = {name: (check.figure, check.gain) for name, check in CHECKS.items() if check.gain}
    assert gains == {"blocks": ("tpf", 30), "early-stop": ("tpf", 5), "cache": ("tps", 35)}


def test_decoders_take_turns_and_the_report_follows(asked: SimpleNamespace, tmp_path: Path) -> None:
    settings = build(CheckSettings, {"check": "cache", "output": tmp_path / "out"})
    report = verb.run(settings, Notes())
    one, two = labels = [variant.label for variant in CHECKS["cache"].variants]
    assert [[pair.decoder_label for pair in call.pairs] for call in asked.calls] == [labels, [two, one]] * 3
    assert [call.output for call in asked.calls] == [tmp_path / "out" / "rounds" / str(each) for each in range(1, 7)]
    assert all(call.tasks == ["arith-long"] and call.pairs[0].model == "tiny-llada-d3llm" for call in asked.calls)
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [each["label"] for each in kept["variants"]] == labels
    # 10 and 9 forwards, in 100 and 81 seconds
    against = kept["variants"][1]["against_first"]
    assert (against["tpf"]["percent"], against["tps"]["percent"]) == pytest.approx((100 / 9, 1900 / 81))
    assert kept["verdicts"] == report.verdicts
    assert report.verdicts[0].endswith("+23 % (+23 to +23): a gain, less than the published +35 %.")
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"- {each}\n" in text for each in report.verdicts) and "Too few problems" in text
    with Image.open(tmp_path / "out" / "check.png") as image:
        assert image.width > 800


def test_a_swept_threshold_names_its_best_setting(asked: SimpleNamespace, tmp_path: Path) -> None:
    report = verb.run(build(CheckSettings, {"check": "thresholds", "rounds": 2, "output": tmp_path / "out"}), Notes())
    # all with 90 %, the last threshold with the fewest forwards: 1 forward for 20 tokens
    assert report.verdicts[0].startswith("The best single setting is 2: AUP 1800.0, 90.0 % at 20.00 tokens a forward")
    assert (tmp_path / "out" / "check.png").is_file()
    assert "| 2 | 90.0 %" in report.to_markdown() and "| 1800.0 |" in report.to_markdown()


def test_every_setting_arrives(asked: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    changed: dict[str, Any] = {
        "max_tokens": 48, "temperature": 0.5, "top_p": 0.9, "seed": 3, "max_batch_size": 5, "dtype": "bfloat16",
        "device": "cuda:1", "data_dir": tmp_path / "data", "actors": 3, "cpus_per_actor": 2, "gpus_per_actor": 0.5,
        "resource_timeout_s": 9.0, "warmup": 0, "shard_size": 7, "split": "validation", "count": 12,
    }  # fmt: skip
    own = {"check": "blocks", "model": "tiny-llada", "task": "arith-long", "rounds": 2, "output": tmp_path / "out"}
    given = build(CheckSettings, changed | own)
    defaults = {name: field.get_default() for name, field in CheckSettings.model_fields.items()}
    assert [name for name, value in defaults.items() if getattr(given, name) == value] == []
    verb.run(given, Notes())
    assert len(asked.calls) == 2
    for call in asked.calls:
        assert {name: getattr(call, name) for name in changed} == changed
        assert call.tasks == ["arith-long"] and {pair.model for pair in call.pairs} == {"tiny-llada"}
    assert build(CheckSettings, {"check": "blocks"}).output == Path("runs/checks/blocks")
    with pytest.raises(InputError, match="check: got 'nothing'"):
        build(CheckSettings, {"check": "nothing"})


def test_what_went_wrong_is_said(asked: SimpleNamespace, tmp_path: Path) -> None:
    asked.unlike = True
    with pytest.raises(WorkError, match="gave other answers in another round"):
        verb.run(build(CheckSettings, {"check": "blocks", "output": tmp_path / "unlike"}), Notes())
    assert not (tmp_path / "unlike" / "report.json").exists()
    asked.unlike, asked.error = False, "too long"
    with pytest.raises(IncompleteError, match="too long"):
        verb.run(build(CheckSettings, {"check": "blocks", "output": tmp_path / "error"}), Notes())
    assert (tmp_path / "error" / "report.json").is_file()
    for name, change in {"one round": {"error_in": [len(asked.calls) + 2]}, "all": {"all_bad": True}}.items():
        vars(asked).update(change)  # nothing to compare: the reason is said, and there is no report
        with pytest.raises(IncompleteError, match="too long"):
            verb.run(build(CheckSettings, {"check": "blocks", "output": tmp_path / name}), Notes())
        assert not (tmp_path / name / "report.json").exists()
        asked.error_in = range(99)


@pytest.mark.slow
def test_a_whole_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "blocks", "--count", "24", "--rounds", "2", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, several = report["variants"]
    assert several["rows"][0]["tpf"] > one["rows"][0]["tpf"] > 1.5 and len(one["rows"]) == 2
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert main(words) == 0 and len(kept) == 4
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
