"""SIGKILL to a worker, to the controller's node and to the whole of a distillation: the same student at the end."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from d3llm_ray.config import build
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.preparation import load
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.student import student_family
from d3llm_ray.distillation.training.job import CHECKPOINTS
from d3llm_ray.models import read_configs
from tests.chaos.cluster import Cluster
from tests.chaos.command import Figures, wait_until
from tests.chaos.distillation import Distillation, figures
from tests.distillation.rows import SMALL_RUN, write_rows

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(700, func_only=True)]
STEPS, KILLED_AT = 100, 37
BASE = {**SMALL_RUN, "max_steps": STEPS, "workers": 2, "resource_timeout_s": 60.0}


@pytest.fixture(scope="module")
def settings(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillSettings:
    """Settings of the job, but for its output."""
    mask_token_id = read_configs(tiny_checkpoint)[1].mask_token_id
    folder = tmp_path_factory.mktemp("trajectories")
    rows = write_rows(folder, rows=100, canvas=32, vocab_size=4, mask_token_id=mask_token_id)
    paths = {"teacher": str(tiny_checkpoint), "trajectories": str(rows), "output": str(folder / "unused")}
    return build(DistillSettings, BASE | paths)


@pytest.fixture(scope="module")
def undisturbed(nodes: Cluster, settings: DistillSettings, tmp_path_factory: pytest.TempPathFactory) -> Distillation:
    """The job, finished, to which nothing happened."""
    nodes.restore()
    with Distillation(nodes, settings, tmp_path_factory.mktemp("undisturbed")) as job:
        job.start()
        assert job.wait() == 0, job.printed
    assert [line["step"] for line in figures(job.output)] == list(range(1, STEPS + 1))
    assert job.repeated() == 0
    return job


@pytest.fixture
def job(cluster: Cluster, settings: DistillSettings, tmp_path: Path) -> Iterator[Distillation]:
    with Distillation(cluster, settings, tmp_path) as job:
        yield job


@pytest.fixture(scope="module")
def killed(
    nodes: Cluster, settings: DistillSettings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Distillation, Path]:
    """The job, killed in step 37 with its controller's node, and again as a whole with the checkpoint of step 60 half
    written; and a copy of the folder that the dead have left."""
    nodes.restore()
    with Distillation(nodes, settings, tmp_path_factory.mktemp("killed")) as job:
        kill_controllers_node(nodes, job)
        assert job.checkpoints() == ["step-000020"]
        nodes.restore()
        job.start_and_hold("save", 60)
        job.kill_all()
        assert f"resuming behind step 20 of {STEPS}" in job.printed
        assert job.checkpoints() == ["step-000020", "step-000040", "step-000060.partial"]
        assert job.repeated() == KILLED_AT - 20
    return job, shutil.copytree(job.folder, tmp_path_factory.mktemp("copy"), dirs_exist_ok=True)


def kill_controllers_node(cluster: Cluster, job: Distillation) -> None:
    """And the driver with it: Ray Train keeps its controller on the driver's node."""
    victim = cluster.workers[0]
    job.start_and_hold("step", KILLED_AT, f"--node={victim.folder}")
    assert any("TrainController" in " ".join(psutil.Process(pid).cmdline()) for pid in victim.pids())
    victim.kill()
    job.kill_driver()
    wait_until(lambda: not job.workers())  # Ray ends those on other nodes
    job.release()


@pytest.fixture
def dead(cluster: Cluster, killed: tuple[Distillation, Path], settings: DistillSettings) -> Iterator[Distillation]:
    """The twice killed job, as it was left."""
    killed_job, copy = killed
    shutil.rmtree(killed_job.folder)
    shutil.copytree(copy, killed_job.folder)
    with Distillation(cluster, settings, killed_job.folder) as job:
        job.seconds = killed_job.seconds
        yield job


def finish(job: Distillation, fault: str, kills: int, undisturbed: Distillation, folder: Path) -> None:
    """Check that the student is the undisturbed one, bit for bit, and report what the fault cost."""
    assert figures(job.output) == figures(undisturbed.output)
    weights = [(one.output / "model.safetensors").read_bytes() for one in (job, undisturbed)]
    assert weights[0] == weights[1]
    assert [path.name for path in job.output.parent.iterdir()] == [job.output.name]  # no work folder is left
    Figures(fault, kills, STEPS, job.repeated(), job.seconds, undisturbed.seconds).report(folder)


def test_killed_worker(job: Distillation, undisturbed: Distillation, tmp_path: Path) -> None:
    """The first one, which writes metrics and half of the checkpoints. The same command goes on."""
    job.start_and_hold("step", KILLED_AT)
    (first,) = (pid for pid, rank in job.workers().items() if rank == 0)
    os.kill(first, signal.SIGKILL)
    job.release()
    assert job.wait() == 0, job.printed
    assert job.repeated() == KILLED_AT - 20
    finish(job, "a worker killed", 1, undisturbed, tmp_path)


def test_killed_job(dead: Distillation, undisturbed: Distillation, tmp_path: Path) -> None:
    dead.start()
    assert dead.wait() == 0, dead.printed
    assert f"resuming behind step 40 of {STEPS}" in dead.printed
    finish(dead, "the driver's node, then the whole job killed", 2, undisturbed, tmp_path)


def test_truncated_checkpoint(dead: Distillation, undisturbed: Distillation, tmp_path: Path) -> None:
    shard = dead.work / CHECKPOINTS / "step-000040" / "shard-001-of-002.safetensors"
    size = shard.stat().st_size
    with shard.open("rb+") as file:
        file.truncate(size // 2)
    dead.start()
    assert dead.wait() == 0, dead.printed
    damage = f"{shard.name} has {size // 2:,} of {size:,} bytes"
    assert f"warning: checkpoint step-000040 is damaged ({damage}): using step-000020\n" in dead.printed
    assert f"resuming behind step 20 of {STEPS}" in dead.printed
    finish(dead, "and its newest checkpoint cut short", 2, undisturbed, tmp_path)


def test_fewer_workers(dead: Distillation, undisturbed: Distillation) -> None:
    dead.start(workers=1)
    assert dead.wait() == 0, dead.printed
    assert f"resuming behind step 40 of {STEPS}" in dead.printed
    found, wanted = figures(dead.output), figures(undisturbed.output)
    assert found[:40] == wanted[:40]
    for name in ("epoch", "window", "mask_ratio"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in wanted], rel=1e-5)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)


def test_loss_that_is_not_finite_ends_the_job(job: Distillation, settings: DistillSettings) -> None:
    """Of the second worker only, and without a retry: it would end alike."""
    shape, family = student_family(settings)
    plan = TrainingPlan(settings, load(settings, shape, family)[0], family)
    broken = 31
    ids = ", ".join(plan.micro_batch(plan.numbers(broken - 1, 1, 2)[0]).prompt_ids)
    job.start(f"--poison={broken - 1}")
    assert job.wait() == 2, job.printed
    assert job.said.startswith(f"d3llm-ray: loss: not finite at step {broken}, on the rows {ids}; "), job.printed
    assert "Traceback" not in job.printed
    assert sum(event.what == "start" for event in job.events()) == 2
    assert job.checkpoints() == ["step-000020"]
    assert [line["step"] for line in figures(job.work)] == list(range(1, broken))
