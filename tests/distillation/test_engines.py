from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from d3llm_ray.distillation.training.engines import EngineOptions, torch_engine
from d3llm_ray.errors import InputError
from d3llm_ray.models import Transformer
from tests.distillation.toy_training import ToyLoss, batches, in_group, lr_at, options, train, values_of
from tests.distillation.toys import family_of

pytestmark = pytest.mark.timeout(900)  # two processes that wait for each other take long on a busy machine

STEPS = 6
PLACES = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "all")]
BFLOAT16 = [(0, "none"), (2, "none"), (3, "all")]


def half_way(engine: Any, module: ToyLoss) -> float:
    """The loss on a batch of its own, with the module whole, as validation computes it.

    The first worker computes more: its share of the held-out rows may be the larger one, and it decodes alone, which
    calls parts of the module in an order of its own.
    """
    module.eval()
    with engine.whole(), torch.no_grad():
        shapes = [parameter.shape for parameter in module.parameters()]
        assert shapes == [parameter.shape for parameter in ToyLoss().parameters()]
        losses = {module(batches(99, [0])[0])[0].item() for _ in range(2 if engine.rank == 0 else 1)}
        if engine.rank == 0:
            for part in (module.head, module.mixer, module.head, module.mixer):
                part(part.weight[0])
            losses.add(module(batches(99, [0])[0])[0].item())
    module.train()
    (loss,) = losses
    return loss


def spoilt_step(engine: Any) -> tuple[float, bool]:
    """The norm of a step with a NaN in one worker's features, and whether the weights stayed as they were."""
    before = values_of(engine)
    for features, labels in batches(7, range(engine.options.accumulation)):
        if engine.rank == 0:
            features[0, 0] = math.nan
        loss, _ = engine.forward((features, labels))
        engine.backward(loss)
    norm = engine.step(1.0)
    after = values_of(engine)
    return norm, all(torch.equal(before[name], after[name]) for name in before)


def follow(engine: Any, module: ToyLoss, accumulation: int) -> dict[str, Any]:
    """Train with a validation in the middle and a step that must not be taken near the end."""
    fresh = engine.updates
    first = train(engine, range(3), accumulation=accumulation)
    validated = half_way(engine, module)
    second = train(engine, range(3, 5), accumulation=accumulation)
    spoilt = spoilt_step(engine)
    third = train(engine, range(5, STEPS), accumulation=accumulation)
    return {
        "losses": first["losses"] + second["losses"] + third["losses"],
        "norms": first["norms"] + second["norms"] + third["norms"],
        "validated": validated,
        "spoilt": spoilt,
        "updates": (fresh, engine.updates),
        "values": values_of(engine),
    }


def all_places(_folder: Path) -> dict[Any, dict[str, Any]]:
    from d3llm_ray.distillation.training.deepspeed_engine import deepspeed_engine

    results = {}
    for bfloat16, places in ((False, PLACES), (True, BFLOAT16)):
        for zero_stage, offload in places:
            module = ToyLoss()
            engine = deepspeed_engine(module, options(zero_stage=zero_stage, offload=offload, bfloat16=bfloat16))
            results[zero_stage, offload, bfloat16] = follow(engine, module, 2)
    return results


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return in_group(all_places, tmp_path_factory.mktemp("engines"))


@cache
def alone(*, bfloat16: bool = False) -> dict[str, Any]:
    """Two workers' training in this process, by doubled accumulation."""
    module = ToyLoss()
    return follow(torch_engine(module, options(accumulation=4, bfloat16=bfloat16)), module, 4)


def test_torch_engine_is_the_plain_loop() -> None:
    module, engine_options = ToyLoss(), options(accumulation=4)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [module.mixer.weight, module.down.weight, module.up.weight]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [module.mixer.bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(STEPS):
        adamw.zero_grad()
        for batch in batches(step, range(4)):
            loss = module(batch)[0]
            (loss / 4).backward()
            losses.append(loss.item())
        for group in adamw.param_groups:
            group["lr"] = lr_at(step)
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        adamw.step()

    engine = torch_engine(ToyLoss(), engine_options)
    assert train(engine, range(STEPS), accumulation=4) == {"losses": losses, "norms": norms}
    values = values_of(engine)
    assert all(torch.equal(values[name], dict(module.named_parameters())[name]) for name in engine.trained)
    assert min(norms) < engine_options.clip < max(norms)  # clipped in some steps and left alone in others


def test_one_update_by_hand() -> None:
    """Two parameters with the gradients 3 and 4: norm 5, clipped to 1; AdamW's first update is lr * sign(gradient)."""

    class Slope(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = torch.nn.Parameter(torch.tensor([2.0, -1.0]))

        def forward(self, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss = (self.point * slope).sum()
            return loss, loss.detach()[None]

    engine = torch_engine(Slope(), EngineOptions(0.5, (0.9, 0.99), 1.0, micro_batch_size=1, accumulation=2))
    for slope in ([1.0, 3.0], [5.0, 5.0]):
        engine.backward(engine.forward(torch.tensor(slope))[0])
    assert engine.step(0.1) == pytest.approx(5.0)
    state = engine.collect(["point"])["point"]
    decayed = [2.0 * (1 - 0.1 * 0.5), -1.0 * (1 - 0.1 * 0.5)]
    assert state.value.tolist() == pytest.approx([decayed[0] - 0.1, decayed[1] - 0.1], rel=1e-6)
    assert state.exp_avg.tolist() == pytest.approx([0.1 * 0.6, 0.1 * 0.8], rel=1e-5)
    assert state.exp_avg_sq.tolist() == pytest.approx([0.01 * 0.36, 0.01 * 0.64], rel=1e-5)
    assert engine.updates == 1


def test_biases_and_norms_do_not_decay() -> None:
    """Where no gradient comes, AdamW's decay is all that changes a weight: 0.1 x 0.5 of it, by hand."""
    shape, _ = family_of("dream")  # biases on queries, keys and values
    model = torch.nn.ModuleDict({"model": Transformer(shape)})
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    engine = torch_engine(model, EngineOptions(0.5, (0.9, 0.99), 1.0, micro_batch_size=1, accumulation=1))
    sum((parameter * 0.0).sum() for parameter in model.parameters()).backward()
    engine.step(0.1)
    still = {name for name, tensor in model.named_parameters() if torch.equal(tensor, before[name])}
    of_layer = ("input_layernorm.weight", "post_attention_layernorm.weight")
    of_layer += tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
    assert still == {"model.norm.weight", *(f"model.layers.{n}.{name}" for n in range(2) for name in of_layer)}
    for name, tensor in model.named_parameters():
        if name not in still:
            torch.testing.assert_close(tensor, before[name] * 0.95)


@pytest.mark.parametrize(("zero_stage", "offload"), PLACES)
def test_two_workers_are_one_with_doubled_accumulation(workers: list[Any], zero_stage: int, offload: str) -> None:
    expected = alone()
    for rank, worker in enumerate(workers):
        result = worker[zero_stage, offload, False]
        mine = [loss for step in range(STEPS) for loss in expected["losses"][4 * step + 2 * rank :][:2]]
        assert result["losses"] == pytest.approx(mine, abs=1e-6)
        assert result["norms"] == pytest.approx(expected["norms"], abs=1e-6)
        assert result["validated"] == pytest.approx(expected["validated"], abs=1e-6)
        for name, value in result["values"].items():
            torch.testing.assert_close(value, expected["values"][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("zero_stage", "offload", "bfloat16"),
    [(*place, False) for place in PLACES] + [(*place, True) for place in BFLOAT16],
)
def test_a_step_with_nan_is_not_taken(workers: list[Any], zero_stage: int, offload: str, bfloat16: bool) -> None:
    for result in (*(worker[zero_stage, offload, bfloat16] for worker in workers), alone(bfloat16=bfloat16)):
        norm, unchanged = result["spoilt"]
        assert not math.isfinite(norm)
        assert unchanged
        assert result["updates"] == (0, STEPS)


@pytest.mark.parametrize(("zero_stage", "offload"), BFLOAT16)
def test_bfloat16_keeps_float32_masters(workers: list[Any], zero_stage: int, offload: str) -> None:
    """Weights come close to float32's, closer than bfloat16 could hold them."""
    expected, start = alone()["values"], values_of(torch_engine(ToyLoss(), options()))
    for result in (workers[0][zero_stage, offload, True], alone(bfloat16=True)):
        for name, value in result["values"].items():
            assert not torch.equal(value, value.bfloat16().float())
            moved, should = value - start[name].bfloat16().float(), expected[name] - start[name]
            assert torch.nn.functional.cosine_similarity(moved.flatten(), should.flatten(), dim=0) > 0.95


def test_bfloat16_learns() -> None:
    engine = torch_engine(ToyLoss(), options(bfloat16=True))
    losses = []
    for _ in range(20):
        for batch in batches(0, range(2)):
            loss, _ = engine.forward(batch)
            engine.backward(loss)
        losses.append(loss.item())
        engine.step(1e-2)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("zero_stage", "offload", "said"),
    [(4, "none", "0, 1, 2 or 3"), (0, "optimizer", "1 to 3"), (2, "all", "3 to 3 with offload: all")],
)
def test_impossible_options(zero_stage: int, offload: str, said: str) -> None:
    with pytest.raises(InputError, match=f"zero_stage: got {zero_stage}; accepted: {said}"):
        options(zero_stage=zero_stage, offload=offload)
