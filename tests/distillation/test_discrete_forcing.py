"""D2F against its literal form: one sample, one dense forward each, explicit attention masks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from peft import PeftModel

from d3llm_ray.distillation.lora import add_lora
from d3llm_ray.distillation.objectives import DiscreteForcing, LossModule
from d3llm_ray.distillation.objectives.batches import pack
from d3llm_ray.distillation.objectives.corruption import draws, monotone_ratios
from d3llm_ray.models import Ragged, Transformer
from tests.distillation.toys import CANVAS, toy

BLOCK = 4
OBJECTIVE = DiscreteForcing(BLOCK, (0.2, 0.7))


def adapted(kind: str) -> tuple[Transformer, PeftModel, object, list]:
    """The teacher, and a student whose adapters already change something."""
    model, family, samples = toy(kind)
    teacher, _, _ = toy(kind)
    student = add_lora(model, rank=2, alpha=8, dropout=0.0, targets=["q_proj", "v_proj", "up_proj"])
    torch.manual_seed(3)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return teacher, student, family, samples


def dense(model: torch.nn.Module, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Hidden states of one sequence under an explicit mask [length, length]."""
    plain = Ragged.build([len(ids)])
    return model(ids, dataclasses.replace(plain, mask=allowed[None, None]))


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("head_rows", [100, 2])
def test_loss_equals_the_literal_one(kind: str, head_rows: int) -> None:
    teacher, student, family, samples = adapted(kind)
    views = [OBJECTIVE.views(draws(7, 3, sample.prompt_id), sample, None, family) for sample in samples]
    micro = pack([sample.prompt_id for sample in samples], [sample.prompt_ids.size for sample in samples], views)
    module = LossModule(student, OBJECTIVE, head_rows=head_rows, autocast=False)
    loss, figures = module(module.batch(micro, torch.device("cpu")))

    terms, plain = [], []
    for sample, (view,) in zip(samples, views, strict=True):
        prompt, length = sample.prompt_ids.size, sample.prompt_ids.size + CANVAS
        ratios = monotone_ratios(draws(7, 3, sample.prompt_id).epoch, CANVAS // BLOCK, 0.2, 0.7)
        ids = torch.from_numpy(view.token_ids).long()
        assert ids[:prompt].tolist() == sample.prompt_ids.tolist()
        allowed = torch.zeros(length, length, dtype=torch.bool)
        for q in range(length):
            for k in range(length):
                allowed[q, k] = k < prompt or (q >= prompt and (k - prompt) // BLOCK <= (q - prompt) // BLOCK)
        wanted = teacher.logits(dense(teacher, ids, torch.ones_like(allowed))).softmax(-1)
        got = student.logits(dense(student, ids, allowed)).log_softmax(-1)
        for position in range(CANVAS):
            if ids[prompt + position] != family.mask_token_id:
                assert ids[prompt + position] == sample.response_ids[position]
                continue
            row = prompt + position - int(family.logit_shift)
            ce = -(wanted[row] * got[row]).sum().item()
            plain.append(ce)
            terms.append(ce / ratios[position // BLOCK])
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
    assert figures[0].item() == pytest.approx(np.mean(plain), rel=1e-5)
    assert micro.mask_ratio == pytest.approx(len(terms) / (2 * CANVAS))


def test_only_the_adapters_learn_and_they_work_again_after_the_teachers_turn() -> None:
    _, student, family, samples = adapted("llada")
    views = [OBJECTIVE.views(draws(7, 3, sample.prompt_id), sample, None, family) for sample in samples]
    micro = pack([sample.prompt_id for sample in samples], [sample.prompt_ids.size for sample in samples], views)
    module = LossModule(student, OBJECTIVE, head_rows=100, autocast=False)
    module(module.batch(micro, torch.device("cpu")))[0].backward()
    for name, parameter in student.named_parameters():
        assert ("lora_" in name) == (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)), name
