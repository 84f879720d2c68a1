"""What a refresh costs: by hand, and of real forwards, whose work an engine's own calls tell."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from d3llm_ray.benchmark.measure import decode, engine_for
from d3llm_ray.benchmark.profile import CapturingRunner
from d3llm_ray.benchmark.refresh import ForwardCosts, RefreshRow, columns, measure_refresh
from d3llm_ray.benchmark.refresh_plan import RefreshPlan
from d3llm_ray.benchmark.shapes import random_model
from d3llm_ray.cli import main
from d3llm_ray.errors import InputError, WorkError
from d3llm_ray.models import Work
from d3llm_ray.progress import Progress

QUIET = Progress(quiet=True)


def test_what_a_refresh_adds_and_where_it_breaks_even_by_hand() -> None:
    """Of four forwards one costs 20 and three 8: 44 instead of 32. Without a cache four cost 72: from 12 / 10 on."""
    costs = ForwardCosts(full=18.0, refresh=20.0, cached=8.0)
    assert costs.added(4) == pytest.approx(100 * (44 / 32 - 1)) == 37.5
    assert costs.added(12) == pytest.approx(12.5)
    assert costs.break_even == pytest.approx(1.2)
    mean = (1.2 - 1) * costs.cached + costs.refresh
    assert mean / 1.2 == pytest.approx(costs.full)
    assert ForwardCosts(full=18.0, refresh=18.0, cached=8.0).break_even == 1.0
    assert ForwardCosts(full=18.0, refresh=12.0, cached=8.0).break_even == 1.0  # never below every forward
    assert ForwardCosts(full=8.0, refresh=9.0, cached=8.0).break_even is None
    assert ForwardCosts(full=7.0, refresh=9.0, cached=8.0).break_even is None


def test_figures_are_medians_of_the_rounds() -> None:
    rounds = (ForwardCosts(18, 20, 8), ForwardCosts(30, 22, 7), ForwardCosts(17, 31, 9))
    row = RefreshRow("m", 32, 64, 16, (4, 8), rounds, ForwardCosts(9, 9, 3))
    assert row.ms == ForwardCosts(18, 22, 8)
    told = row.to_dict()
    assert told["added"] == {"4": pytest.approx(100 * 14 / 8 / 4), "8": pytest.approx(100 * 14 / 8 / 8)}
    assert told["added_flops"] == {"4": 50.0, "8": 25.0}
    assert (told["break_even"], told["break_even_flops"]) == (pytest.approx(1.4), 1.0)
    assert [cell(row) for _, cell in columns((4, 8))] == [
        "32", "16", "18.00 (17.00 - 30.00)", "22.00 (20.00 - 31.00)", "8.00 (7.00 - 9.00)", "3.00",
        "+44 %", "+22 %", "1.4", "1.0",
    ]  # fmt: skip
    never = RefreshRow("m", 32, 64, 16, (4,), (ForwardCosts(8, 9, 8),), ForwardCosts(9, 9, 3))
    assert [cell(never) for _, cell in columns((4,))][-2:] == ["never", "1.0"]


PLAN: dict[str, Any] = {
    "shape": "small", "prompt_tokens": (8, 24), "block_sizes": (8, 16), "intervals": (3, 6), "max_tokens": 32,
    "tpf": 2.0, "rounds": 2,
}  # fmt: skip


def test_kinds_of_forwards_and_their_work_are_those_of_the_engines_own_calls(small_shape: str) -> None:
    """A forward is a full one where it computes prompt and canvas."""
    plan = RefreshPlan(**PLAN)
    report = measure_refresh(plan, QUIET)
    assert [(row.prompt_tokens, row.block_size) for row in report.rows] == [(8, 8), (8, 16), (24, 8), (24, 16)]
    rows = iter(report.rows)
    for workload in plan.workloads():
        model = random_model(workload.config, workload.dtype, workload.device, plan.seed)
        engine = engine_for(workload, model)
        engine.runner = captured = CapturingRunner(engine.eager)
        for uncached, cached in zip(workload.cells[::2], workload.cells[1::2], strict=True):
            row = next(rows)
            assert (uncached.decoder.name, cached.decoder.name) == ("d3llm-nocache", "d3llm")
            assert len(row.rounds) == 2 and all(min(each.full, each.refresh, each.cached) > 0 for each in row.rounds)
            work: dict[tuple[str, bool], list[Work]] = defaultdict(list)
            for cell in (uncached, cached):
                captured.calls.clear()
                list(decode(engine, workload.requests(cell), cell.batch_size))
                for call in captured.calls:
                    everything = len(call.token_ids) == row.prompt_tokens + 32
                    work[cell.decoder.name, everything].append(call.layout.work(len(call.scored)))
            means = {kind: workload.config.flops(reduce(add, taken)) / len(taken) for kind, taken in work.items()}
            assert set(means) == {("d3llm-nocache", True), ("d3llm", True), ("d3llm", False)}
            expected = (means["d3llm-nocache", True], means["d3llm", True], means["d3llm", False])
            assert (row.flops.full, row.flops.refresh, row.flops.cached) == pytest.approx(expected)
            assert row.flops.cached < row.flops.refresh
            # Every third forward is a refresh, and some others are full ones.
            assert len(work["d3llm", True]) >= (len(work["d3llm", True]) + len(work["d3llm", False])) // 3


def test_the_verb_leaves_its_report_and_picture(
    small_shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--shape small --prompt-tokens 8,16 --block-sizes 8 --intervals 3 --max-tokens 16 --rounds 1"
    assert main(["benchmark", "refresh", *words.split(), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert found["benchmark"] == "refresh" and [row["prompt_tokens"] for row in found["rows"]] == [8, 16]
    assert "| prompt | block |" in printed and "added at 3" in printed
    with Image.open(tmp_path / "out" / "refresh.png") as image:
        assert image.width > 300


def test_a_models_context_does_not_bound_the_lengths(tiny_checkpoint: Path) -> None:
    (row,) = measure_refresh(
        RefreshPlan(
            model=str(tiny_checkpoint), prompt_tokens=(300,), block_sizes=(16,), max_tokens=16, rounds=1, count=1
        ),
        QUIET,
    ).rows
    assert (row.model, row.prompt_tokens) == ("tiny-random", 300)
    assert row.flops.refresh > 4 * row.flops.cached


def test_sizes_with_which_nothing_is_cached_are_told(small_shape: str) -> None:
    with pytest.raises(WorkError, match="blocks of 16 in a canvas of 16 every forward is a full one"):
        measure_refresh(RefreshPlan(**{**PLAN, "block_sizes": (16,), "max_tokens": 16, "tpf": 16.0}), QUIET)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"block_sizes": (12,)}, "block_sizes: got 12; accepted: divisors of max_tokens, 32"),
        ({"intervals": (1, 4)}, "intervals: got 1; accepted: 2 or more"),
        ({"prompt_tokens": ()}, "prompt_tokens: got "),
        ({"prompt_tokens": (8, 8)}, "prompt_tokens: got "),
        ({"tpf": 0.5}, "tpf: got 0.5"),
        ({"count": 1, "batch_size": 2}, "count: got 1; accepted: at least batch_size, 2"),
        ({"dtype": "int8"}, "dtype: .*int8"),
        ({"model": "tiny-llada"}, "shape: got 'small'; accepted: a model or a shape"),
        ({"shape": "none"}, "shape: .*none.*llada-8b"),
    ],
)
def test_bad_plans_are_refused_by_field(small_shape: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        list(RefreshPlan(**{**PLAN, **values}).workloads())


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="d3llm"):
        list(RefreshPlan(model="tiny-ar").workloads())
