"""Systems files: the shipped one is the paper's, what is planned of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3llm_ray.decoding import decoding_settings
from d3llm_ray.errors import InputError
from d3llm_ray.leaderboard.systems import distinct_runs, plan_systems, read_systems

# name -> (embedded model, decoder, decoder of the anchor)
PAPER = {
    "AR": ("tiny-ar", "autoregressive", "autoregressive"),
    "LLaDA": ("tiny-llada", "vanilla", "vanilla"),
    "Fast-dLLM-LLaDA, prefix": ("tiny-llada", "fast-dllm-prefix", "vanilla"),
    "Fast-dLLM-LLaDA, dual": ("tiny-llada", "fast-dllm-dual", "vanilla"),
    "D2F": ("tiny-llada-d2f", "d2f", "vanilla"),
    "dParallel-LLaDA": ("tiny-llada-dparallel", "dparallel", "vanilla"),
    "d3LLM-LLaDA": ("tiny-llada-d3llm", "d3llm", "vanilla"),
    "Fast-dLLM-v2": ("tiny-fast-dllm-v2", "fast-dllm-v2", "fast-dllm-v2"),
    "Dream": ("tiny-dream", "vanilla", "vanilla"),
    "Fast-dLLM-Dream": ("tiny-dream", "fast-dllm-dual", "vanilla"),
    "d3LLM-Dream": ("tiny-dream", "d3llm", "vanilla"),
}


def test_the_shipped_systems_are_the_papers() -> None:
    planned = plan_systems(read_systems(None))
    found = {each.name: (each.system.model, each.system.decoder, each.anchor.decoder.name) for each in planned}
    assert found == PAPER
    for each in planned:
        assert {run.decoder.name for run in each.candidates} == {each.system.decoder}
        assert len(each.candidates) == (3 if each.system.grid else 1)


def test_a_grid_is_every_combination_and_overrides_the_fixed_settings(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "systems: {a: {model: tiny-llada, decoder: d3llm, decoder_settings: {suffix: cached, cache_delay: 9}, "
        "grid: {entropy_threshold: [0.3, 0.6], cache_delay: [1, 2]}, anchor: {block_size: 8}}}"
    )
    (planned,) = plan_systems(read_systems(tmp_path / "s.yaml"))
    settings = [decoding_settings(run.decoder) for run in planned.candidates]
    assert [(each["entropy_threshold"], each["cache_delay"]) for each in settings] == [
        (0.3, 1), (0.3, 2), (0.6, 1), (0.6, 2),
    ]  # fmt: skip
    assert {each["suffix"] for each in settings} == {"cached"}
    assert decoding_settings(planned.anchor.decoder)["block_size"] == 8


def test_what_two_systems_share_is_measured_once() -> None:
    planned = plan_systems(read_systems(None))
    runs = [run for each in planned for run in each.runs()]
    distinct = distinct_runs(iter(runs))
    # LLaDA's own run is the anchor of Fast-dLLM's two; Dream's own that of the other two of tiny-dream
    vanilla = [run for run in distinct.values() if (run.model, run.decoder.name) == ("tiny-llada", "vanilla")]
    dream = [run for run in distinct.values() if (run.model, run.decoder.name) == ("tiny-dream", "vanilla")]
    assert (len(vanilla), len(dream)) == (1, 1) and len(distinct) < len(runs)
    assert next(iter(distinct.values())) is runs[0]


REFUSED = [
    ("{}", "systems: required"),
    ("systems: {a: {model: tiny-llada}}", "systems.a.decoder: required"),
    ("systems: {a: {model: nothing, decoder: d3llm}}", "systems.a: model"),
    ("systems: {a: {model: tiny-llada, decoder: nothing}}", "systems.a: decoder"),
    ("systems: {a: {model: tiny-ar, decoder: d3llm}}", "systems.a: decoder: 'd3llm' cannot decode"),
    (
        "systems: {a: {model: tiny-llada, decoder: d3llm, grid: {entropy_threshold: []}}}",
        "grid.entropy_threshold: got []",
    ),
    ("systems: {a: {model: tiny-llada, decoder: d3llm, grid: {temperature: [1]}}}", "temperature: no setting of"),
    ("systems: {a: {model: tiny-llada, decoder: d3llm, grid: {entropy_threshold: [much]}}}", "a number"),
    (
        "systems: {a: {model: tiny-llada, decoder: d3llm, anchor: {entropy_threshold: 1}}}",
        "no setting of decoder 'vanilla'",
    ),
    ("systems: {a: {model: tiny-llada, decoder: d3llm, colour: red}}", "systems.a.colour: unknown setting"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_bad_systems_are_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=r"^systems") as error:
        plan_systems(read_systems(tmp_path / "s.yaml"))
    assert said in str(error.value) and "\n" not in str(error.value)
