"""Plans: what is refused before any weight exists, and that settings and plan are the same thing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from d3llm_ray.benchmark.plan import BenchmarkPlan
from d3llm_ray.benchmark.settings import BenchmarkSettings
from d3llm_ray.benchmark.shapes import SHAPES, random_model
from d3llm_ray.benchmark.workload import prepare
from d3llm_ray.cli import main
from d3llm_ray.config import build, parse, to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.models.families import read_family

SHAPE = ["--shape", "llada-8b", "--prompt-tokens", "144"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "gpt-9"], ["model", "gpt-9", "tiny-llada"]),
        (["--shape", "gpt-9", "--prompt-tokens", "8"], ["shape", "gpt-9", "llada-8b, qwen2.5-7b"]),
        (["--shape", "llada-8b"], ["prompt_tokens", "--shape"]),
        ([*SHAPE, "--model", "tiny-llada"], ["shape", "not both"]),
        ([*SHAPE, "--task", "arith"], ["prompt_tokens", "not both"]),
        ([*SHAPE, "--max-tokens", "256,4000"], ["max_tokens", "4000", "at most 3952"]),
        ([*SHAPE, "--scripted-tpf", "0.5"], ["scripted_tpf", "0.5", "1 or more"]),
        ([*SHAPE, "--decoders", "autoregressive"], ["decoder", "autoregressive", "causal"]),
        (["--task", "chess"], ["task", "chess", "arith"]),
        (["--decoders", "d9"], ["decoder", "d9", "d3llm-nocache"]),
        (["--decoders", "vanilla", "--suffixes", "cached"], ["suffixes", "cached"]),
        (["--suffixes", "warm"], ["suffix", "warm", "recompute"]),
        (["--decoder-settings", '{"speed": 3}'], ["decoder_settings", "speed", "entropy_threshold"]),
        (["--batch-sizes", "0"], ["batch_sizes", "0", "positive"]),
        (["--batch-sizes", "8,8"], ["batch_sizes", "once"]),
        (["--batch-sizes", "64", "--count", "32"], ["count", "32", "64"]),
        (["--rounds", "0"], ["rounds", "positive"]),
        (["--dtype", "int8"], ["dtype", "int8", "bfloat16"]),
        (["--machine", "h200"], ["machine", "h200", "measured"]),
        (["--machine", "tpu", "--dtype", "bfloat16"], ["machine", "tpu", "a100, b200, h100, h200, measured"]),
        (["--device", "abacus"], ["device", "abacus", "cuda"]),
        (["--device", "cuda:99"], ["device", "cuda:99"]),
    ],
)
def test_bad_input_is_one_line_before_any_weight(
    argv: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert not list(tmp_path.iterdir())


def test_settings_are_the_plan_and_an_output() -> None:
    assert list(BenchmarkSettings.model_fields) == [*(field.name for field in fields(BenchmarkPlan)), "output"]
    assert build(BenchmarkSettings, {}).plan() == BenchmarkPlan()
    command = (
        "--shape llada-8b --device cpu --dtype bfloat16 --prompt-tokens 144 --max-tokens 256 --scripted-tpf 9.11 "
        "--batch-sizes 1,8 --machine h200"
    )
    settings = parse(BenchmarkSettings, command.split())[0]
    assert build(BenchmarkSettings, yaml.safe_load(to_yaml(settings))) == settings
    assert settings.plan() == BenchmarkPlan(
        shape="llada-8b",
        dtype="bfloat16",
        prompt_tokens=144,
        max_tokens=(256,),
        scripted_tpf=9.11,
        batch_sizes=(1, 8),
        machine="h200",
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes_are_prepared_without_weights(shape: str) -> None:
    workload = prepare(BenchmarkPlan(shape=shape, prompt_tokens=144, max_tokens=(256,), count=3, batch_sizes=(1, 2)))
    assert [len(prompt) for prompt in workload.prompts] == [144] * 3
    special = {workload.family.mask_token_id, *workload.family.stop_token_ids}
    assert not special & {token for prompt in workload.prompts for token in prompt}
    expected = "autoregressive" if shape == "qwen2.5-7b" else "d3llm"
    assert [(cell.decoder.name, cell.batch_size) for cell in workload.cells] == [(expected, 1), (expected, 2)]
    assert workload.kv_positions >= 2 * 400
    assert all(request.ignore_eos for request in workload.requests(workload.cells[0]))


def test_every_combination_is_a_cell() -> None:
    plan = BenchmarkPlan(
        decoders=("d3llm-nocache", "d3llm"),
        suffixes=("cached", "none"),
        batch_sizes=(1, 4),
        max_tokens=(32, 64),
        decoder_settings={"cache_delay": 2},
        count=4,
    )
    cells = prepare(plan).cells
    seen = [(c.decoder.settings().get("suffix"), c.max_tokens, c.batch_size) for c in cells]
    assert seen == [(suffix, m, b) for suffix in (None, "cached", "none") for m in (32, 64) for b in (1, 4)]
    assert {c.decoder.settings().get("cache_delay") for c in cells} == {None, 2}
    with pytest.raises(InputError, match="cache_delay"):
        prepare(BenchmarkPlan(decoders=("vanilla",), decoder_settings={"cache_delay": 2}))


def test_random_weights_are_made_in_their_own_precision(small_shape: str) -> None:
    config, _ = read_family(SHAPES[small_shape], {})
    models = [random_model(config, torch.bfloat16, torch.device("cpu"), seed) for seed in (0, 0, 1)]
    for name, parameter in models[0].named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu"
        same, other = (dict(model.named_parameters())[name] for model in models[1:])
        assert torch.equal(parameter, same)
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert not torch.equal(parameter, other)
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.1)
