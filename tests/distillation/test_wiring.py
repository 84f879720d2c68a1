"""Every setting of `distill` has a value of its own here, and is looked for where it acts.

A new setting needs a line in `ARRIVES`: its value, and where it is seen in a run. The runs are small, in this process,
and are watched where they hand things on: to torch, peft, Ray and the files.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from d3llm_ray.config import build, parse
from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.distillation import local, preparation, student
from d3llm_ray.distillation import run as verb
from d3llm_ray.distillation.data import TrajectorySet, read_rows
from d3llm_ray.distillation.objectives import LossModule
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.student import with_adapters
from d3llm_ray.distillation.training import engines, job, validation, worker
from d3llm_ray.distillation.training.metrics_file import read_metrics
from d3llm_ray.models import read_configs
from d3llm_ray.progress import Progress
from d3llm_ray.yaml_file import read_yaml
from tests.distillation.toys import family_of, toy
from tests.wiring import Look, Seen, only

QUIET = Progress(quiet=True)
CANVAS, OWN_CANVAS = 32, 36


class Stop(Exception):
    """Ends a run where enough has been seen."""


# Setting -> (a value that is not its default, where it is seen); None: a path that the fixtures make.
ARRIVES: dict[str, tuple[Any, Look]] = {
    "teacher": (None, only("teacher")),
    "trajectories": (None, only("trajectories")),
    "output": (None, only("student")),
    "keep": ("correct", lambda seen: "correct" if not seen["wrong rows"] else "all"),
    "target": ("trajectory", only("read: target")),
    "max_length": (47, only("read: max_length")),  # the longest row: 11 of prompt and the canvas
    "max_rows": (26, only("rows")),
    "canvas": (OWN_CANVAS, only("canvas")),
    "objective": ({"window_sizes": [4, 6]}, only("objective")),
    "epochs": (3, only("epochs")),
    "max_steps": (5, lambda seen: len(seen["rates"])),
    "lora_rank": (3, lambda seen: only("lora")(seen).r),
    "lora_alpha": (5, lambda seen: only("lora")(seen).lora_alpha),
    "lora_dropout": (0.25, lambda seen: only("lora")(seen).lora_dropout),
    "lora_targets": (("q_proj", "down_proj"), lambda seen: tuple(only("adapted")(seen))),
    "merge": (False, lambda seen: "model.safetensors" in seen["files"]),
    "save_adapter": (True, lambda seen: "adapter" in seen["files"]),
    "lr": (0.02, lambda seen: seen["rates"][2]),
    "lr_schedule": ("constant", lambda seen: "constant" if seen["rates"][2] == seen["rates"][4] else "cosine"),
    "warmup_ratio": (0.4, lambda seen: round(sum(rate < 0.0199 for rate in seen["rates"]) / 5, 1)),
    "weight_decay": (0.03, only("weight_decay")),
    "betas": ((0.8, 0.95), only("betas")),
    "clip": (0.125, only("clip")),
    "batch_size": (12, lambda seen: sum(seen["micro"]) // len(seen["rates"])),
    "micro_batch_size": (2, only("micro")),
    "precision": ("bfloat16", lambda seen: str(only("dtype")(seen)).removeprefix("torch.")),
    "zero_stage": (3, lambda seen: only("deepspeed")(seen)["zero_optimization"]["stage"]),
    "offload": ("all", lambda seen: "all" if "offload_param" in seen["deepspeed"][0]["zero_optimization"] else ""),
    "activation_checkpointing": (True, lambda seen: sum(seen["recomputed"]) > 0),
    "head_rows": (7, lambda seen: max(seen["head"])),
    "workers": (3, only("num_workers")),
    "device": ("cuda:1", only("trained on")),
    "cpus_per_actor": (4, only("threads")),
    "resource_timeout_s": (7.5, only("patience")),
    "checkpoint_every": (2, lambda seen: seen["saved"][0]),
    "keep_checkpoints": (3, only("kept")),
    "max_failures": (9, only("max_failures")),
    "log_every": (4, lambda seen: next(step for step in seen["logged"] if step != 3)),  # 3 is a validation
    "val_every": (3, lambda seen: seen["validated"][0]),
    "val_rows": (4, only("held out")),
    "val_task": ("arith", only("task")),
    "val_count": (2, only("problems")),
    "val_decoder": ("dparallel", lambda seen: only("decoder")(seen).name),
    "val_decoder_settings": ({"entropy_threshold": 0.7}, lambda seen: _chosen(only("decoder")(seen))),
    "val_max_tokens": (16, only("val_max_tokens")),
    "select_by": ("accuracy", only("selected by")),
    "export": ("best", lambda seen: "best" if {"last", "validation.json"} <= {*seen["files"]} else ""),
    "seed": (11, only("adapters' seed")),
}


def _chosen(decoder: Any) -> dict[str, Any]:
    return {"entropy_threshold": decoder.settings()["entropy_threshold"]}


@pytest.fixture(scope="module")
def paths(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, write_trajectories: Callable[..., Path]
) -> dict[str, str]:
    """The settings that are paths."""
    _, family = read_configs(tiny_checkpoint)
    folder = tmp_path_factory.mktemp("wiring")
    rows = write_trajectories(folder / "rows", rows=60, canvas=CANVAS, vocab_size=4, mask_token_id=family.mask_token_id)
    return {"teacher": str(tiny_checkpoint), "trajectories": str(rows), "output": str(folder / "student")}


@pytest.fixture(scope="module")
def given(paths: dict[str, str]) -> dict[str, Any]:
    """A value of its own for every setting."""
    return {name: ARRIVES[name][0] for name in DistillSettings.model_fields if name in ARRIVES} | paths


@pytest.fixture(scope="module")
def seen(given: dict[str, Any]) -> Iterator[Seen]:
    """What three runs of these settings handed on."""
    found: Seen = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        _watch(patch, found)
        watched = job.run_worker
        here = build(DistillSettings, {**given, "device": "cpu", "offload": "none"})
        found["student"].append(str(local.distil_here(here, QUIET)))
        found["files"] += [path.name for path in Path(here.output).iterdir()]
        for device in ("cpu", "cuda"):
            output = f"{given['output']}-ray-{device}"
            _ray_run(patch, found, build(DistillSettings, {**given, "output": output, "device": device}))
        _device_of_a_local_run(patch, found, build(DistillSettings, {**given, "output": given["output"] + "-cuda"}))
        _options_of_a_worker(patch, found, given, watched)
    yield found


def _watch(patch: pytest.MonkeyPatch, seen: Seen) -> None:
    """Note what a run in this process hands on."""
    patch.setattr(preparation, "can_plot", lambda *_: False)

    def tell(owner: Any, name: str, note: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def told(*args: Any, **kwargs: Any) -> Any:
            note(*args, **kwargs)
            return original(*args, **kwargs)

        patch.setattr(owner, name, told)

    def stepped(optimizer: torch.optim.AdamW, *_: Any, **__: Any) -> None:
        matrices = [group for group in optimizer.param_groups if any(p.dim() > 1 for p in group["params"])]
        for name in ("betas", "weight_decay"):
            seen[name] += [group[name] for group in matrices]
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        seen["rates"].append(rate)

    def batched(module: LossModule, micro: Any, _device: Any) -> None:
        if torch.is_grad_enabled():
            seen["micro"].append(len(micro.prompt_ids))
            seen["canvas"] += (micro.lengths - micro.prompt_lengths).tolist()
            seen["objective"].append({"window_sizes": list(module.objective.window_sizes)})  # type: ignore[attr-defined]
            seen["wrong rows"] += [row for row in micro.prompt_ids if int(row, 16) % 3 == 1]  # see `write_rows`

    def built(model: Any, settings: DistillSettings) -> None:
        if next(model.parameters()).device.type != "meta":
            seen["adapters' seed"].append(torch.initial_seed())
            seen["dtype"].append(next(model.parameters()).dtype)

    def validated(validator: validation.Validator, step: int) -> None:
        seen["validated"].append(step)
        seen["held out"].append(sum(len(micro.prompt_ids) for micro in validator._held_out))

    def decoded(llm: DiffusionLLM, prompts: Any, **options: Any) -> None:
        seen["problems"].append(len(prompts))
        seen["val_max_tokens"].append(options["max_tokens"])
        seen["decoder"].append(llm.engine.decoder)

    def planned(plan: TrainingPlan, settings: DistillSettings, samples: TrajectorySet, _family: Any) -> None:
        seen["rows"].append(len(samples))
        seen["epochs"].append(settings.epochs)

    def read(path: str, **options: Any) -> None:
        seen["trajectories"].append(path)
        for name, value in options.items():
            seen[f"read: {name}"].append(value)

    def saved(_engine: Any, folder: Path, step: int, keep: int) -> None:
        seen["saved"].append(step)
        seen["kept"].append(keep)

    tell(torch.optim.AdamW, "step", stepped)
    tell(torch.nn.utils, "clip_grad_norm_", lambda _parameters, largest: seen["clip"].append(largest))
    tell(student, "load_model", lambda name, *_: seen["teacher"].append(str(name)))
    tell(student, "with_adapters", built)
    tell(student, "checkpoint", lambda *_, **__: seen["recomputed"].append(1))
    tell(preparation, "read_rows", read)
    tell(job, "save", saved)
    tell(validation, "load_task", lambda name: seen["task"].append(name))
    tell(validation, "score", lambda _line, by: seen["selected by"].append(by))
    tell(validation.Validator, "__call__", validated)
    tell(DiffusionLLM, "generate", decoded)
    tell(LossModule, "batch", batched)
    tell(LossModule, "logits", lambda _module, hidden: seen["head"].append(len(hidden)))
    tell(TrainingPlan, "__init__", planned)

    trained = job.train

    def train(engine: Any, module: Any, plan: Any, batches: Any, done: int, hooks: Any, device: Any) -> None:
        adapters = module.model.peft_config["default"]
        seen["lora"].append(adapters)
        names = [name for name, _ in module.named_parameters() if "lora_A" in name]
        layer = [name.split(".lora_A")[0].rpartition(".")[2] for name in names if "layers.0." in name]
        seen["adapted"].append(layer)

        def log(line: dict[str, Any]) -> None:
            seen["logged"].append(line["step"])
            hooks.log(line)

        trained(engine, module, plan, batches, done, job.Hooks(log, hooks.save, hooks.validate), device)

    patch.setattr(job, "train", train)


def _ray_run(patch: pytest.MonkeyPatch, seen: Seen, settings: DistillSettings) -> None:
    """`run` with a trainer that calls one worker, whose training is left out."""

    class Trainer:
        def __init__(self, loop: Any, **options: Any) -> None:
            self.loop, self.options = loop, options

        def fit(self) -> Any:
            scaling, config = self.options["scaling_config"], self.options["run_config"]
            seen["num_workers"].append(scaling.num_workers)
            backend = self.options["torch_config"].backend
            seen["resources"].append((backend, scaling.use_gpu, scaling.resources_per_worker))
            seen["max_failures"].append(config.failure_config.max_failures)
            seen["trained in"].append(self.options["train_loop_config"]["work"])
            self.loop(self.options["train_loop_config"])
            return SimpleNamespace(return_value=None)

    def waited(demand: list[dict[str, float]], timeout: float, _what: str) -> None:
        seen["demand"].append(demand)
        seen["patience"].append(timeout)

    with patch.context() as inner:
        inner.setattr(verb.cluster, "connect", lambda min_cpus: seen["cpus"].append(min_cpus))
        inner.setattr(verb.cluster, "quieten", lambda _name: None)
        inner.setattr(verb.cluster, "wait_for_resources", waited)
        inner.setattr(verb.ray, "put", lambda value: value)
        inner.setattr(verb.ray.data, "range", lambda _count: None)
        inner.setattr(verb, "InterruptibleTrainer", Trainer)
        inner.setattr(verb, "settle", lambda job: Path(job.settings.output))
        inner.setattr(worker.ray, "get", lambda values: values)
        inner.setattr(worker.ray.train.torch, "get_device", lambda: torch.device("cpu"))
        inner.setattr(worker.torch, "set_num_threads", seen["threads"].append)
        inner.setattr(worker, "run_worker", lambda job, *_: seen["worked on"].append(job))
        verb.run(settings, QUIET)


def _device_of_a_local_run(patch: pytest.MonkeyPatch, seen: Seen, settings: DistillSettings) -> None:
    with patch.context() as inner:
        inner.setattr(local, "check_device", lambda _device: None)
        inner.setattr(local, "run_worker", lambda _job, device, *_: seen["trained on"].append(str(device)))
        inner.setattr(local, "settle", lambda job: Path(job.settings.output))
        local.distil_here(settings, QUIET)


def _options_of_a_worker(
    patch: pytest.MonkeyPatch, seen: Seen, given: dict[str, Any], run_worker: Callable[..., None]
) -> None:
    from d3llm_ray.distillation.training.deepspeed_engine import _config

    def make_engine(_module: Any, options: engines.EngineOptions) -> Any:
        seen["deepspeed"].append(_config(options, on_gpu=False, clip=options.clip))
        seen["engine"].append(options)
        raise Stop

    settings = build(DistillSettings, {**given, "output": given["output"] + "-options", "device": "cpu"})
    with contextlib.suppress(Stop):
        prepared = preparation.prepare(settings, QUIET)
        run_worker(prepared, torch.device("cpu"), make_engine, iter, lambda _step: None)


@pytest.mark.parametrize("name", DistillSettings.model_fields)
def test_every_setting_arrives_where_it_acts(name: str, given: dict[str, Any], seen: Seen) -> None:
    assert name in ARRIVES, f"{name}: a new setting needs a value of its own, and a look where it acts, in ARRIVES"
    value, look = ARRIVES[name]
    expected = given[name]
    assert value is None or expected != DistillSettings.model_fields[name].get_default(), "a default proves nothing"
    arrived = look(seen)
    assert arrived == expected or (isinstance(expected, float) and arrived == pytest.approx(expected))


def test_a_step_of_three_workers_takes_the_whole_batch(seen: Seen) -> None:
    """12 rows a step: two forwards of 2 rows on each of 3 workers, and 6 forwards in one process."""
    (options,) = seen["engine"]
    assert (options.micro_batch_size, options.accumulation, options.bfloat16) == (2, 2, True)
    config = seen["deepspeed"][0]
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 2)
    assert (config["gradient_clipping"], config["bf16"]) == (0.125, {"enabled": True})
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert (options.betas, options.weight_decay, options.clip) == ((0.8, 0.95), 0.03, 0.125)
    assert len(seen["micro"]) == 5 * 6


@pytest.mark.parametrize(
    ("precision", "weights", "autocast"),
    [("float32", torch.float32, False), ("mixed", torch.float32, True), ("bfloat16", torch.bfloat16, False)],
)
def test_precision_is_that_of_the_weights_and_of_the_products(
    precision: str, weights: torch.dtype, autocast: bool, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = build(DistillSettings, {**paths, "precision": precision, "lora_rank": 0})
    module, _ = student.build_student(settings, torch.device("cpu"))
    assert {weight.dtype for weight in module.parameters()} == {weights}
    assert settings.engine_options().bfloat16 == (precision == "bfloat16")
    computed: list[bool] = []
    watching: Any = lambda *_: computed.append(torch.is_autocast_enabled("cpu"))  # noqa: E731
    monkeypatch.setattr(type(settings.objective), "loss", watching)
    module(SimpleNamespace(token_ids=torch.zeros(1)))
    assert computed == [autocast]


def test_ray_is_asked_for_what_the_settings_say(seen: Seen) -> None:
    on_cpu, on_gpu = {"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}
    assert seen["resources"] == [("gloo", False, on_cpu), ("nccl", True, on_gpu)]
    assert seen["demand"] == [[on_cpu] * 3, [on_gpu] * 3]
    assert seen["cpus"] == [3 * 4 + 3] * 2  # and one a worker that packs its batches
    assert [str(worked.work) for worked in seen["worked on"]] == seen["trained in"]
    assert {(len(worked.held_out), len(worked.plan.samples)) for worked in seen["worked on"]} == {(4, 26)}


# Five steps, of which ceil(0.4 x 5) = 2 warm up in thirds; then constant, or the half cosine at 0, 1/3 and 2/3 of it.
CONSTANT = [0.02 / 3, 0.04 / 3, 0.02, 0.02, 0.02]
COSINE = [0.02 / 3, 0.04 / 3, 0.02, 0.015, 0.005]


def test_the_rate_that_moves_the_weights_follows_the_schedule(
    paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    assert seen["rates"] == pytest.approx(CONSTANT)
    used: list[float] = []
    step = torch.optim.AdamW.step

    def noted(optimizer: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        used.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    monkeypatch.setattr(preparation, "can_plot", lambda *_: False)
    values = {"lr": 0.02, "warmup_ratio": 0.4, "max_steps": 5, "workers": 1, "output": str(tmp_path / "student")}
    values |= {"batch_size": 8, "micro_batch_size": 8, "lora_rank": 4, "precision": "float32"}
    folder = local.distil_here(build(DistillSettings, paths | values), QUIET)
    assert used == pytest.approx(COSINE)
    assert [line["lr"] for line in read_metrics(folder / "metrics.jsonl")] == pytest.approx(COSINE, rel=1e-5)


RECIPES = sorted(file.stem for file in (Path(verb.__file__).parent / "recipes").glob("*.yaml"))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_of_a_shipped_recipe_arrives(name: str, tmp_path: Path) -> None:
    written = read_yaml(Path(verb.__file__).parent / "recipes" / f"{name}.yaml")
    settings, _ = parse(DistillSettings, ["--config", name, "--trajectories", "rows", "--output", "out"])
    objective = written.pop("objective")
    assert settings.objective.name == objective.pop("name")
    for field, value in objective.items():
        assert getattr(settings.objective, field) == (tuple(value) if isinstance(value, list) else value), field
    for field, value in written.items():
        assert getattr(settings, field) == (tuple(value) if isinstance(value, list) else value), field
    options = settings.engine_options()
    workers, rows = written["workers"], written["micro_batch_size"]
    assert (options.micro_batch_size, options.accumulation) == (rows, written["batch_size"] // (workers * rows))
    assert (options.zero_stage, options.bfloat16) == (written.get("zero_stage", 0), written["precision"] == "bfloat16")
    assert options.weight_decay == written.get("weight_decay", 0.01) and options.clip == written.get("clip", 1.0)
    assert options.betas == tuple(written.get("betas", (0.9, 0.999)))
    model = with_adapters(toy("llada")[0], settings)
    if written["lora_rank"] == 0:
        assert all(weight.requires_grad for weight in model.parameters())
        return
    adapters = model.peft_config["default"]
    assert isinstance(adapters, LoraConfig)
    assert (adapters.r, adapters.lora_alpha) == (written["lora_rank"], written["lora_alpha"])
    assert adapters.lora_dropout == written.get("lora_dropout", 0.0)
    assert set(adapters.target_modules or ()) == set(written.get("lora_targets", PROJECTIONS))


# How a run is carried out: other values may continue it.
HOW = {"workers", "device", "cpus_per_actor", "zero_stage", "offload", "activation_checkpointing", "head_rows"}
HOW |= {"resource_timeout_s", "checkpoint_every", "keep_checkpoints", "max_failures", "log_every"}


@pytest.fixture(scope="module")
def fingerprint(paths: dict[str, str]) -> Callable[..., str]:
    """`fingerprint(**settings) -> str` of a run on the rows."""
    plan = TrainingPlan(
        build(DistillSettings, paths), TrajectorySet(read_rows(paths["trajectories"])[0]), family_of("llada")[1]
    )

    def name(**values: Any) -> str:
        return preparation.run_fingerprint(build(DistillSettings, {**paths, **values}), plan)

    return name


# Settings with which each may differ, and another value where the one of `ARRIVES` is among them or does not go along.
TOGETHER = {"batch_size": 24, "micro_batch_size": 4, "save_adapter": True, "zero_stage": 3}
TOGETHER |= {"val_every": 9, "val_task": "prompts.jsonl"}
OTHERS = {"teacher": "tiny-llada", "trajectories": "elsewhere", "output": "elsewhere"}
OTHERS |= {"batch_size": 16, "micro_batch_size": 2, "save_adapter": False, "zero_stage": 2}


@pytest.mark.parametrize("name", DistillSettings.model_fields)
def test_a_run_is_known_by_every_setting_that_changes_its_result(
    name: str, given: dict[str, Any], fingerprint: Callable[..., str]
) -> None:
    other = OTHERS.get(name, given[name])
    assert (fingerprint(**TOGETHER) == fingerprint(**TOGETHER | {name: other})) == (name in HOW)


def test_a_run_is_known_by_its_teachers_files_and_its_rows(
    paths: dict[str, str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_checkpoint, tmp_path / "teacher")
    settings = build(DistillSettings, {**paths, "teacher": str(teacher)})
    table, family = read_rows(paths["trajectories"])[0], family_of("llada")[1]
    plan = TrainingPlan(settings, TrajectorySet(table), family)
    known = preparation.run_fingerprint(settings, plan)
    assert preparation.run_fingerprint(settings, plan) == known
    other_rows = TrainingPlan(settings, TrajectorySet(table.slice(1)), family)
    assert preparation.run_fingerprint(settings, other_rows) != known
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])  # trained again: as long as before
    assert preparation.run_fingerprint(settings, plan) != known


def test_the_fingerprint_names_the_work_folder(paths: dict[str, str], tmp_path: Path) -> None:
    """Two runs with the same output and other settings never share checkpoints."""
    works = []
    for lr in (1e-3, 2e-3):
        settings = build(DistillSettings, {**paths, "output": str(tmp_path / "student"), "lr": lr})
        works.append(preparation.prepare(settings, QUIET).work)
    assert works[0] != works[1] and all(work.parent == tmp_path and ".student." in work.name for work in works)
