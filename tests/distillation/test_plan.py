from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from d3llm_ray.config import build, parse, read_yaml, to_yaml
from d3llm_ray.distillation import run as distill
from d3llm_ray.distillation.data import TrajectorySet, load_samples
from d3llm_ray.distillation.plan import Plan
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.errors import InputError
from d3llm_ray.models import read_configs

RECIPES = Path(distill.__file__).parent / "recipes"


def settings_of(**values: Any) -> DistillSettings:
    return build(DistillSettings, {"trajectories": "rows", "output": "out", **values})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, write_trajectories: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    return write_trajectories(folder, rows=70, canvas=32, vocab_size=50, mask_token_id=49)


@pytest.fixture(scope="module")
def samples(rows: Path) -> TrajectorySet:
    return load_samples(str(rows))


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
        assert sample.length == len(row["prompt_ids"]) + 32
    assert samples.lengths.tolist() == [samples[n].length for n in range(70)]


def test_keep_correct_drops_wrong_answers_only(rows: Path) -> None:
    # The synthetic rows are, in turn, correct, wrong and unchecked.
    assert len(load_samples(str(rows), keep="correct")) == 70 - 23
    some = load_samples(str(rows), max_rows=10)
    assert some.prompt_ids == sorted(load_samples(str(rows)).prompt_ids)[:10]


def test_rows_without_an_order_are_refused_with_what_to_do(rows: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (file,) = rows.glob("*.parquet")
    written = pq.read_table(file)
    imported = [{**row, "reveal_step": None, "forwards": None} for row in written.slice(0, 2).to_pylist()]
    table = pa.concat_tables([pa.Table.from_pylist(imported, schema=written.schema), written.slice(2)])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(
        InputError, match="reveal_step: got 'null in 2 of 70 rows'; accepted: .*d3llm-ray trajectories --prompts"
    ):
        load_samples(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_step_trains_on_the_same_samples_windows_and_masks_with_any_number_of_workers(
    samples: TrajectorySet, workers: int
) -> None:
    def drawn(count: int, step: int) -> list[list[tuple[str, int, int, tuple[int, ...]]]]:
        plan = Plan(settings_of(workers=count, batch_size=16, micro_batch_size=4, epochs=3), samples)
        micro_batches = []
        for rank in range(count):
            for rows in plan.rows(step, rank, count):
                views = [(samples[row].prompt_id, plan.views(samples[row], step)) for row in rows]
                micro_batches.append([(i, v.window.start, v.window.end, tuple(v.masked.tolist())) for i, v in views])
        return sorted(micro_batches)

    for step in (0, 3, 4, 11):
        assert drawn(workers, step) == drawn(1, step)
    assert drawn(workers, 0) != drawn(workers, 4)  # another epoch: other draws


def test_an_epoch_sees_every_row_at_most_once_and_mixes_epochs(samples: TrajectorySet) -> None:
    plan = Plan(settings_of(workers=1, batch_size=16, micro_batch_size=4, epochs=5), samples)
    assert (plan.steps_per_epoch, plan.max_steps) == (4, 20)
    seen = []
    for epoch in range(5):
        rows = np.concatenate([plan.rows(epoch * 4 + n, 0, 1).ravel() for n in range(4)])
        assert rows.size == 64 == np.unique(rows).size
        seen.append(rows.tolist())
    assert len({tuple(order) for order in seen}) == 5
    assert len(set().union(*seen)) == 70  # the rows left out differ between epochs


def test_micro_batches_hold_like_lengths(samples: TrajectorySet) -> None:
    plan = Plan(settings_of(workers=1, batch_size=16, micro_batch_size=4), samples)
    spreads = [np.ptp(samples.lengths[row]) for step in range(4) for row in plan.rows(step, 0, 1)]
    assert np.mean(spreads) < np.ptp(samples.lengths) / 4


def test_schedules_reach_the_plan(samples: TrajectorySet) -> None:
    plan = Plan(
        settings_of(workers=1, batch_size=16, micro_batch_size=4, epochs=3, window_sizes=[8, 16, 24], max_steps=10),
        samples,
    )
    assert plan.max_steps == 10
    assert [plan.at(step).window for step in range(10)] == [8, 10, 12, 14, 16, 18, 20, 22, 24, 24]
    assert plan.at(5).noise_floor == pytest.approx(0.4)
    assert [plan.at(step).epoch for step in (3, 4, 9)] == [0, 1, 2]


def test_too_few_rows_is_an_input_error(samples: TrajectorySet) -> None:
    with pytest.raises(InputError, match=r"batch_size: got 128; accepted: at most the number of rows, 70"):
        Plan(settings_of(batch_size=128), samples)


PUBLISHED = {  # arXiv:2601.07568 and its training configurations
    "llada": (6, [16, 16, 24, 24, 32, 32], 2e-5, "constant", 0.0, 256, (0.25, 0.25, 0.5, "a"), "all"),
    "dream": (3, [16, 24, 32], 2e-5, "cosine", 0.05, 256, (0.25, 0.25, 0.25, "both"), "correct"),
    "dream-coder": (3, [16, 24, 32], 2e-6, "cosine", 0.05, 0, (0.25, 0.0, 0.25, "a"), "correct"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_hold_the_published_figures(name: str) -> None:
    settings = settings_of(**read_yaml(RECIPES / f"{name}.yaml"))
    epochs, sizes, lr, schedule, warmup, rank, weights, keep = PUBLISHED[name]
    assert (settings.epochs, list(settings.window_sizes), settings.keep) == (epochs, sizes, keep)
    assert (settings.lr, settings.lr_schedule, settings.warmup_ratio, settings.lora_rank) == (
        lr,
        schedule,
        warmup,
        rank,
    )
    assert (settings.ce_weight, settings.complement_weight, settings.entropy_weight, settings.entropy_views) == weights
    assert (settings.noise_start, settings.noise_end, settings.noise_max, settings.entropy_temperature) == (
        0,
        0.8,
        0.8,
        0.5,
    )
    assert (settings.workers, settings.micro_batch_size, settings.accumulation, settings.batch_size) == (4, 4, 4, 64)
    assert (settings.weight_decay, settings.clip, settings.precision, settings.zero_stage) == (0.01, 1.0, "bfloat16", 2)


def test_every_recipe_is_valid_and_round_trips() -> None:
    names = {file.stem for file in RECIPES.glob("*.yaml")}
    assert names == {*PUBLISHED, "tiny"}
    for name in names:
        settings = settings_of(**read_yaml(RECIPES / f"{name}.yaml"))
        assert settings_of(**yaml.safe_load(to_yaml(settings))) == settings


def test_the_command_line_takes_lists() -> None:
    argv = ["--trajectories", "a", "--output", "b", "--window-sizes", "8,16", "--lora-targets", "q_proj,up_proj"]
    settings, _ = parse(DistillSettings, argv)
    assert settings.window_sizes == (8, 16)
    assert settings.lora_targets == ("q_proj", "up_proj")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_targets": ["q_proj", "qproj"]}, "lora_targets.1: got 'qproj'"),
        ({"lora_targets": ["lm_head"]}, "lora_targets.0: got 'lm_head'"),
        ({"batch_size": 24, "micro_batch_size": 8}, "batch_size: got 24; accepted: a multiple of .* = 16"),
        ({"window_sizes": [16, 0]}, "window_sizes: got"),
        ({"window_sizes": []}, "window_sizes"),
        ({"noise_end": 0.9}, "noise_max: got 0.8"),
        ({"merge": False}, "merge: got false"),
        ({"lora_rank": 0, "save_adapter": True}, "lora_rank: got 0"),
        ({"lr": 0}, "lr: got 0"),
        ({"windows": [1]}, "windows: unknown setting; accepted: .*window_sizes"),
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

    refused("_ids of row '0+.'; accepted: ids below the teacher's vocabulary", vocab_size=config.vocab_size + 40)
    refused("response_ids of row '0+.'; accepted: no mask token", mask_token_id=-1)
    refused("prompt_ids and response_ids of row '0+.?'; accepted: at most 256 tokens", canvas=300)
    refused("prompt_id: got .* every prompt_id once", rows=40, repeat_first=True)
    refused("batch_size: got 32; accepted: at most the number of rows, 10", rows=10)
    with pytest.raises(InputError, match=r"trajectories: .*nowhere"):
        distill.run(settings_of(teacher=str(tiny_checkpoint), trajectories=str(tmp_path / "nowhere"), output="x"))
    with pytest.raises(InputError, match=r"model: unknown value 'tiny'"):
        distill.run(settings_of(teacher="tiny", trajectories=str(tmp_path), output="x"))
