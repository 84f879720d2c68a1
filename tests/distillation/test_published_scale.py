"""Loss and gradient of a whole optimizer step against the published trainers, restated family by family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from d3llm_ray.config import build, read_yaml, recipe_file
from d3llm_ray.distillation.objectives import PseudoTrajectory
from d3llm_ray.distillation.objectives.base import token_terms
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.training.engines import torch_engine

ROWS, VOCABULARY = 6, 5  # supervised tokens of a micro-batch: four of view A, two of view B
VIEW_B = torch.tensor([False, False, False, False, True, True])
Terms = tuple[Tensor, Tensor, Tensor, Tensor]


def published_terms(logits: Tensor, labels: Tensor) -> Terms:
    """CE of views A and B, entropy at temperature 1/2 where the argmax is the label of views A and B: means."""
    probabilities, cold = logits.softmax(-1), (logits / 0.5).softmax(-1)
    ce = -probabilities[torch.arange(ROWS), labels].log()
    entropy, right = -(cold * (cold + 1e-12).log()).sum(-1), logits.argmax(-1) == labels
    return ce[~VIEW_B].mean(), ce[VIEW_B].mean(), entropy[right & ~VIEW_B].mean(), entropy[right & VIEW_B].mean()


# (loss of a micro-batch, what the trainer divides it by before its backward pass), as published. LLaDA's trainer
# divides by the forwards of a step, on top of the literal 4; Dream's, which Dream-Coder shares, does not.
PUBLISHED: dict[str, tuple[Callable[[Terms], Tensor], int]] = {
    "llada": (lambda t: (t[0] + t[1] + 2.0 * t[2]) / 4, 4),
    "dream": (lambda t: (t[0] + t[1] + 1.0 * (t[2] + t[3])) / 4, 1),
    "dream-coder": (lambda t: (t[0] + t[2]) / 4, 1),
    "dparallel": (lambda t: t[0] + t[1] + 2.0 * (t[2] + t[3]), 8),
}


class Logits(torch.nn.Module):
    """Logits that are trained themselves, under a recipe's objective."""

    def __init__(self, start: Tensor, objective: PseudoTrajectory) -> None:
        super().__init__()
        self.logits, self.objective = torch.nn.Parameter(start.clone()), objective

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        terms = token_terms(self.logits, labels, self.objective.certainty_temperature)
        return self.objective.combine(*terms, VIEW_B)


@pytest.mark.parametrize("name", PUBLISHED)
def test_loss_and_gradient_before_clipping_are_the_published_ones(name: str) -> None:
    formula, divided_by = PUBLISHED[name]
    recipe = read_yaml(recipe_file(name, DistillSettings, "config"))
    settings = build(DistillSettings, {**recipe, "trajectories": "rows", "output": "out"})
    options = settings.engine_options()
    assert isinstance(settings.objective, PseudoTrajectory)
    assert settings.clip == 1.0 and options.accumulation == (8 if name == "dparallel" else 4)  # published

    draw = torch.Generator().manual_seed(1)
    start = torch.randn(ROWS, VOCABULARY, generator=draw)
    best = start.argmax(-1)
    # Some predictions of either view are right, some wrong, others in each micro-batch.
    batches = [torch.where(torch.arange(ROWS) % 3 == n % 3, (best + 1) % VOCABULARY, best) for n in range(8)]
    batches = batches[: options.accumulation]

    theirs = start.clone().requires_grad_()
    shown = 0.0
    for labels in batches:
        loss = formula(published_terms(theirs, labels)) / divided_by
        loss.backward()
        shown += loss.item()
    assert theirs.grad is not None

    options = dataclasses.replace(options, clip=1e9, bfloat16=False, zero_stage=0, betas=(0.9, 0.999))
    module = Logits(start, settings.objective)
    engine = torch_engine(module, options)
    values = []
    for labels in batches:
        loss, _ = engine.forward(labels)
        engine.backward(loss)
        values.append(loss.item())
    assert engine.step(0.0) == pytest.approx(theirs.grad.norm().item(), rel=1e-5)
    assert sum(values) / len(values) == pytest.approx(shown, rel=1e-5)
    # AdamW's first moment after one step is a tenth of the gradient.
    torch.testing.assert_close(engine.collect(["logits"])["logits"].exp_avg, 0.1 * theirs.grad)
