"""The training engine for many workers: DeepSpeed, ZeRO stages 0 to 3, with torch's AdamW."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from d3llm_ray.distillation.training.engines import (
    AdamState,
    EngineOptions,
    TrainingEngine,
    adamw,
    clip_gradients,
    create_state,
    set_lr,
    set_state,
    set_updates,
    state_of,
    trained_parameters,
    updates_of,
)

BUCKET = 200_000_000  # elements that are reduced or gathered at a time


def deepspeed_engine(loss_module: nn.Module, options: EngineOptions) -> TrainingEngine:
    """Train with the other workers of `torch.distributed`'s default group, which the caller has initialised."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # ZeRO 3 calls collectives by names that torch has deprecated, each time with a warning.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if next(loss_module.parameters()).device.type == "cpu":
        # Would compile a C++ kernel for a minute at first use; gloo does the same reductions.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return ZeroEngine(loss_module, options)


class ZeroEngine:
    """See `TrainingEngine`."""

    def __init__(self, loss_module: nn.Module, options: EngineOptions) -> None:
        self.options = options
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.parameters = trained_parameters(loss_module)
        self.trained: Mapping[str, torch.Size] = {name: parameter.shape for name, parameter in self.parameters.items()}
        # In float32 without ZeRO, DeepSpeed clips but reports no norm.
        self.clips_itself = options.zero_stage == 0 and not options.bfloat16
        # DeepSpeed takes a step of its own here to create bfloat16's masters: harmless at a learning rate of 0.
        self.adamw = adamw(self.parameters, options)
        on_gpu = next(loss_module.parameters()).device.type == "cuda"
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=loss_module,
            model_parameters=list(self.parameters.values()),
            optimizer=self.adamw,
            config=_config(options, on_gpu=on_gpu, clip=0.0 if self.clips_itself else options.clip),
        )
        flat = self.optimizer.fp32_partitioned_groups_flat if options.zero_stage == 3 else self._held()
        create_state(self.adamw, flat)
        if options.zero_stage in (1, 2):
            # After its first step DeepSpeed would link each parameter with its part of the state.
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _held(self) -> list[Tensor]:
        """What AdamW updates: whole parameters at stage 0, at stages 1 and 2 this worker's share of them, flat."""
        return [master for group in self.adamw.param_groups for master in group["params"]]

    @property
    def updates(self) -> int:
        return updates_of(self.adamw)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        loss, figures = self.engine(batch)
        return loss, figures

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch

    def step(self, lr: float) -> float:
        assert self.engine.is_gradient_accumulation_boundary()
        set_lr(self.adamw, lr)
        if self.clips_itself:
            norm = clip_gradients(self.parameters.values(), self.options.clip)
            self.engine.step()
            return norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def whole(self) -> AbstractContextManager[None]:
        if self.options.zero_stage < 3:
            return nullcontext()
        # Without the module's hooks, too: those would give a weight back after its first use, and wait for all workers
        # to ask for it again.
        gathered: AbstractContextManager[None] = deepspeed.zero.unwrap_model_for_generation(self.engine)
        return gathered

    def collect(self, names: Collection[str]) -> dict[str, AdamState]:
        if self.options.zero_stage == 0:
            masters = dict(zip(self.parameters, self._held(), strict=True))
            return {name: state_of(self.adamw, masters[name]) for name in names}
        states = {}
        for name, parameter in self.parameters.items():  # every worker takes part in every parameter
            value = safe_get_full_fp32_param(parameter)
            moments = [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
            if name in names:
                states[name] = AdamState(*(tensor.cpu() for tensor in (value, *moments)))
        return states

    def restore(self, load: Callable[[str], AdamState], updates: int) -> None:
        masters = self._held()
        for index, (name, parameter) in enumerate(self.parameters.items()):
            state = load(name)
            if self.options.zero_stage == 0:
                set_state(self.adamw, masters[index], state)
            elif self.options.zero_stage == 3:
                self._restore_partition(parameter, state)
            else:
                safe_set_full_fp32_param(parameter, state.value)
                safe_set_full_optimizer_state(parameter, state.exp_avg, "exp_avg")
                safe_set_full_optimizer_state(parameter, state.exp_avg_sq, "exp_avg_sq")
            # The masters are copies, of which the weights are refreshed by the next step only.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(state.value)
        set_updates(self.adamw, updates)

    def _restore_partition(self, parameter: nn.Parameter, state: AdamState) -> None:
        """Set this worker's part of a parameter: DeepSpeed's setters of whole ones fail where parts are padded."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's

        def part(tensor: Tensor) -> Tensor:
            padded = F.pad(tensor.flatten(), (0, size * self.world_size - tensor.numel()))
            return padded[size * self.rank : size * (self.rank + 1)]

        safe_set_local_fp32_param(parameter, part(state.value))
        safe_set_local_optimizer_state(parameter, part(state.exp_avg), "exp_avg")
        safe_set_local_optimizer_state(parameter, part(state.exp_avg_sq), "exp_avg_sq")


def _config(options: EngineOptions, *, on_gpu: bool, clip: float) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    on_host = {"device": "cpu", "pin_memory": on_gpu}
    if options.offload != "none":
        zero["offload_optimizer"] = on_host
    if options.offload == "all":
        zero["offload_param"] = on_host
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW would be compiled at first use
        "bf16": {"enabled": options.bfloat16},
        "steps_per_print": 1_000_000_000,
    }
