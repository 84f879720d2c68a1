from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.config import build
from d3llm_ray.decoding import decoder
from d3llm_ray.errors import InputError
from d3llm_ray.models import read_configs
from d3llm_ray.tasks import Problem
from d3llm_ray.trajectories.pipeline import run
from d3llm_ray.trajectories.plan import generation_settings, make_plan, teacher_decoder
from d3llm_ray.trajectories.prompts import attempt_seed, distinct_prompts, prompt_id
from d3llm_ray.trajectories.settings import TrajectorySettings


def settings(**values: Any) -> TrajectorySettings:
    return build(TrajectorySettings, values)


def test_prompt_id_is_a_stable_hash_of_prompt_and_generation_settings() -> None:
    """The expected id is the SHA-256 of the canonical text below, taken with sha256sum."""
    canonical = '[[{"content":"2 + 2?","role":"user"}],{"max_tokens":64,"seed":0}]'
    digest = subprocess.run(["sha256sum"], input=canonical, capture_output=True, text=True, check=True).stdout
    messages = [{"role": "user", "content": "2 + 2?"}]
    assert prompt_id(messages, {"seed": 0, "max_tokens": 64}) == digest[:16]
    assert prompt_id(messages, {"seed": 1, "max_tokens": 64}) != digest[:16]


def test_every_generation_setting_changes_the_id_and_no_machine_setting_does() -> None:
    problem = Problem("0", [{"role": "user", "content": "2 + 2?"}])
    _, family = read_configs("tiny-llada")

    def row_id(**values: Any) -> str:
        chosen = settings(**values)
        decoder = teacher_decoder(chosen, family)
        generation = generation_settings(chosen, decoder, decoder.block_length(family, chosen.max_tokens))
        return next(distinct_prompts([problem], generation)).prompt_id

    different = [
        {"teacher": "other"},
        {"max_tokens": 32},
        {"decoder_settings": {"early_stop": True}},
        {"attempts": 2},
        {"temperatures": [0.0, 0.1, 0.2, 0.3, 0.5]},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"decoder_settings": {"block_size": 8}},
        {"decoder_settings": {"steps": 32}},
        {"decoder": "fast-dllm-dual"},
    ]
    ids = {row_id(), *(row_id(**values) for values in different)}
    assert len(ids) == 1 + len(different)
    assert row_id(actors=5, max_batch_size=3, rows_per_block=7, output="x", count=3, keep="correct") == row_id()


def test_attempt_seeds_differ_and_fit_the_column() -> None:
    seeds = {attempt_seed(seed, row_id, attempt) for seed in (0, 1) for row_id in ("a", "b") for attempt in range(5)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_repeated_prompts_are_one_row_in_order_of_first_appearance() -> None:
    problems = [Problem(str(n), [{"role": "user", "content": text}], str(n)) for n, text in enumerate("abcab")]
    prompts = list(distinct_prompts(problems, {}))
    assert [(prompt.row, prompt.messages[0]["content"], prompt.reference) for prompt in prompts] == [
        (0, "a", "0"),
        (1, "b", "1"),
        (2, "c", "2"),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "nobody"}, "model: unknown value 'nobody'"),
        ({"max_tokens": 40}, "max_tokens: got 40; accepted: a multiple of the block size 16"),
        ({"max_tokens": 256}, "max_tokens: got 256; accepted: less than the teacher's context 256"),
        ({"prompts": "nothing"}, "prompts: unknown value 'nothing'"),
        ({"decoder": "d9"}, "decoder: unknown value 'd9'"),
        ({"decoder": "autoregressive"}, "'autoregressive' cannot decode a 'llada' model"),
        ({"decoder": "d3llm", "decoder_settings": {"steps": 8}}, "steps: no setting of decoder 'd3llm'"),
        ({"prompts": "missing.jsonl"}, "prompts: cannot read 'missing.jsonl'"),
        ({"prompts": "file:///missing.jsonl"}, "prompts: cannot read 'file:///missing.jsonl'"),
        ({"prompts": "{tmp}/empty.jsonl"}, "has no rows"),
        ({"prompts": "{tmp}/column.jsonl"}, "exactly one of 'messages', 'prompt' and 'question'"),
        ({"prompts": "{tmp}/broken.parquet"}, "broken.parquet': Error creating"),
        ({"output": "nowhere://x"}, "output: cannot open 'nowhere://x'"),
    ],
)
def test_bad_input_is_refused_before_ray_starts(
    tiny_checkpoint: Path, tmp_path: Path, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "column.jsonl").write_text(json.dumps({"text": "?"}) + "\n")
    (tmp_path / "broken.parquet").write_text("PAR")
    values = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in values.items()}
    chosen = settings(**{"teacher": str(tiny_checkpoint), "output": str(tmp_path / "out"), "count": 2, **values})
    monkeypatch.setattr("d3llm_ray.trajectories.pipeline.connect", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(InputError) as caught:
        run(chosen)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attempts": 6}, "temperatures: got 5 for 6 attempts"),
        ({"temperatures": [-1.0], "attempts": 1}, "temperatures: got (-1.0,)"),
        ({"temperatures": [float("nan")], "attempts": 1}, "temperatures: got (nan,)"),
        ({"device": "cuda"}, "gpus_per_actor: got 0"),
        ({"teachers": "x"}, "teachers: unknown setting"),
        ({"count": 0}, "count: got 0"),
        ({"steps": 8}, "steps: is called decoder_settings.steps now"),
        ({"min_actors": 3}, "min_actors: got 3; accepted: at most `actors`, 2"),
        ({"keep": "some"}, "keep: got 'some'"),
        ({"split": "dev"}, "split: got 'dev'"),
    ],
)
def test_bad_settings_name_their_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        settings(**values)
    assert message in str(caught.value)


def test_plan_says_what_the_files_will_say(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = make_plan(settings(teacher=str(tiny_checkpoint), texts=["a", "b", "a"], output=str(tmp_path / "out")))
    assert [prompt.row for prompt in plan.prompts()] == [0, 1]
    assert plan.metadata["family"] == "llada" and plan.metadata["max_tokens"] == 64
    expected = {"decoder": "vanilla", "block_size": 16, "early_stop": False, "steps": None, "remasking": None}
    assert plan.metadata["decoder"].items() >= expected.items()
    decoder(plan.metadata["decoder"].pop("decoder"), **plan.metadata["decoder"])  # as a decoding settings file


def test_job_script_ends_with_code_2_and_one_line(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "jobs" / "generate_trajectories.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--teacher", str(tiny_checkpoint), "--prompts", "missing.parquet"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("d3llm-ray: prompts: cannot read 'missing.parquet'") and stderr.count("\n") == 1
