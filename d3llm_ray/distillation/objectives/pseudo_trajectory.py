"""d3LLM and dParallel: cross-entropy on a masked window, and certainty forcing where the student is already right.

arXiv:2601.07568, section 3 (pseudo-trajectory, noise and window curriculum); arXiv:2509.26488, section 3 (certainty
forcing on random masks of one block).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.distillation.objectives.base import (
    Batch,
    LossModule,
    Moment,
    Objective,
    masked_mean,
    parameter,
    token_terms,
)
from d3llm_ray.distillation.objectives.batches import TrainingSample, View
from d3llm_ray.distillation.objectives.corruption import (
    Draws,
    MaskOrder,
    RatioRounding,
    choose_views,
    corrupted,
    draw_window,
)
from d3llm_ray.distillation.objectives.curriculum import noise_floor, window_size
from d3llm_ray.errors import require
from d3llm_ray.models.families import Family

CertaintyViews = Literal["a", "both"]
WindowDomain = Literal["answer", "canvas"]


@dataclass(frozen=True)
class PseudoTrajectory(Objective):
    """One window of the answer, split between a masked view and its complement (left out at weight 0).

    The pseudo-trajectory is the order in which the teacher revealed its answer: view A masks what came last of it.
    """

    order: MaskOrder = parameter(
        "trajectory",
        "which positions of a window to mask: what the teacher revealed last; for comparison that order reversed, "
        "partly inverted, shuffled for every sample; or each at random (dParallel; rows need no order)",
    )
    inverted_pairs: float = parameter(0.2, "share of a window's pairs that order: inverted swaps", ge=0, le=1)
    ratio_rounding: RatioRounding = parameter("exact", "'published' reproduces the published masked counts")
    window_sizes: tuple[int, ...] = parameter(
        (8, 8, 12, 12, 16, 16), "tokens in a window at the start of each epoch", min_length=1
    )
    window_domain: WindowDomain = parameter(
        "answer",
        "what windows are drawn over: the answer with its stop token, the last window running on to the end of the "
        "canvas (d3LLM on LLaDA); or the whole canvas, padding included",
    )
    noise_start: float = parameter(0.0, "smallest mask ratio at the first step", ge=0, le=1)
    noise_end: float = parameter(0.8, "smallest mask ratio at the last step", ge=0, le=1)
    noise_max: float = parameter(0.8, "largest mask ratio", gt=0, le=1)
    ce_weight: float = parameter(0.25, "weight of the cross-entropy on the masked positions", ge=0)
    complement_weight: float = parameter(0.25, "weight of the complementary view; 0 leaves it out", ge=0)
    certainty_weight: float = parameter(
        1.0, "weight of certainty forcing: the entropy where the student is right", ge=0
    )
    certainty_views: CertaintyViews = parameter("a", "views whose certainty is forced: a (LLaDA) or both (Dream)")
    certainty_temperature: float = parameter(0.5, "temperature of that entropy", gt=0)

    name: ClassVar[str] = "windows"
    summary: ClassVar[str] = "d3LLM and dParallel, the default"
    figures: ClassVar[tuple[str, ...]] = ("ce", "complement", "certainty", "right")
    scheduled: ClassVar[tuple[str, ...]] = ("window", "noise_floor")

    def __post_init__(self) -> None:
        sizes = list(self.window_sizes)
        require(all(size > 0 for size in sizes), "window_sizes", sizes, "positive whole numbers")
        highest = max(self.noise_start, self.noise_end)
        require(highest <= self.noise_max, "noise_max", self.noise_max, "at least noise_start and noise_end")

    @property
    def needs_order(self) -> bool:
        return self.order != "random"

    @property
    def rows_per_sample(self) -> int:
        return 1 + (self.complement_weight > 0)

    def supervised(self, length: int) -> int:
        """A window, whichever view each of its tokens is in; the last one may be a short answer's whole canvas."""
        return length if self.window_domain == "answer" else max(self.window_sizes)

    def curriculum(self, moment: Moment | None) -> dict[str, float]:
        """Tokens in a window, which grows, and the smallest mask ratio, which rises."""
        if moment is None:
            return {"window": self.window_sizes[-1], "noise_floor": self.noise_end}
        return {
            "window": window_size(self.window_sizes, moment.epoch, moment.in_epoch, moment.steps_per_epoch),
            "noise_floor": noise_floor(self.noise_start, self.noise_end, moment.step, moment.steps),
        }

    def views(self, draws: Draws, sample: TrainingSample, moment: Moment | None, family: Family) -> list[View]:
        """View A, and view B unless its weight is 0."""
        assert family.mask_token_id is not None
        now = self.curriculum(moment)
        canvas = sample.response_ids.size
        drawn_over = sample.answer_length(family.stop_token_ids) if self.window_domain == "answer" else canvas
        window = draw_window(
            draws.epoch, drawn_over, int(now["window"]), now["noise_floor"], self.noise_max, canvas=canvas
        )
        split = choose_views(
            draws.epoch,
            sample.reveal_step,
            window,
            order=self.order,
            rounding=self.ratio_rounding,
            inverted_pairs=self.inverted_pairs,
            order_rng=draws.lasting,
        )
        views = []
        for chosen in (split.masked, split.complement) if self.complement_weight > 0 else (split.masked,):
            noisy = corrupted(sample.response_ids, chosen, family.mask_token_id, window.end)
            views.append(
                View(
                    token_ids=np.concatenate((sample.prompt_ids, noisy)),
                    rows=sample.prompt_ids.size + chosen - int(family.logit_shift),
                    labels=sample.response_ids[chosen],
                    weights=np.ones(chosen.size, dtype=np.float32),
                    mask_ratio=chosen.size / (window.end - window.start),
                )
            )
        return views

    def loss(self, module: LossModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted sum of cross-entropies and certainty forcing, see `combine`."""
        terms = partial(_terms, module, self.certainty_temperature)
        hidden = module.hidden(batch, batch.layout)
        ce, entropy, right = module.by_token(terms, hidden, batch.labels)
        return self.combine(ce, entropy, right, batch.second)

    def combine(self, ce: Tensor, entropy: Tensor, right: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss and its figures, both from per-token terms [N]; `second` [N] bool marks view B.

        Every term is a mean over its own tokens of the micro-batch. Certainty forcing is the entropy of tokens whose
        argmax is the label (arXiv:2509.26488, section 3). Figures: [4] float32 without gradient; the last, `right`,
        is the share of supervised tokens whose argmax is the label.
        """
        view_b = second.float()
        view_a = 1 - view_b
        ce_a, ce_b = masked_mean(ce, view_a), masked_mean(ce, view_b)
        certainty = masked_mean(entropy, view_a * right)
        if self.certainty_views == "both":
            certainty = certainty + masked_mean(entropy, view_b * right)
        loss = self.ce_weight * ce_a + self.complement_weight * ce_b + self.certainty_weight * certainty
        return loss, torch.stack((ce_a, ce_b, certainty, masked_mean(right, torch.ones_like(right)))).detach()


def _terms(module: LossModule, temperature: float, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return token_terms(module.logits(hidden), labels, temperature)
