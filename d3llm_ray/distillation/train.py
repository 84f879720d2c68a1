"""The Ray Train worker: DeepSpeed steps over a plan's batches, with resumable checkpoints.

Everything random is a function of (seed, epoch, prompt_id) or (seed, step, rank), so that a resumed run, on the
same number of workers, repeats an uninterrupted one. Every function here runs on each worker; rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from d3llm_ray.config import build
from d3llm_ray.distillation.data import load_samples
from d3llm_ray.distillation.lora import add_lora, merge_lora, save_adapter
from d3llm_ray.distillation.metrics_file import MetricsFile
from d3llm_ray.distillation.objective import FIGURES, DistillationLoss
from d3llm_ray.distillation.plan import Plan
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.models import Transformer, copy_tokenizer, load_model, save_model

CHECKPOINT_TAG = "deepspeed"
LOGGED = (*FIGURES, "mask_ratio")


def train_worker(config: dict[str, Any]) -> None:
    """Train from the newest checkpoint, if any, to the end, and write the student.

    `config`: `settings` (values of `DistillSettings`), `metrics` (path of the JSON-lines file) and `student` (folder
    to create).
    """
    settings = build(DistillSettings, config["settings"])
    torch.manual_seed(settings.seed)
    if not settings.use_gpu:
        torch.set_num_threads(settings.cpus_per_worker)
        # Would compile a C++ kernel for a minute at first use; gloo does the same reductions.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    worker = Worker(settings)
    worker.train(Path(config["metrics"]))
    if worker.rank == 0:
        worker.write_student(Path(config["student"]))
    dist.barrier()


class Worker:
    """One rank's model, optimizer and place in the run."""

    def __init__(self, settings: DistillSettings) -> None:
        self.settings = settings
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.plan = Plan(settings, load_samples(settings.trajectories, keep=settings.keep, max_rows=settings.max_rows))
        dtype = "bfloat16" if settings.precision == "bfloat16" else "float32"
        transformer, self.family = load_model(settings.teacher, dtype, self.device)
        self.model = trainable(transformer, settings)
        loss = DistillationLoss(
            self.model, settings.loss_weights, head_rows=settings.head_rows, autocast=settings.precision == "mixed"
        )
        trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        # torch's AdamW: DeepSpeed would compile its own at first use.
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=loss, model_parameters=trained, optimizer=optimizer, config=settings.deepspeed()
        )

    def train(self, metrics: Path) -> None:
        """Take the steps that are left, reporting a checkpoint every `checkpoint_every`."""
        settings, last = self.settings, self.plan.max_steps
        done = self._restore()
        started = time.perf_counter()
        with MetricsFile(metrics, done) if self.rank == 0 else contextlib.nullcontext() as log:
            for step in range(done, last):
                figures = self._step(step)
                finished = step + 1
                if finished % settings.log_every == 0 or finished == last:
                    line = self._mean_over_workers(figures)
                    if log is not None:
                        rate = (finished - done) * settings.batch_size / (time.perf_counter() - started)
                        scheduled = dataclasses.asdict(self.plan.at(step))
                        log.write({"step": finished, **scheduled, **line, "samples_per_second": rate})
                if finished % settings.checkpoint_every == 0 and finished < last:
                    self._save(finished)

    def _step(self, step: int) -> Tensor:
        """One optimizer step; returns this worker's mean figures, named by `LOGGED`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.at(step).lr
        torch.manual_seed(self.settings.seed + step * self.world_size + self.rank)  # LoRA dropout, also after a resume
        figures = []
        for batch in self.plan.micro_batches(step, self.rank, self.world_size, self.family, self.device):
            with attention_kernel(self.device):
                loss, parts = self.engine(batch)
                self.engine.backward(loss)
            self.engine.step()
            figures.append(torch.cat((parts, parts.new_tensor([batch.mask_ratio]))))
        return torch.stack(figures).mean(0)

    def _mean_over_workers(self, figures: Tensor) -> dict[str, float]:
        dist.all_reduce(figures)
        return dict(zip(LOGGED, (figures / self.world_size).tolist(), strict=True))

    def _restore(self) -> int:
        """Load the run's newest checkpoint; returns the optimizer steps already taken."""
        newest = ray.train.get_checkpoint()
        if newest is None:
            return 0
        with newest.as_directory() as directory:
            # Frozen weights are not in the checkpoint: they are the teacher's.
            _, state = self.engine.load_checkpoint(
                directory, tag=CHECKPOINT_TAG, load_module_strict=self.settings.lora_rank == 0
            )
        return int(state["step"])

    def _save(self, step: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.engine.save_checkpoint(
                directory,
                tag=CHECKPOINT_TAG,
                client_state={"step": step},
                exclude_frozen_parameters=self.settings.lora_rank > 0,
            )
            dist.barrier()
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(directory),
                checkpoint_dir_name=f"step-{step:06d}",
            )

    def write_student(self, directory: Path) -> None:
        """Write the checkpoint in the family's layout, the peft adapter, or both, as the settings say."""
        directory.mkdir(parents=True, exist_ok=True)
        model: Transformer | PeftModel = self.model
        if isinstance(model, PeftModel):
            if self.settings.save_adapter:
                save_adapter(model, directory / "adapter")
            if not self.settings.merge:
                return
            model = merge_lora(model)
        for parameter in model.parameters():
            # ZeRO keeps trained weights as views of one flat buffer, which safetensors refuses to write.
            parameter.data = parameter.data.clone()
        save_model(model, self.family, directory)
        copy_tokenizer(self.settings.teacher, directory)


def trainable(model: Transformer, settings: DistillSettings) -> Transformer | PeftModel:
    """Prepare a loaded teacher for training: adapters or all weights, and recomputed activations on request."""
    if settings.activation_checkpointing:
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    model.train()
    if settings.lora_rank == 0:
        return model
    return add_lora(
        model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=settings.lora_targets,
    )


def attention_kernel(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Plain attention on a CPU: the fused kernel's backward pass in bfloat16 is three times slower there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
