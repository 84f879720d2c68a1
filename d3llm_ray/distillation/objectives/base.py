"""What every objective shares: the batch on a device, the chunked LM head, and the module that an optimizer trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d3llm_ray.distillation.objectives.batches import MicroBatch, TrainingSample, View
from d3llm_ray.distillation.objectives.corruption import Draws
from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.families import Attention, Family
from d3llm_ray.models.ragged import Ragged


@dataclass(frozen=True)
class Moment:
    """The place of an optimizer step in its run; all numbers are 0-based."""

    epoch: int
    in_epoch: int  # steps of this epoch before it
    steps_per_epoch: int
    step: int
    steps: int  # of the whole run


def parameter(default: Any, description: str, **limits: float) -> Any:
    """A field of an objective as the settings show it; `limits` are pydantic's (`ge`, `gt`, `le`, `min_length`)."""
    return field(default=default, metadata={"description": description, **limits})


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its device. `layout` is the student's attention; see `MicroBatch` for the shapes."""

    micro: MicroBatch
    token_ids: Tensor  # [T] int64
    layout: Ragged
    rows: Tensor  # [N] int64
    labels: Tensor  # [N] int64
    weights: Tensor  # [N] float32
    second: Tensor  # [N] bool


class Objective(Protocol):
    """One way to distil: corruption of a sample, attention among its tokens, loss. Stateless.

    A class states the facts that settings, student and memory plan ask for, and is a frozen dataclass of its
    parameters (see `parameter`), which raises `InputError` for values that do not go together. What is not stated is
    as for a masked-diffusion model with full attention whose row shows each token once.
    """

    name: ClassVar[str]  # in settings
    summary: ClassVar[str]  # for the command line's help
    figures: ClassVar[tuple[str, ...]]  # what `loss` reports beside the loss itself, each a mean over a micro-batch
    scheduled: ClassVar[tuple[str, ...]] = ()  # the names of `curriculum`'s figures
    teacher_attention: ClassVar[tuple[Attention, ...]] = ("full",)  # kinds of teacher that a student can start from
    needs_adapter: ClassVar[bool] = False  # the loss reads the student without its adapter as well

    @property
    def needs_order(self) -> bool:
        """Whether the rows must say in which order the teacher revealed their tokens."""
        return False

    @property
    def rows_per_sample(self) -> int:
        """Rows of a sample's length that its views come to, at most, in one forward."""
        return 1

    def supervised(self, length: int) -> int:
        """The most tokens that a sample of `length` tokens, prompt and canvas, is graded on, in all its views."""
        return length

    def student(
        self, shape: ModelConfig, family: Family, mask_token_id: Callable[[], int]
    ) -> tuple[ModelConfig, Family]:
        """Shape and conventions of the student of such a teacher; `mask_token_id()` finds one where it has none."""
        return shape, family

    def curriculum(self, moment: Moment | None) -> dict[str, float]:
        """What changes with the steps, by the names in `scheduled`; None: at its end."""
        return {}

    def views(self, draws: Draws, sample: TrainingSample, moment: Moment | None, family: Family) -> list[View]:
        """The sample's input rows (as many for every sample), from its own random draws."""
        ...

    def layout(self, micro: MicroBatch, device: torch.device) -> Ragged:
        """Who sees whom in the student's forward: full attention, every token of a view sees all of it."""
        return Ragged.build(micro.lengths.tolist(), device=device)

    def loss(self, module: LossModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and `figures` as a float32 tensor without gradient."""
        ...


class LossModule(nn.Module):
    """A transformer with an objective on top: `forward(batch) -> (loss, figures)`.

    `model` is a `Transformer` or its peft wrapper. At most `head_rows` rows of logits exist at a time: with a
    vocabulary of 126,464 a thousand float32 rows take half a gigabyte, and a loss needs several of them.
    `autocast` computes in bfloat16 over float32 weights.
    """

    def __init__(self, model: nn.Module, objective: Objective, *, head_rows: int, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.head_rows = head_rows
        self.autocast = autocast

    def batch(self, micro: MicroBatch, device: torch.device) -> Batch:
        """Put a micro-batch on the device, laid out for the objective."""

        def put(array: NDArray[Any], dtype: type[np.generic]) -> Tensor:
            # A copy: arrays that come from Ray's object store cannot be written to, which torch warns about.
            return torch.from_numpy(array.astype(dtype, copy=True)).to(device)

        return Batch(
            micro=micro,
            token_ids=put(micro.token_ids, np.int64),
            layout=self.objective.layout(micro, device),
            rows=put(micro.rows, np.int64),
            labels=put(micro.labels, np.int64),
            weights=put(micro.weights, np.float32),
            second=put(micro.second, np.bool_),
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(batch.token_ids.device.type, torch.bfloat16, enabled=self.autocast):
            return self.objective.loss(self, batch)

    def hidden(self, batch: Batch, layout: Ragged) -> Tensor:
        """Final hidden states of the supervised rows, [N, hidden_size]."""
        states: Tensor = self.model(batch.token_ids, layout)
        return states[batch.rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head in float32, [rows, vocabulary]."""
        # peft's wrapper passes names that it does not know through to the transformer
        logits: Tensor = self.model.logits(hidden).float()  # type: ignore[operator]
        return logits

    def by_token(self, function: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
        """`function(*chunk) -> per-token terms`, over chunks of `head_rows` rows, concatenated.

        A chunk's logits are computed again in the backward pass, so that they do not outlive it.
        """
        if len(rows[0]) <= self.head_rows:
            return function(*rows)
        chunks = zip(*(torch.split(part, self.head_rows) for part in rows), strict=True)
        terms = [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]
        return tuple(torch.cat(parts) for parts in zip(*terms, strict=True))


def token_terms(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: cross-entropy, entropy of softmax(logits / temperature) in nats, and whether argmax is the label.

    `logits` [N, vocab] float32, `labels` [N]; returns three [N] float32 tensors, the last of 0 and 1.
    """
    ce = F.cross_entropy(logits, labels, reduction="none")
    log_p = F.log_softmax(logits / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return ce, entropy, is_right(logits, labels)


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where argmax is the label, otherwise 0: [N] float32 without gradient."""
    return (logits.argmax(-1) == labels).float()


def masked_mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of `values` where `chosen` is 1, and a 0 that keeps its graph where nothing is chosen."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)
