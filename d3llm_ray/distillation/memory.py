"""How much memory a worker will need, told before the first step from the shape and the settings alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d3llm_ray.distillation.training.engines import Offload, Precision
from d3llm_ray.models import ModelConfig

if TYPE_CHECKING:
    from d3llm_ray.distillation.settings import DistillSettings

FLOAT32, BFLOAT16 = 4, 2  # bytes
LOGIT_COPIES = 6  # of a chunk of float32 logits: themselves, log-probabilities, probabilities, and their gradients
_GIB = 2.0**30


@dataclass(frozen=True)
class TrainingMemoryPlan:
    """Bytes of one worker by purpose; `on_host` is what is kept in CPU memory instead of on the device."""

    workers: int
    zero_stage: int
    precision: str
    parameters: int  # numbers of the whole model, without adapters
    trained: int  # numbers of the adapters, or of the whole model
    tokens: int  # of a forward
    logit_rows: int  # at a time
    recomputed: bool  # activations, in the backward pass

    weights: int
    copies: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    activations_otherwise: int  # with checkpointing where there is none, without it where there is
    logits: int
    on_host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        held = self.weights + self.copies + self.adapters + self.gradients + self.optimizer
        return held + self.activations + self.logits

    def __str__(self) -> str:
        """The plan in words, a line for each purpose that takes memory."""
        copied = "bfloat16 casts of the weights" if self.precision == "mixed" else "weights gathered for a layer"
        other = "without" if self.recomputed else "with"
        parts = {
            "weights": (self.weights, f"{self.parameters / 1e6:.1f} M parameters"),
            "copies": (self.copies, copied),
            "adapters": (self.adapters, f"{self.trained / 1e6:.1f} M parameters"),
            "gradients": (self.gradients, f"of {self.trained / 1e6:.1f} M trained parameters"),
            "optimizer": (self.optimizer, "AdamW's moments and float32 master weights"),
            "activations": (
                self.activations,
                f"at most {self.tokens} tokens a forward; {self.activations_otherwise / _GIB:.3f} GiB {other} "
                "activation checkpointing",
            ),
            "LM head": (self.logits, f"{self.logit_rows} rows of logits at a time"),
            "total": (self.total, "without the allocator's slack and communication buckets"),
            "in CPU memory": (self.on_host, "offloaded"),
        }
        lines = [f"memory plan of each of {self.workers} workers (ZeRO {self.zero_stage}, {self.precision}):"]
        lines += [f"  {name:<13} {size / _GIB:8.3f} GiB: {what}" for name, (size, what) in parts.items() if size]
        return "\n".join(lines)


def plan_memory(
    config: ModelConfig,
    *,
    rank: int,
    targets: Collection[str] | None,
    precision: Precision,
    zero_stage: int,
    workers: int,
    offload: Offload,
    micro_batch_size: int,
    longest_row: int,
    rows_per_sample: int,
    supervised_rows: int,
    head_rows: int,
    activation_checkpointing: bool,
) -> TrainingMemoryPlan:
    """Add up one worker's memory at its peak, where a backward pass begins.

    `rank` and `targets` are the adapters', on every projection where None; rank 0 trains every weight. A forward is
    of `micro_batch_size` samples of `rows_per_sample` rows, each of at most `longest_row` tokens, and supervises at
    most `supervised_rows` of them; `head_rows` of logits exist at a time.

    Weights, gradients and the optimizer's state are split over the workers from stage 3, 2 and 1 on (ZeRO,
    arXiv:1910.02054, section 5); `offload` moves the optimizer's state with the gradients, or all three, to the CPU
    (ZeRO-Offload, arXiv:2101.06840). AdamW keeps two float32 moments, and float32 master weights under ZeRO or where
    weights are bfloat16.

    Activations are what the backward pass of this package's layers reads, counted in `_saved_by_layer`, and the
    gradients of one layer's; with checkpointing a layer keeps its input only, and one layer at a time has the rest
    (arXiv:1604.06174). Attention scores are not among them: a fused attention keeps none.
    """
    half = precision == "bfloat16"
    width = BFLOAT16 if half else FLOAT32  # bytes of a weight, and of the residual stream
    sizes = config.projections
    of_layer, head, parameters = config.layer_parameters, config.head_parameters, config.parameters
    if targets is None or not rank:
        targets = tuple(sizes)
    trained = rank * config.num_layers * sum(sum(sizes[name]) for name in targets) if rank else parameters

    def share(first_stage: int) -> int:
        return workers if zero_stage >= first_stage else 1

    weights = width * parameters // share(3)
    adapters = width * trained // share(3) if rank else 0
    gradients = width * trained // share(2)
    masters = half or zero_stage > 0
    optimizer = FLOAT32 * (2 + masters) * trained // share(1)
    on_host = 0
    if offload != "none":
        # Gradients wait for the offloaded step in float32, as the master weights that they change.
        on_host = optimizer + FLOAT32 * trained // share(1)
        optimizer = 0
        gradients = 0 if zero_stage >= 2 else gradients
    if offload == "all":
        on_host += weights + adapters
        weights = adapters = 0

    copies = 0
    if precision == "mixed":
        # Autocast caches its casts of trained weights; those of frozen ones live as long as their layer's activations.
        all_layers = not (rank and activation_checkpointing)
        copies = BFLOAT16 * (config.num_layers * of_layer + head if all_layers else max(of_layer, head))
    elif zero_stage == 3:
        copies = width * max(of_layer, head)

    tokens = micro_batch_size * rows_per_sample * longest_row
    by_layer = _saved_by_layer(config, rank, targets, precision)
    kept = tokens * (config.num_layers + 1) * by_layer
    recomputed = tokens * (config.num_layers * width * config.hidden_size + 2 * by_layer)
    logit_rows = min(head_rows, supervised_rows)
    return TrainingMemoryPlan(
        workers=workers,
        zero_stage=zero_stage,
        precision=precision,
        parameters=parameters,
        trained=trained,
        tokens=tokens,
        logit_rows=logit_rows,
        recomputed=activation_checkpointing,
        weights=weights,
        copies=copies,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        activations=recomputed if activation_checkpointing else kept,
        activations_otherwise=kept if activation_checkpointing else recomputed,
        logits=LOGIT_COPIES * FLOAT32 * logit_rows * config.vocab_size,
        on_host=on_host,
    )


def plan_of(settings: DistillSettings, config: ModelConfig, longest: int) -> TrainingMemoryPlan:
    """The plan of a run whose longest sample, prompt and canvas, has `longest` tokens."""
    return plan_memory(
        config,
        rank=settings.lora_rank,
        targets=settings.lora_targets,
        precision=settings.precision,
        zero_stage=settings.zero_stage,
        workers=settings.workers,
        offload=settings.offload,
        micro_batch_size=settings.micro_batch_size,
        longest_row=longest,
        rows_per_sample=settings.objective.rows_per_sample,
        supervised_rows=settings.micro_batch_size * settings.objective.supervised(longest),
        head_rows=settings.head_rows,
        activation_checkpointing=settings.activation_checkpointing,
    )


def _saved_by_layer(config: ModelConfig, rank: int, trained: Collection[str], precision: Precision) -> int:
    """Bytes that the backward pass of one layer reads, for each token.

    With h the hidden, k the key and m the MLP's size, in the compute type unless said otherwise: both norms' inputs
    in float32 (2 h; 2 h more where the norms' weights are trained), queries, keys, values and mixed values
    (2 h + 2 k), gate, its activation and the other factor (3 m), each input of a trained projection that is not yet
    among them, and r for each adapter. Autocast casts such an input anew for every projection.
    """
    h, k, m = config.hidden_size, config.kv_size, config.intermediate_size
    compute = FLOAT32 if precision == "float32" else BFLOAT16
    attention = [name for name in ("q_proj", "k_proj", "v_proj") if name in trained]
    mlp = [name for name in ("gate_proj", "up_proj") if name in trained]
    if precision == "mixed":
        inputs = len(attention) + len(mlp) + (rank > 0 and "o_proj" in trained)  # peft widens o_proj's first
    else:
        inputs = bool(attention) + bool(mlp)
    norms = 2 * h * FLOAT32
    if not rank:
        norms += 2 * h * (BFLOAT16 if precision == "bfloat16" else FLOAT32)
    products = 3 + ("down_proj" in trained)
    return norms + compute * (2 * h + 2 * k + products * m + inputs * h + rank * len(trained))
