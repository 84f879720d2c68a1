"""Settings of `d3llm-ray distill`; the recipes are YAML files in `recipes/`: `--config llada`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from d3llm_ray.config import DecoderSettings, Settings
from d3llm_ray.distillation.data import Keep, Target
from d3llm_ray.distillation.objective_settings import DEFAULT, ObjectiveSettings, objective_values, read_objective
from d3llm_ray.distillation.objectives import Objective
from d3llm_ray.distillation.objectives.curriculum import LearningRateSchedule
from d3llm_ray.distillation.training.engines import EngineOptions, Offload, Precision

SelectBy = Literal["loss", "accuracy", "accuracy-x-tpf"]


class DistillSettings(Settings):
    """Train a student on a teacher's trajectories. The defaults fit the embedded model on two CPU cores."""

    verb: ClassVar[str] = "distill"
    recipes: ClassVar[Path | None] = Path(__file__).with_name("recipes")
    renamed: ClassVar[dict[str, str]] = {
        "use_gpu": "device",
        "cpus_per_worker": "cpus_per_actor",
        "val_problems": "val_count",
        "block_size": "objective.block_size",
        "d2f_noise": "objective.noise",
        "entropy_weight": "objective.certainty_weight",
        "entropy_views": "objective.certainty_views",
        "entropy_temperature": "objective.certainty_temperature",
        **{name: f"objective.{name}" for name in ("order", "inverted_pairs", "ratio_rounding", "window_sizes")},
        **{name: f"objective.{name}" for name in ("noise_start", "noise_end", "noise_max")},
        **{name: f"objective.{name}" for name in ("ce_weight", "complement_weight")},
    }

    teacher: str = Field("tiny-llada", description="zoo name or checkpoint folder that the student starts from")
    trajectories: str = Field(description="Parquet dataset of the teacher's trajectories (any pyarrow.fs path)")
    output: str = Field(description="folder to write the student to; on a cluster, on storage that all nodes share")

    keep: Keep = Field("all", description="all rows, or only those whose answer is correct or could not be checked")
    target: Target = Field(
        "response",
        description="what is learnt: a row's own response and the stop token, the trajectory gives the order only "
        "(without one the teacher's answer, unless it is wrong); or the teacher's answer, wrong ones as well",
    )
    max_rows: int | None = Field(None, gt=0, description="train on at most so many rows")
    canvas: int | None = Field(
        None,
        gt=0,
        description="answers take so many positions: padded with the end-of-text token, or cut; null: the teacher's",
    )
    max_length: int | None = Field(None, gt=1, description="cut prompt and answer behind so many tokens; null: never")

    objective: ObjectiveSettings = Field(
        DEFAULT, description="what a student learns: a name, or a mapping of its name and its own parameters"
    )

    epochs: int = Field(6, gt=0, description="passes over the rows")
    max_steps: int | None = Field(None, gt=0, description="stop after so many optimizer steps, if earlier")

    lora_rank: int = Field(64, ge=0, description="rank of the LoRA adapters; 0 trains every weight")
    lora_alpha: int = Field(64, gt=0, description="LoRA scale: updates are multiplied by alpha / rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    lora_targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="projections with an adapter; null: all of the model's"
    )
    merge: bool = Field(True, description="write the student as a full checkpoint in the family's layout")
    save_adapter: bool = Field(False, description="write the peft adapter as well, in adapter/")

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_schedule: LearningRateSchedule = Field("cosine", description="constant, or cosine to zero")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps that warm the learning rate up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates of the two moments")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    batch_size: int = Field(32, gt=0, description="rows an optimizer step, over all workers")
    micro_batch_size: int = Field(8, gt=0, description="rows a forward of one worker")
    precision: Precision = Field(
        "float32",
        description="float32; mixed: bfloat16 products of float32 weights; bfloat16: bfloat16 weights as well",
    )
    zero_stage: int = Field(
        0,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO: split nothing, optimizer (1), gradients (2), weights (3) over the workers",
    )
    offload: Offload = Field(
        "none", description="to CPU memory: the optimizer's state (stage 1 to 3), or all, weights as well (stage 3)"
    )
    activation_checkpointing: bool = Field(False, description="recompute each layer in the backward pass")
    head_rows: int = Field(1024, gt=0, description="rows of logits held at a time")

    workers: int = Field(2, gt=0, description="Ray Train workers")
    device: str = Field(
        "cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu (gloo), or cuda (one GPU a worker, NCCL)"
    )
    cpus_per_actor: int = Field(1, gt=0, description="CPUs and, without a GPU, compute threads a worker")
    resource_timeout_s: float = Field(25.0, gt=0, description="how long to wait for the cluster to have room")
    checkpoint_every: int = Field(100, gt=0, description="optimizer steps between resumable checkpoints")
    keep_checkpoints: int = Field(2, ge=2, description="newest checkpoints to keep while training")
    max_failures: int = Field(3, ge=0, description="worker failures that are answered by resuming")
    log_every: int = Field(1, gt=0, description="optimizer steps between logged lines")

    val_every: int | None = Field(None, gt=0, description="optimizer steps between validations; null: none")
    val_rows: int = Field(128, ge=0, description="rows held out for the validation loss, when there are validations")
    val_task: str | None = Field(None, description="decode this task's validation problems as well; null: loss only")
    val_count: int = Field(64, gt=0, description="problems to decode in each validation")
    val_decoder: str = Field("d3llm-nocache", description="preset or settings file that decodes them")
    val_decoder_settings: DecoderSettings = Field({}, description="decoder settings that replace its own")
    val_max_tokens: int = Field(64, gt=0, description="canvas of the decoded answers in tokens")
    select_by: SelectBy = Field(
        "loss", description="best student: smallest validation loss, or largest accuracy, or accuracy x TPF"
    )
    export: Literal["last", "best"] = Field("last", description="which student the output folder holds at its top")

    seed: int = Field(0, ge=0, description="seed of order, windows, ratios and adapters")

    @field_validator("objective", mode="plain")
    @classmethod
    def _objective(cls, value: Any) -> Objective:
        return read_objective(value)

    @field_serializer("objective")
    def _objective_values(self, objective: Objective) -> dict[str, Any]:
        return objective_values(objective)

    @model_validator(mode="after")
    def _consistent(self) -> DistillSettings:
        step_rows = self.workers * self.micro_batch_size
        if self.batch_size % step_rows:
            raise ValueError(
                f"batch_size: got {self.batch_size}; accepted: a multiple of workers x micro_batch_size = {step_rows}"
            )
        if "://" in self.output:
            raise ValueError(f"output: got {self.output!r}; accepted: a folder, on a file system that all nodes mount")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {list(self.betas)}; accepted: two numbers in [0, 1)")
        if not (self.merge or self.save_adapter):
            raise ValueError("merge: got false without save_adapter; accepted: at least one of them true")
        if self.lora_rank == 0 and (self.save_adapter or not self.merge):
            raise ValueError("lora_rank: got 0 (every weight is trained); accepted: merge: true, save_adapter: false")
        if self.lora_rank == 0 and self.objective.needs_adapter:
            raise ValueError(
                f"lora_rank: got 0; accepted: at least 1 with objective: {self.objective.name} (the student without "
                "its adapter is the teacher)"
            )
        if (self.offload == "optimizer" and self.zero_stage == 0) or (self.offload == "all" and self.zero_stage < 3):
            raise ValueError(
                f"zero_stage: got {self.zero_stage} with offload: {self.offload}; accepted: 1 to 3 to offload the "
                "optimizer, 3 to offload all"
            )
        if self.val_every is None and self.export == "best":
            raise ValueError("export: got 'best' without val_every; accepted: a number of steps there, or 'last'")
        if self.val_every is not None and not (self.val_rows or self.val_task):
            raise ValueError("val_rows: got 0 without val_task; accepted: a positive number, or a task to decode")
        needed = self.val_rows > 0 if self.select_by == "loss" else self.val_task is not None
        if self.val_every is not None and not needed:
            raise ValueError(f"select_by: got {self.select_by!r}; accepted: loss with val_rows, others with val_task")
        return self

    @property
    def gpu(self) -> bool:
        """Whether workers train on GPUs."""
        return self.device != "cpu"

    @property
    def accumulation(self) -> int:
        """Forwards of each worker in one optimizer step."""
        return self.batch_size // (self.workers * self.micro_batch_size)

    @property
    def held_out(self) -> int:
        """Rows that are validated on instead of being trained on."""
        return 0 if self.val_every is None else self.val_rows

    def engine_options(self) -> EngineOptions:
        """What the training engine is told."""
        return EngineOptions(
            weight_decay=self.weight_decay,
            betas=self.betas,
            clip=self.clip,
            micro_batch_size=self.micro_batch_size,
            accumulation=self.accumulation,
            zero_stage=self.zero_stage,
            offload=self.offload,
            bfloat16=self.precision == "bfloat16",
        )
