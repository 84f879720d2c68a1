"""Settings of `d3llm-ray distill`; the published recipes are YAML files in `recipes/`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from d3llm_ray.config import Settings
from d3llm_ray.distillation.corruption import MaskOrder, RatioRounding
from d3llm_ray.distillation.curriculum import LearningRateSchedule
from d3llm_ray.distillation.data import Keep
from d3llm_ray.distillation.objective import EntropyViews, LossWeights

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)  # every linear layer of every family but the LM head
Precision = Literal["float32", "mixed", "bfloat16"]


class DistillSettings(Settings):
    """Train a student on a teacher's trajectories. The defaults fit the embedded model on two CPU cores."""

    verb: ClassVar[str] = "distill"

    teacher: str = Field("tiny-llada", description="zoo name or checkpoint folder that the student starts from")
    trajectories: str = Field(description="Parquet dataset of the teacher's trajectories (any pyarrow.fs path)")
    output: str = Field(description="folder to write the student to; on a cluster, on storage that all nodes share")

    keep: Keep = Field("all", description="all rows, or only those whose answer is correct or could not be checked")
    max_rows: int | None = Field(None, gt=0, description="train on at most so many rows")
    order: MaskOrder = Field("trajectory", description="mask what the teacher revealed last, or at random (baseline)")
    ratio_rounding: RatioRounding = Field("exact", description="'published' reproduces the published masked counts")

    epochs: int = Field(6, gt=0, description="passes over the rows")
    max_steps: int | None = Field(None, gt=0, description="stop after so many optimizer steps, if earlier")
    window_sizes: tuple[int, ...] = Field(
        (16, 16, 24, 24, 32, 32), min_length=1, description="tokens in a window at the start of each epoch"
    )
    noise_start: float = Field(0.0, ge=0, le=1, description="smallest mask ratio at the first step")
    noise_end: float = Field(0.8, ge=0, le=1, description="smallest mask ratio at the last step")
    noise_max: float = Field(0.8, gt=0, le=1, description="largest mask ratio")

    ce_weight: float = Field(0.25, ge=0, description="weight of the cross-entropy on the masked positions")
    complement_weight: float = Field(0.25, ge=0, description="weight of the complementary view; 0 leaves it out")
    entropy_weight: float = Field(0.5, ge=0, description="weight of the entropy where the student is right")
    entropy_views: EntropyViews = Field("a", description="views whose entropy counts: a (LLaDA) or both (Dream)")
    entropy_temperature: float = Field(0.5, gt=0, description="temperature of the entropy term")

    lora_rank: int = Field(64, ge=0, description="rank of the LoRA adapters; 0 trains every weight")
    lora_alpha: int = Field(64, gt=0, description="LoRA scale: updates are multiplied by alpha / rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    lora_targets: tuple[Projection, ...] = Field(PROJECTIONS, min_length=1, description="projections with an adapter")
    merge: bool = Field(True, description="write the student as a full checkpoint in the family's layout")
    save_adapter: bool = Field(False, description="write the peft adapter as well, in adapter/")

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_schedule: LearningRateSchedule = Field("cosine", description="constant, or cosine to zero")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps that warm the learning rate up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    batch_size: int = Field(32, gt=0, description="rows an optimizer step, over all workers")
    micro_batch_size: int = Field(8, gt=0, description="rows a forward of one worker")
    precision: Precision = Field(
        "mixed", description="float32; mixed: bfloat16 compute over float32 weights; bfloat16: bfloat16 weights as well"
    )
    zero_stage: Literal[0, 1, 2] = Field(2, description="DeepSpeed ZeRO stage")
    activation_checkpointing: bool = Field(False, description="recompute each layer in the backward pass")
    head_rows: int = Field(1024, gt=0, description="rows of logits held at a time")

    workers: int = Field(2, gt=0, description="Ray Train workers")
    use_gpu: bool = Field(False, description="one GPU a worker (NCCL); otherwise CPU (gloo)")
    cpus_per_worker: int = Field(1, gt=0, description="CPUs and, without a GPU, compute threads a worker")
    checkpoint_every: int = Field(100, gt=0, description="optimizer steps between resumable checkpoints")
    max_failures: int = Field(3, ge=0, description="worker failures that are answered by resuming")
    log_every: int = Field(1, gt=0, description="optimizer steps between lines of metrics.jsonl")
    seed: int = Field(0, ge=0, description="seed of order, windows, ratios and adapters")

    @model_validator(mode="after")
    def _consistent(self) -> DistillSettings:
        step_rows = self.workers * self.micro_batch_size
        if self.batch_size % step_rows:
            raise ValueError(
                f"batch_size: got {self.batch_size}; accepted: a multiple of workers x micro_batch_size = {step_rows}"
            )
        if any(size <= 0 for size in self.window_sizes):
            raise ValueError(f"window_sizes: got {list(self.window_sizes)}; accepted: positive whole numbers")
        if max(self.noise_start, self.noise_end) > self.noise_max:
            raise ValueError(f"noise_max: got {self.noise_max}; accepted: at least noise_start and noise_end")
        if not (self.merge or self.save_adapter):
            raise ValueError("merge: got false without save_adapter; accepted: at least one of them true")
        if self.lora_rank == 0 and (self.save_adapter or not self.merge):
            raise ValueError("lora_rank: got 0 (every weight is trained); accepted: merge: true, save_adapter: false")
        return self

    @property
    def accumulation(self) -> int:
        """Forwards of each worker in one optimizer step."""
        return self.batch_size // (self.workers * self.micro_batch_size)

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(
            self.ce_weight, self.complement_weight, self.entropy_weight, self.entropy_views, self.entropy_temperature
        )

    def deepspeed(self) -> dict[str, Any]:
        """The DeepSpeed configuration of these settings; the optimizer is torch's and is passed separately."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "zero_optimization": {
                "stage": self.zero_stage,
                "contiguous_gradients": True,
                "overlap_comm": self.use_gpu,
                "reduce_bucket_size": 200_000_000,
                "allgather_bucket_size": 200_000_000,
            },
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.precision == "bfloat16"},
            "steps_per_print": 1_000_000_000,
        }
