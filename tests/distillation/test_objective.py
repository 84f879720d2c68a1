from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from d3llm_ray.distillation.batches import pack
from d3llm_ray.distillation.corruption import Window, choose_views
from d3llm_ray.distillation.data import Sample
from d3llm_ray.distillation.objective import DistillationLoss, LossWeights, combine, token_terms
from d3llm_ray.models import ModelConfig, Ragged, Transformer
from d3llm_ray.models.families import Family, read_family

LLADA = LossWeights(ce=0.25, complement=0.25, entropy=0.5, entropy_views="a", temperature=0.5)
DREAM = LossWeights(ce=0.25, complement=0.25, entropy=0.25, entropy_views="both", temperature=0.5)

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
    ("weights", "expected"),
    [
        (LLADA, lambda a, b, ent_a, ent_b: (a + b + 2.0 * ent_a) / 4),
        (DREAM, lambda a, b, ent_a, ent_b: (a + b + 1.0 * (ent_a + ent_b)) / 4),
        (LossWeights(0.25, 0.0, 0.25, "a", 0.5), lambda a, b, ent_a, ent_b: (a + ent_a) / 4),
    ],
)
def test_loss_is_the_published_one_on_two_by_eight_toy_logits(weights: LossWeights, expected) -> None:
    # (token, odds), label, view B? - the published formulas, restated: means over each view's own tokens.
    rows = [
        ((0, 2.0), 0, False),
        ((1, 6.0), 2, False),  # wrong: no entropy term
        ((2, 4.0), 2, False),
        ((1, 3.0), 1, True),
        ((0, 8.0), 1, True),  # wrong
    ] + [((0, 5.0), 0, True)] * 11
    labels, view_b = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    ce, entropy, right = token_terms(logits_of(*(row[0] for row in rows)), labels, weights.temperature)
    loss, figures = combine(ce, entropy, right, view_b, weights)
    ce_a = (LN(4 / 2) + LN(8 / 1) + LN(6 / 4)) / 3
    ce_b = (LN(5 / 3) + LN(10 / 1) + 11 * LN(7 / 5)) / 13
    ent_a, ent_b = (entropy_of(2.0) + entropy_of(4.0)) / 2, (entropy_of(3.0) + 11 * entropy_of(5.0)) / 12
    assert loss.item() == pytest.approx(expected(ce_a, ce_b, ent_a, ent_b), rel=1e-5)
    entropy_term = ent_a + ent_b if weights is DREAM else ent_a
    assert figures.tolist() == pytest.approx([loss.item(), ce_a, ce_b, entropy_term, 14 / 16], rel=1e-5)


@pytest.mark.parametrize("empty", ["masked", "complement", "right"])
def test_empty_sets_give_zero_and_a_finite_gradient(empty: str) -> None:
    logits = logits_of((0, 2.0), (1, 6.0)).requires_grad_()
    labels = torch.tensor([2, 2]) if empty == "right" else torch.tensor([0, 1])
    view_b = torch.full((2,), empty == "masked")
    ce, entropy, right = token_terms(logits, labels, 0.5)
    loss, figures = combine(ce, entropy, right, view_b, LLADA)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert figures[{"masked": 1, "complement": 2, "right": 3}[empty]] == 0.0


def family_of(kind: str) -> tuple[ModelConfig, Family]:
    if kind == "llada":
        config = {
            "model_type": "llada",
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "mlp_hidden_size": 64,
            "vocab_size": 5,
            "max_sequence_length": 64,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-5,
            "mask_token_id": 4,
            "eos_token_id": 0,
        }
    else:
        config = {
            "model_type": "Dream",
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "vocab_size": 5,
            "max_position_embeddings": 64,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
            "mask_token_id": 4,
            "eos_token_id": 0,
        }
    return read_family(config, {})


def toy(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Transformer, Family, list[Sample]]:
    shape, family = family_of(kind)
    torch.manual_seed(0)
    model = Transformer(shape).to(dtype)
    draw = torch.Generator().manual_seed(1)
    samples = []
    for n, prompt in enumerate((5, 9)):  # ragged
        prompt_ids = torch.randint(1, 4, (prompt,), generator=draw).numpy().astype("int32")
        response = torch.randint(1, 4, (8,), generator=draw).numpy().astype("int32")
        samples.append(Sample(str(n), prompt_ids, response, torch.randperm(8, generator=draw).numpy().astype("uint16")))
    return model, family, samples


def naive_loss(model: Transformer, family: Family, samples, views, weights: LossWeights) -> float:
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
                    cold = torch.softmax(logits[prompt + position].double() / weights.temperature, 0)
                    terms[f"ent_{which}"].append(-(cold * cold.log()).sum().item())
    mean = {name: sum(values) / len(values) if values else 0.0 for name, values in terms.items()}
    entropy = mean["ent_a"] + (mean["ent_b"] if weights.entropy_views == "both" else 0.0)
    return weights.ce * mean["ce_a"] + weights.complement * mean["ce_b"] + weights.entropy * entropy


@pytest.mark.parametrize(("kind", "weights"), [("llada", LLADA), ("dream", DREAM)])
@pytest.mark.parametrize("head_rows", [1024, 3])
def test_one_concatenated_forward_equals_separate_ones(kind: str, weights: LossWeights, head_rows: int) -> None:
    model, family, samples = toy(kind)
    views = [
        choose_views(NO_DRAW, sample.reveal_step, window)
        for sample, window in zip(samples, (Window(0, 6, 0.5), Window(2, 8, 0.75)), strict=True)
    ]
    batch = pack(samples, views, family, both=True)
    loss, figures = DistillationLoss(model, weights, head_rows=head_rows, autocast=False)(batch)
    assert loss.item() == pytest.approx(naive_loss(model, family, samples, views, weights), rel=1e-5)
    assert 0 < figures[4] < 1  # some predictions are right and some wrong: the entropy terms choose
    assert batch.mask_ratio == pytest.approx((3 / 6 + 4 / 6) / 2)  # round(4.5) is 4


def test_chunked_head_gives_the_same_gradients() -> None:
    gradients = []
    for head_rows in (1024, 3):
        model, family, samples = toy("llada")
        views = [choose_views(NO_DRAW, sample.reveal_step, Window(0, 8, 0.5)) for sample in samples]
        loss, _ = DistillationLoss(model, LLADA, head_rows=head_rows, autocast=False)(
            pack(samples, views, family, both=True)
        )
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_shift_reads_the_row_before_on_dream_only() -> None:
    for kind, shift in (("llada", 0), ("dream", 1)):
        _, family, samples = toy(kind)
        views = [choose_views(NO_DRAW, samples[0].reveal_step, Window(0, 8, 0.125))]
        batch = pack(samples[:1], views, family, both=False)
        last = int(samples[0].reveal_step.argmax())  # the one masked position
        assert batch.rows.tolist() == [5 + last - shift]
        assert batch.labels.tolist() == [int(samples[0].response_ids[last])]
        assert not batch.complement.any()
