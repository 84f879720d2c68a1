from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from d3llm_ray.config import build, parse, read_yaml, to_yaml
from d3llm_ray.distillation import run as distill
from d3llm_ray.distillation.data import TrajectorySet, read_rows
from d3llm_ray.distillation.objectives import BlockDiffusion, DiscreteForcing, Objective, PseudoTrajectory
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.preparation import load
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.errors import InputError
from d3llm_ray.models import read_configs
from d3llm_ray.progress import Progress
from tests.distillation.toys import family_of

RECIPES = Path(distill.__file__).parent / "recipes"


def settings_of(**values: Any) -> DistillSettings:
    return build(DistillSettings, {"trajectories": "rows", "output": "out", **values})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, write_trajectories: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    return write_trajectories(folder, rows=70, canvas=32, vocab_size=50, mask_token_id=49)


@pytest.fixture(scope="module")
def samples(rows: Path) -> TrajectorySet:
    return TrajectorySet(read_rows(str(rows), target="trajectory")[0])


def plan_of(samples: TrajectorySet, **values: Any) -> TrainingPlan:
    return TrainingPlan(settings_of(**values), samples, family_of("llada")[1])


def test_samples_hold_the_rows_as_written(rows: Path, samples: TrajectorySet) -> None:
    import pyarrow.parquet as pq

    (file,) = rows.glob("*.parquet")
    written = {row["prompt_id"]: row for row in pq.read_table(file).to_pylist()}
    assert len(samples) == len(written) == 70
    for sample in (samples[n] for n in range(70)):
        row = written.pop(sample.prompt_id)
        assert sample.prompt_ids.tolist() == row["prompt_ids"]
        assert sample.response_ids.tolist() == row["response_ids"]
        assert sample.reveal_step.tolist() == row["reveal_step"]
    assert samples.lengths.tolist() == [samples[n].prompt_ids.size + 32 for n in range(70)]


def test_a_wrong_answer_is_a_target_only_where_it_is_asked_for(rows: Path) -> None:
    # The synthetic rows are, in turn, correct, wrong and unchecked.
    for asked in ({"keep": "correct"}, {"keep": "correct", "target": "trajectory"}, {}):
        kept = read_rows(str(rows), **asked)  # type: ignore[arg-type]
        assert kept.train.num_rows == 70 - 23 and kept.left_out["wrong"] == 23
        assert False not in kept.train["is_correct"].to_pylist()
    everything = read_rows(str(rows), target="trajectory")
    assert everything.train.num_rows == 70 and not any(everything.left_out.values())


def test_held_out_rows_are_never_trained_on(rows: Path) -> None:
    everything = sorted(read_rows(str(rows))[0]["prompt_id"].to_pylist())
    train, held_out, _ = read_rows(str(rows), max_rows=10, held_out=4)
    assert held_out["prompt_id"].to_pylist() == everything[:4]
    assert train["prompt_id"].to_pylist() == everything[4:14]
    with pytest.raises(InputError, match=r"val_rows: got 47; accepted: fewer than the 47 rows there are"):
        read_rows(str(rows), held_out=47)


@pytest.fixture(scope="module")
def unordered(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as an importer writes answers: no order, and canvases that end with the answer (24 to 32 tokens)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (file,) = rows.glob("*.parquet")
    written = pq.read_table(file)
    lines = written.to_pylist()
    for n, line in enumerate(lines):
        line["response_ids"] = line["response_ids"][: 24 + n % 9]
        line["reveal_step"] = line["forwards"] = None
    path = tmp_path_factory.mktemp("unordered") / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(lines, schema=written.schema), path)
    return path


def test_rows_without_an_order_train_with_random_masks_only(unordered: Path) -> None:
    shape, family = family_of("llada")
    samples = TrajectorySet(
        read_rows(str(unordered), target="trajectory")[0], canvas=32, pad_token_id=family.eos_token_id
    )
    wide = dataclasses.replace(shape, vocab_size=50)
    with pytest.raises(
        InputError, match="reveal_step: got 'null in 70 of 70 rows'; .*prompts FILE.*or objective.order: random"
    ):
        samples.check(wide, family, ordered=True)
    micro = plan_of(samples, workers=1, batch_size=16, micro_batch_size=4, objective={"order": "random"}).micro_batch(3)
    assert micro.rows.size > 0 and micro.lengths.min() >= 32 + 4


def test_the_canvas_pads_short_answers_and_cuts_long_ones(rows: Path, unordered: Path) -> None:
    table = read_rows(str(unordered))[0]
    fitted, raw = TrajectorySet(table, canvas=28, pad_token_id=0), TrajectorySet(table)
    for n in range(len(raw)):
        answer = raw[n].response_ids.tolist()
        assert fitted[n].response_ids.tolist() == (answer + [0] * 28)[:28]
    assert fitted.lengths.tolist() == [fitted[n].prompt_ids.size + 28 for n in range(len(raw))]
    # Without a stop token all of an answer counts.
    assert fitted.cut([0]).tolist() == [max(0, raw[n].response_ids.size - 28) for n in range(len(raw))]
    # With an order, padding is what the teacher revealed last.
    ordered = TrajectorySet(read_rows(str(rows))[0], canvas=40)[3]
    assert ordered.reveal_step is not None
    assert ordered.reveal_step[:32].max() < 32 < ordered.reveal_step[32:].min()


PROMPT, STOP = [11, 12, 13], 0
TEACHER = [21, 22, STOP, STOP, 29, STOP]  # a canvas of six: what the teacher wrote behind its stop token stays
RESPONSE = [31, 32, 33, 34]


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """Two rows with a response of their own, the first of a wrong teacher, and a right and two wrong ones without."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from d3llm_ray.trajectories.schema import SCHEMA

    row = {"prompt_ids": PROMPT, "response_ids": TEACHER, "reveal_step": [1, 0, 2, 3, 5, 4], "forwards": 6}
    rows = [
        {"prompt_id": "a", "reference_ids": RESPONSE, "is_correct": False},
        {"prompt_id": "b", "reference_ids": [*RESPONSE, 35, 36], "is_correct": True},
        {"prompt_id": "c", "reference_ids": None, "is_correct": True},
        {"prompt_id": "d", "reference_ids": None, "is_correct": False},
        {"prompt_id": "e", "reference_ids": TEACHER[:2], "is_correct": False},  # an answer that was imported alone
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row | own for own in rows], schema=SCHEMA), path)
    return path


def test_targets_are_the_responses_and_the_trajectory_gives_the_order_by_position(references: Path) -> None:
    def of(target: str, **values: Any) -> dict[str, tuple[list[int], list[int]]]:
        table = read_rows(str(references), target=target)[0]  # type: ignore[arg-type]
        samples = TrajectorySet(table, target=target, pad_token_id=STOP, **values)  # type: ignore[arg-type]
        shown = (samples[n] for n in range(len(samples)))
        return {one.prompt_id: (one.response_ids.tolist(), np.asarray(one.reveal_step).tolist()) for one in shown}

    last = 2**16 - 1
    order = [1, 0, 2, 3, 5, 4]
    assert of("response") == {
        "a": ([31, 32, 33, 34, STOP, STOP], order),
        "b": ([31, 32, 33, 34, 35, 36, STOP], [*order, last]),  # longer than the teacher's canvas: revealed last
        "c": (TEACHER, order),
    }
    assert of("trajectory") == dict.fromkeys("abcde", (TEACHER, order))
    assert of("response", canvas=5)["b"] == ([31, 32, 33, 34, 35], [1, 0, 2, 3, 5])
    assert of("response", max_length=7)["a"] == ([31, 32, 33, 34], [1, 0, 2, 3])
    # keep: correct judges the teacher's row, as published.
    assert read_rows(str(references), keep="correct")[0]["prompt_id"].to_pylist() == ["b", "c"]


def test_what_is_cut_counts_up_to_the_stop_token(references: Path) -> None:
    table = read_rows(str(references))[0]  # answers of 5, 7 and 3 tokens with their stop tokens, prompts of 3

    def cut(**values: int) -> list[int]:
        return TrajectorySet(table, pad_token_id=STOP, **values).cut([STOP]).tolist()

    assert cut() == [0, 0, 0]
    assert cut(canvas=4) == cut(max_length=7) == [1, 3, 0]
    assert cut(canvas=100, max_length=5) == [3, 5, 1]
    assert TrajectorySet(table, canvas=100, max_length=8).lengths.tolist() == [8, 8, 8]  # padded and cut: rows of 8
    whole = TrajectorySet(table, target="trajectory", pad_token_id=STOP, canvas=2)
    assert whole.cut([STOP]).tolist() == [1, 1, 1]  # the teacher's first stop token, not the end of its canvas
    assert read_rows(str(references), max_length=4).left_out == {"wrong": 2, "without room in max_length": 0}
    with pytest.raises(InputError, match=r"at least one row \(keep: all, target: response\)"):
        read_rows(str(references), max_length=3)


def test_every_setting_of_the_rows_reaches_the_samples(references: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is left out or cut is said."""
    shape, family = family_of("llada")
    shape = dataclasses.replace(shape, vocab_size=50)

    def of(**values: Any) -> tuple[list[list[int]], str]:
        train, _ = load(settings_of(trajectories=str(references), **values), shape, family, Progress())
        return [train[n].response_ids.tolist() for n in range(len(train))], capsys.readouterr().err

    samples, said = of()
    assert samples == [[*RESPONSE, 0, 0], [*RESPONSE, 35, 36, 0], TEACHER]
    assert "3 rows to train on; left out: 2 wrong\n" in said
    assert of(target="trajectory")[0] == [TEACHER] * 5
    assert of(keep="correct")[0] == [[*RESPONSE, 35, 36, 0], TEACHER]
    samples, said = of(canvas=4)
    assert samples == [RESPONSE, RESPONSE, TEACHER[:4]] and "2 answers cut, by 4 tokens in all" in said
    samples, said = of(max_length=5, keep="correct")
    assert samples == [RESPONSE[:2], TEACHER[:2]]
    assert "2 rows to train on; left out: 3 wrong; 2 answers cut, by 6 tokens" in said


def drawn(samples: TrajectorySet, step: int, workers: int, **values: Any) -> list[tuple[Any, ...]]:
    """Everything that the workers together train on in a step, as comparable values."""
    plan = plan_of(samples, workers=workers, batch_size=16, micro_batch_size=4, epochs=3, **values)
    batches = []
    for rank in range(workers):
        numbers = plan.numbers(step, rank, workers)
        for number in numbers[: plan.settings.accumulation]:
            micro = plan.micro_batch(number)
            batches.append((micro.prompt_ids, tuple(micro.token_ids), tuple(micro.rows), tuple(micro.labels)))
    return sorted(batches)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("objective", ["windows", "d2f", "block-diffusion"])
def test_a_step_trains_on_the_same_batches_with_any_number_of_workers(
    samples: TrajectorySet, workers: int, objective: str
) -> None:
    for step in (0, 3, 4, 11):
        assert drawn(samples, step, workers, objective=objective) == drawn(samples, step, 1, objective=objective)
    assert drawn(samples, 0, workers) != drawn(samples, 4, workers)  # another epoch: other draws


def test_workers_take_every_micro_batch_once_from_any_step_on(samples: TrajectorySet) -> None:
    plan = plan_of(samples, workers=2, batch_size=16, micro_batch_size=4, epochs=3)
    taken = [number for rank in range(2) for number in plan.numbers(5, rank, 2)]
    assert sorted(taken) == list(range(5 * 4, 12 * 4))


def test_an_epoch_sees_every_row_at_most_once_and_mixes_epochs(samples: TrajectorySet) -> None:
    plan = plan_of(samples, workers=1, batch_size=16, micro_batch_size=4, epochs=5)
    assert (plan.steps_per_epoch, plan.max_steps) == (4, 20)
    seen = []
    for epoch in range(5):
        rows = [row for n in range(16) for row in plan.micro_batch(16 * epoch + n).prompt_ids]
        assert len(rows) == 64 == len(set(rows))
        seen.append(tuple(rows))
    assert len(set(seen)) == 5
    assert len(set().union(*seen)) == 70  # the rows left out differ between epochs


def test_micro_batches_hold_like_lengths(samples: TrajectorySet) -> None:
    plan = plan_of(samples, workers=1, batch_size=16, micro_batch_size=4)
    spreads = [np.ptp(plan.micro_batch(number).lengths) for number in range(16)]
    assert np.mean(spreads) < np.ptp(samples.lengths) / 4


def test_validation_is_drawn_once_at_the_end_of_the_curriculum(samples: TrajectorySet) -> None:
    plan = plan_of(samples, workers=1, batch_size=16, micro_batch_size=4, objective={"window_sizes": [8, 16]})
    alone = plan.validation(samples, 0, 1)
    assert sorted(row for micro in alone for row in micro.prompt_ids) == sorted(samples.prompt_ids.tolist())
    assert [micro.mask_ratio for micro in plan.validation(samples, 0, 1)] == [micro.mask_ratio for micro in alone]
    # noise 0.8 to 0.8 over windows of 16: round(12.8) of them
    assert all(micro.mask_ratio == pytest.approx(13 / 16) for micro in alone)
    shared = [micro.prompt_ids for rank in range(3) for micro in plan.validation(samples, rank, 3)]
    assert sorted(shared) == sorted(micro.prompt_ids for micro in alone)


def test_schedules_reach_the_plan(samples: TrajectorySet) -> None:
    windows = {"window_sizes": [8, 16, 24]}
    plan = plan_of(samples, workers=1, batch_size=16, micro_batch_size=4, epochs=3, objective=windows, max_steps=10)
    assert plan.max_steps == 10
    scheduled = [plan.objective.curriculum(plan.at(step)) for step in range(10)]
    assert [now["window"] for now in scheduled] == [8, 10, 12, 14, 16, 18, 20, 22, 24, 24]
    assert scheduled[5]["noise_floor"] == pytest.approx(0.4)
    assert plan.objective.curriculum(None) == {"window": 24, "noise_floor": 0.8}
    assert [plan.at(step).epoch for step in (3, 4, 9)] == [0, 1, 2]
    assert [plan.lr(step) for step in (0, 9)] == pytest.approx([5e-4, 1e-3 * 0.5 * (1 + math.cos(math.pi * 8 / 9))])


def test_too_few_rows_is_an_input_error(samples: TrajectorySet) -> None:
    with pytest.raises(InputError, match=r"batch_size: got 128; accepted: at most the number of rows, 70"):
        plan_of(samples, batch_size=128)


PUBLISHED = {  # arXiv:2601.07568 and its training configurations
    "llada": (6, [16, 16, 24, 24, 32, 32], 2e-5, "constant", 0.0, 256, (0.25, 0.25, 0.5, "a"), "all", (384, 384)),
    "dream": (3, [16, 24, 32], 2e-5, "cosine", 0.05, 256, (1.0, 1.0, 1.0, "both"), "correct", (256, None)),
    "dream-coder": (3, [16, 24, 32], 2e-6, "cosine", 0.05, 0, (1.0, 0.0, 1.0, "a"), "correct", (512, None)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_hold_the_published_figures(name: str) -> None:
    settings = settings_of(**read_yaml(RECIPES / f"{name}.yaml"))
    epochs, sizes, lr, schedule, warmup, rank, weights, keep, cut = PUBLISHED[name]
    objective = settings.objective
    assert isinstance(objective, PseudoTrajectory)
    assert (settings.epochs, list(objective.window_sizes), settings.keep) == (epochs, sizes, keep)
    assert (settings.lr, settings.lr_schedule, settings.warmup_ratio, settings.lora_rank) == (
        lr,
        schedule,
        warmup,
        rank,
    )
    assert weights == (
        objective.ce_weight,
        objective.complement_weight,
        objective.certainty_weight,
        objective.certainty_views,
    )
    assert (objective.noise_start, objective.noise_end, objective.noise_max) == (0, 0.8, 0.8)
    assert (objective.order, objective.ratio_rounding, objective.certainty_temperature) == ("trajectory", "exact", 0.5)
    assert (objective.window_domain, settings.target) == ("answer", "response")
    assert (settings.canvas, settings.max_length) == cut
    assert settings.lora_targets is None  # all seven
    assert (settings.workers, settings.micro_batch_size, settings.accumulation, settings.batch_size) == (4, 4, 4, 64)
    assert (settings.weight_decay, settings.clip, settings.precision, settings.zero_stage) == (0.01, 1.0, "bfloat16", 2)


def test_rival_recipes_hold_the_published_figures() -> None:
    dparallel = settings_of(**read_yaml(RECIPES / "dparallel.yaml"))
    windows = dparallel.objective
    assert isinstance(windows, PseudoTrajectory)
    assert (windows.order, windows.window_sizes) == ("random", (32,))
    assert windows.noise_start == windows.noise_end == windows.noise_max == 0.5
    assert (windows.ce_weight, windows.complement_weight, windows.certainty_weight) == (1.0, 1.0, 2.0)
    assert (windows.certainty_views, windows.certainty_temperature) == ("both", 0.5)
    assert (windows.window_domain, dparallel.canvas, dparallel.max_length) == ("canvas", 384, 384)
    assert (dparallel.lora_rank, dparallel.lora_alpha, dparallel.lr, dparallel.lr_schedule) == (
        128,
        128,
        2e-5,
        "constant",
    )
    assert (dparallel.workers, dparallel.micro_batch_size, dparallel.accumulation, dparallel.epochs) == (8, 1, 8, 6)
    d2f = settings_of(**read_yaml(RECIPES / "d2f.yaml"))
    assert (d2f.objective, d2f.max_steps, d2f.accumulation) == (DiscreteForcing(16, (0.2, 0.7)), 50_000, 5)
    assert (d2f.canvas, d2f.max_length) == (None, 512)
    assert (d2f.lora_rank, d2f.lora_alpha, d2f.lora_dropout) == (32, 32, 0.1)
    assert d2f.lora_targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (d2f.lr, d2f.weight_decay, d2f.betas, d2f.clip) == (1e-5, 0.05, (0.9, 0.95), 1.0)
    v2 = settings_of(**read_yaml(RECIPES / "fast-dllm-v2.yaml"))
    assert (v2.objective, v2.lora_rank, v2.max_length) == (BlockDiffusion(32), 0, 2048)


def test_every_recipe_is_valid_and_round_trips() -> None:
    names = {file.stem for file in RECIPES.glob("*.yaml")}
    rivals = {"dparallel", "d2f", "fast-dllm-v2"}
    assert names == {*PUBLISHED, *rivals, "tiny", *(f"tiny-{name}" for name in rivals)}
    for name in names:
        settings = settings_of(**read_yaml(RECIPES / f"{name}.yaml"))
        assert settings_of(**yaml.safe_load(to_yaml(settings))) == settings


REQUIRED = ["--trajectories", "a", "--output", "b"]


def test_the_command_line_takes_lists() -> None:
    argv = [*REQUIRED, "--objective.window-sizes", "8,16", "--lora-targets", "q_proj,up_proj"]
    settings, _ = parse(DistillSettings, argv)
    assert settings.objective == PseudoTrajectory(window_sizes=(8, 16))
    assert settings.lora_targets == ("q_proj", "up_proj")


@pytest.mark.parametrize(
    ("argv", "objective"),
    [
        (["--objective", "d2f"], DiscreteForcing()),
        (["--objective.name", "d2f", "--objective.block-size", "8"], DiscreteForcing(block_size=8)),
        (
            ["--objective.name=d2f", "--objective.block_size=8", "--objective.noise", "0.3,0.5"],
            DiscreteForcing(8, (0.3, 0.5)),
        ),
        (["--objective", '{"name": "block-diffusion", "block_size": 32}'], BlockDiffusion(32)),
        (["--config", "tiny-fast-dllm-v2", "--objective.block-size", "4"], BlockDiffusion(4)),
        (["--objective.order", "random", "--objective.ce-weight", "0.5"], PseudoTrajectory("random", ce_weight=0.5)),
        # The recipe's parameters stay with its objective, and go with another one.
        (["--config", "tiny", "--objective.noise-end", "0.5"], PseudoTrajectory(noise_end=0.5, window_domain="canvas")),
        (["--config", "tiny-dparallel", "--objective.name", "d2f"], DiscreteForcing()),
        (["--config", "tiny-dparallel", "--objective", "d2f"], DiscreteForcing()),
    ],
)
def test_the_command_line_takes_an_objective_and_its_parameters(argv: list[str], objective: Objective) -> None:
    settings, _ = parse(DistillSettings, [*REQUIRED, "--lora-rank", "4", *argv])
    assert settings.objective == objective
    assert settings_of(**yaml.safe_load(to_yaml(settings))) == settings


@pytest.mark.parametrize("flag", ["--use-gpu", "--no-use_gpu", "--d2f-noise", "--entropy_weight"])
def test_old_flags_are_refused_with_todays_name(flag: str) -> None:
    with pytest.raises(InputError, match="is called (device|objective.noise|objective.certainty_weight) now"):
        parse(DistillSettings, [*REQUIRED, flag, "1"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_targets": []}, "lora_targets: got"),
        ({"batch_size": 24, "micro_batch_size": 8}, "batch_size: got 24; accepted: a multiple of .* = 16"),
        ({"objective": {"window_sizes": [16, 0]}}, r"objective.window_sizes: got \[16, 0\]; accepted: positive"),
        ({"objective": {"window_sizes": []}}, "objective.window_sizes"),
        ({"objective": {"noise_end": 0.9}}, "objective.noise_max: got 0.8; accepted: at least"),
        ({"merge": False}, "merge: got false"),
        ({"lora_rank": 0, "save_adapter": True}, "lora_rank: got 0"),
        ({"lr": 0}, "lr: got 0"),
        ({"objective": "d2f", "lora_rank": 0}, "lora_rank: got 0; accepted: at least 1 with objective: d2f"),
        (
            {"objective": {"name": "d2f", "noise": [0.7, 0.2]}},
            r"objective.noise: got \[0.7, 0.2\]; accepted: two ratios",
        ),
        ({"betas": [0.9, 1.0]}, r"betas: got \[0.9, 1.0\]"),
        ({"offload": "all"}, "zero_stage: got 0 with offload: all; accepted: .* 3 to offload all"),
        ({"offload": "optimizer"}, "zero_stage: got 0 with offload: optimizer"),
        ({"export": "best"}, "export: got 'best' without val_every"),
        ({"val_every": 5, "val_rows": 0}, "val_rows: got 0 without val_task"),
        ({"val_every": 5, "select_by": "accuracy"}, "select_by: got 'accuracy'; accepted: loss with val_rows"),
        ({"objective": "d3llm"}, "objective.name: unknown value 'd3llm'; accepted: block-diffusion, d2f, windows"),
        ({"objective": 3}, "objective: got 3; accepted: windows, d2f, block-diffusion, or a mapping"),
        ({"objective": {"name": "d2f", "order": "random"}}, "objective.order: unknown setting of d2f; .*: block_size"),
        ({"objective": {"order": "sideways"}}, "objective.order: got 'sideways'"),
        (
            {"objective": {"ce_weight": -1, "noise_max": 2}},
            "objective.noise_max: got 2: .*; objective.ce_weight: got -1",
        ),
        ({"objective": "d2f", "block_size": 8}, "block_size: is called objective.block_size now"),
        ({"entropy_weight": 1.0, "use_gpu": True}, "use_gpu: is called device now; entropy_weight: .*certainty_weight"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"windows": [1]}, "windows: unknown setting; accepted: .*objective"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings_of(**values)


def test_rows_of_another_model_are_refused_before_ray_starts(
    tmp_path: Path, tiny_checkpoint: Path, write_trajectories: Callable[..., Path]
) -> None:
    config, family = read_configs(tiny_checkpoint)
    assert family.mask_token_id is not None

    def refused(message: str, **rows: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        values = {"rows": 40, "canvas": 32, "vocab_size": config.vocab_size, "mask_token_id": family.mask_token_id}
        path = write_trajectories(folder, **{**values, **rows})
        settings = settings_of(teacher=str(tiny_checkpoint), trajectories=str(path), output=str(tmp_path / "out"))
        with pytest.raises(InputError, match=message):
            distill.run(settings)

    refused(r"_ids of row '0+.' .*; accepted: ids below the teacher's vocabulary", vocab_size=config.vocab_size + 40)
    refused(r"response of row '0+.' .*; accepted: no mask token", mask_token_id=-1)
    refused(
        r"prompt and response of row '0+.?' \(\d+ \+ 300 tokens\); accepted: at most the model's context of 256",
        canvas=300,
    )
    refused("prompt_id: got .* every prompt_id once", rows=40, repeat_first=True)
    refused("batch_size: got 32; accepted: at most the number of rows, 7 with keep: all", rows=10)
    with pytest.raises(InputError, match=r"trajectories: .*nowhere"):
        distill.run(settings_of(teacher=str(tiny_checkpoint), trajectories=str(tmp_path / "nowhere"), output="x"))
    with pytest.raises(InputError, match=r"model: unknown value 'tiny'"):
        distill.run(settings_of(teacher="tiny", trajectories=str(tmp_path), output="x"))
