from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch

from d3llm_ray.distillation.objectives import Batch, LossModule, PseudoTrajectory
from d3llm_ray.distillation.objectives.base import token_terms
from d3llm_ray.distillation.objectives.batches import TrainingSample, pack
from d3llm_ray.distillation.objectives.corruption import TrainingWindow, choose_views, draws
from d3llm_ray.models import Family, Ragged, Transformer
from tests.distillation.toys import toy

WEIGHTS = {"ce_weight": 0.25, "complement_weight": 0.25, "certainty_temperature": 0.5, "noise_max": 1.0}
LLADA = PseudoTrajectory(certainty_weight=0.5, certainty_views="a", **WEIGHTS)
DREAM = PseudoTrajectory(certainty_weight=0.25, certainty_views="both", **WEIGHTS)
CODER = PseudoTrajectory(certainty_weight=0.25, certainty_views="a", **{**WEIGHTS, "complement_weight": 0.0})

# Two samples of eight tokens. Row n of the logits is 0 but for one entry ln(k): softmax gives that token
# k / (k + 2) and the two others 1 / (k + 2); at temperature 1/2 the odds are k squared.
LN = math.log
NO_DRAW = np.random.default_rng(0)  # views in trajectory order draw nothing


def logits_of(*rows: tuple[int, float]) -> torch.Tensor:
    out = torch.zeros(len(rows), 3)
    for n, (token, odds) in enumerate(rows):
        out[n, token] = LN(odds)
    return out


def entropy_of(odds: float) -> float:
    """Entropy in nats at temperature 1/2 of a distribution with odds `odds` : 1 : 1 at temperature 1."""
    p, q = odds**2 / (odds**2 + 2), 1 / (odds**2 + 2)
    return -(p * LN(p) + 2 * q * LN(q))


def test_token_terms_by_hand() -> None:
    ce, entropy, right = token_terms(logits_of((0, 2.0), (1, 6.0)), torch.tensor([0, 2]), 0.5)
    torch.testing.assert_close(ce, torch.tensor([LN(4 / 2), LN(8 / 1)]))
    torch.testing.assert_close(entropy, torch.tensor([entropy_of(2.0), entropy_of(6.0)]))
    assert right.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (LLADA, lambda a, b, ent_a, ent_b: (a + b + 2.0 * ent_a) / 4),
        (DREAM, lambda a, b, ent_a, ent_b: (a + b + 1.0 * (ent_a + ent_b)) / 4),
        (CODER, lambda a, b, ent_a, ent_b: (a + ent_a) / 4),
    ],
)
def test_loss_is_the_published_one_on_two_by_eight_toy_logits(objective: PseudoTrajectory, expected) -> None:
    # (token, odds), label, view B? - the published formulas, restated: means over each view's own tokens.
    rows = [
        ((0, 2.0), 0, False),
        ((1, 6.0), 2, False),  # wrong: no entropy term
        ((2, 4.0), 2, False),
        ((1, 3.0), 1, True),
        ((0, 8.0), 1, True),  # wrong
    ] + [((0, 5.0), 0, True)] * 11
    labels, view_b = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    ce, entropy, right = token_terms(logits_of(*(row[0] for row in rows)), labels, objective.certainty_temperature)
    loss, figures = objective.combine(ce, entropy, right, view_b)
    ce_a = (LN(4 / 2) + LN(8 / 1) + LN(6 / 4)) / 3
    ce_b = (LN(5 / 3) + LN(10 / 1) + 11 * LN(7 / 5)) / 13
    ent_a, ent_b = (entropy_of(2.0) + entropy_of(4.0)) / 2, (entropy_of(3.0) + 11 * entropy_of(5.0)) / 12
    assert loss.item() == pytest.approx(expected(ce_a, ce_b, ent_a, ent_b), rel=1e-5)
    entropy_term = ent_a + ent_b if objective is DREAM else ent_a
    assert figures.tolist() == pytest.approx([ce_a, ce_b, entropy_term, 14 / 16], rel=1e-5)


@pytest.mark.parametrize("empty", ["masked", "complement", "right"])
def test_empty_sets_give_zero_and_a_finite_gradient(empty: str) -> None:
    logits = logits_of((0, 2.0), (1, 6.0)).requires_grad_()
    labels = torch.tensor([2, 2]) if empty == "right" else torch.tensor([0, 1])
    view_b = torch.full((2,), empty == "masked")
    ce, entropy, right = token_terms(logits, labels, 0.5)
    loss, figures = LLADA.combine(ce, entropy, right, view_b)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert figures[{"masked": 0, "complement": 1, "right": 2}[empty]] == 0.0


def windows_batch(
    samples: list[TrainingSample],
    windows: list[TrainingWindow],
    family: Family,
    objective: PseudoTrajectory,
    model: Transformer,
    rows: int,
) -> tuple[LossModule, Batch]:
    """The samples' views of the given windows (instead of drawn ones), packed for a module with `rows` head rows."""
    views = []
    for sample, window in zip(samples, windows, strict=True):
        with patch("d3llm_ray.distillation.objectives.pseudo_trajectory.draw_window", return_value=window):
            views.append(objective.views(draws(0, 0, sample.prompt_id), sample, None, family))
    micro = pack([sample.prompt_id for sample in samples], [sample.prompt_ids.size for sample in samples], views)
    module = LossModule(model, objective, head_rows=rows, autocast=False)
    return module, module.batch(micro, torch.device("cpu"))


def naive_loss(model: Transformer, family: Family, samples, views, objective: PseudoTrajectory) -> float:
    """Literal two-pass form: one unpacked forward a sample and view, full logits, shifted whole (arXiv:2601.07568)."""
    terms: dict[str, list[float]] = {"ce_a": [], "ce_b": [], "ent_a": [], "ent_b": []}
    for sample, view in zip(samples, views, strict=True):
        for which, chosen in (("a", view.masked), ("b", view.complement)):
            ids = [*sample.prompt_ids.tolist(), *sample.response_ids.tolist()]
            targets = list(ids)
            prompt = len(sample.prompt_ids)
            for position in range(8):
                if position in chosen or position >= view.window.end:
                    ids[prompt + position] = family.mask_token_id
            logits = model.logits(model(torch.tensor(ids), Ragged.build([len(ids)])))
            if family.name == "dream":
                logits = torch.cat((logits[:1], logits[:-1]))
            for position in chosen.tolist():
                p = torch.softmax(logits[prompt + position].double(), 0)
                label = targets[prompt + position]
                terms[f"ce_{which}"].append(-math.log(p[label].item()))
                if p.argmax().item() == label:
                    cold = torch.softmax(logits[prompt + position].double() / objective.certainty_temperature, 0)
                    terms[f"ent_{which}"].append(-(cold * cold.log()).sum().item())
    mean = {name: sum(values) / len(values) if values else 0.0 for name, values in terms.items()}
    entropy = mean["ent_a"] + (mean["ent_b"] if objective.certainty_views == "both" else 0.0)
    return (
        objective.ce_weight * mean["ce_a"]
        + objective.complement_weight * mean["ce_b"]
        + objective.certainty_weight * entropy
    )


@pytest.mark.parametrize(("kind", "objective"), [("llada", LLADA), ("dream", DREAM)])
@pytest.mark.parametrize("head_rows", [1024, 3])
def test_one_concatenated_forward_equals_separate_ones(kind: str, objective: PseudoTrajectory, head_rows: int) -> None:
    model, family, samples = toy(kind)
    windows = [TrainingWindow(0, 6, 0.5), TrainingWindow(2, 8, 0.75)]
    module, batch = windows_batch(samples, windows, family, objective, model, head_rows)
    loss, figures = module(batch)
    views = [choose_views(NO_DRAW, sample.reveal_step, window) for sample, window in zip(samples, windows, strict=True)]
    assert loss.item() == pytest.approx(naive_loss(model, family, samples, views, objective), rel=1e-5)
    assert 0 < figures[3] < 1  # some predictions are right and some wrong: the entropy terms choose
    assert batch.micro.mask_ratio == pytest.approx((3 / 6 + 4 / 6) / 2)  # round(4.5) is 4


def test_chunked_head_gives_the_same_gradients() -> None:
    gradients = []
    for head_rows in (1024, 3):
        model, family, samples = toy("llada")
        module, batch = windows_batch(samples, [TrainingWindow(0, 8, 0.5)] * 2, family, LLADA, model, head_rows)
        module(batch)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, chunked)


def test_no_logits_beyond_a_chunk_are_kept_for_the_backward_pass() -> None:
    model, family, samples = toy("llada")
    module, batch = windows_batch(samples, [TrainingWindow(0, 8, 0.5)] * 2, family, LLADA, model, 3)
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = module(batch)
    assert kept and not [shape for shape in kept if shape[-1:] == (5,) and len(shape) == 2]  # [rows, vocabulary]
    loss.backward()


def test_shift_reads_the_row_before_on_dream_only() -> None:
    for kind, shift in (("llada", 0), ("dream", 1)):
        model, family, samples = toy(kind)
        _, batch = windows_batch(samples[:1], [TrainingWindow(0, 8, 0.125)], family, LLADA, model, 9)
        last = int(samples[0].reveal_step.argmax())  # the one masked position
        assert batch.rows[~batch.second].tolist() == [5 + last - shift]
        assert batch.labels[~batch.second].tolist() == [int(samples[0].response_ids[last])]


def test_without_its_weight_the_complement_is_not_forwarded() -> None:
    model, family, samples = toy("llada")
    _, batch = windows_batch(samples, [TrainingWindow(0, 8, 0.5)] * 2, family, CODER, model, 9)
    assert batch.micro.lengths.tolist() == [13, 17]
    assert not batch.second.any()
