"""Fast-dLLM v2's objective against its literal form, and the models it starts from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d3llm_ray.distillation.convert import block_diffusion_family, group_queries
from d3llm_ray.distillation.objectives import BlockDiffusion, LossModule
from d3llm_ray.distillation.objectives.batches import TrainingSample, pack
from d3llm_ray.distillation.objectives.corruption import draws
from d3llm_ray.errors import InputError
from d3llm_ray.models import BlockCausal, Ragged
from tests.distillation.toys import CANVAS, family_of, toy

BLOCK = 4
OBJECTIVE = BlockDiffusion(BLOCK)


@pytest.mark.parametrize("head_rows", [100, 3])
def test_loss_equals_the_literal_one(head_rows: int) -> None:
    model, family, samples = toy("fast_dllm_v2")
    views = [OBJECTIVE.views(draws(7, 3, sample.prompt_id), sample, None, family) for sample in samples]
    micro = pack([sample.prompt_id for sample in samples], [sample.prompt_ids.size for sample in samples], views)
    module = LossModule(model, OBJECTIVE, head_rows=head_rows, autocast=False)
    loss, _ = module(module.batch(micro, torch.device("cpu")))

    terms = []
    for sample, (view,) in zip(samples, views, strict=True):
        prompt, length = sample.prompt_ids.size, sample.prompt_ids.size + CANVAS
        clean = [*sample.prompt_ids.tolist(), *sample.response_ids.tolist()]
        begin, last = (prompt - 1) // BLOCK * BLOCK, (length - 1) // BLOCK * BLOCK
        parts = np.split(view.token_ids, (last, last + length - begin))
        assert parts[0].tolist() == clean[:last]
        hidden_places = []
        for part in parts[1:]:
            noisy = clean[:begin] + part.tolist()
            assert len(noisy) == length and noisy[:prompt] == clean[:prompt]
            hidden_places.append([place for place in range(length) if noisy[place] == family.mask_token_id])
            # A block at a time, as it is decoded: the clean blocks before it, then the noisy block itself.
            for first in range(0, length, BLOCK):
                block = noisy[first : first + BLOCK]
                ids = torch.tensor(clean[:first] + block)
                logits = model.logits(model(ids, Ragged.build([len(ids)], pattern=BlockCausal(BLOCK))))
                for row, place in ((row, first + row + 1) for row in range(len(block))):
                    # Row r predicts place r + 1, also over the end of its block.
                    if place < length and noisy[place] == family.mask_token_id:
                        terms.append(F.cross_entropy(logits[first + row], torch.tensor(clean[place])).item())
        assert sorted(hidden_places[0] + hidden_places[1]) == list(range(prompt, length))  # complementary
    assert len(terms) == 2 * CANVAS
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_a_packed_batch_gives_each_samples_own_hidden_states() -> None:
    model, family, samples = toy("fast_dllm_v2")
    module = LossModule(model, OBJECTIVE, head_rows=100, autocast=False)

    def states(chosen: list) -> torch.Tensor:
        views = [OBJECTIVE.views(draws(7, 3, sample.prompt_id), sample, None, family) for sample in chosen]
        micro = pack([sample.prompt_id for sample in chosen], [sample.prompt_ids.size for sample in chosen], views)
        batch = module.batch(micro, torch.device("cpu"))
        return module.hidden(batch, batch.layout)

    alone = torch.cat([states([sample]) for sample in samples])
    together = states(samples)
    assert together.shape == alone.shape
    order = torch.cdist(together, alone).argmin(1)
    assert sorted(order.tolist()) == list(range(len(alone)))
    torch.testing.assert_close(together, alone[order])


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_causal_model_becomes_one_without_a_change_to_its_weights(kind: str) -> None:
    model, family, _ = toy(kind)
    shape, converted = block_diffusion_family(family, mask_token_id=4, block_size=8)
    assert (converted.name, converted.mask_token_id, converted.block_size) == ("fast_dllm_v2", 4, 8)
    assert shape.qkv_bias and converted.logit_shift
    wider = group_queries(model, shape)
    ids = torch.tensor([1, 2, 3, 1, 2])
    for pattern in (None, BlockCausal(1), BlockCausal(2)):
        layout = Ragged.build([5], pattern=pattern)
        assert torch.equal(wider(ids, layout), model(ids, layout))
    assert all(parameter.requires_grad for parameter in wider.parameters())


def test_a_diffusion_model_is_not_converted() -> None:
    with pytest.raises(InputError, match=r"teacher: got 'llada'; accepted: a causal model"):
        block_diffusion_family(family_of("llada")[1], mask_token_id=4, block_size=8)


def test_parts_of_a_row_share_positions() -> None:
    """Prompts of 5 and 9 tokens, answers of 8: clean up to the last block, both noisy parts from the prompt's last."""
    _, family, samples = toy("fast_dllm_v2")
    views = [OBJECTIVE.views(draws(0, 0, sample.prompt_id), sample, None, family) for sample in samples]
    micro = pack(["0", "1"], [5, 9], views)
    layout = OBJECTIVE.layout(micro, torch.device("cpu"))
    assert layout.positions.tolist() == [*range(12), *[*range(4, 13)] * 2, *range(16), *[*range(8, 17)] * 2]
    assert layout.patterned  # flash-attn's unmasked kernel must not take it


@pytest.mark.parametrize("block", [1, 4, 7])
def test_lengths_are_read_from_packed_rows(block: int) -> None:
    """Every length of prompt and answer, where blocks end early, late and together."""
    objective = BlockDiffusion(block)
    _, family, _ = toy("fast_dllm_v2")
    for prompt in range(1, 2 * block + 2):
        for answer in range(1, 2 * block + 2):
            sample = TrainingSample("0", np.ones(prompt, np.int32), np.ones(answer, np.int32), None)
            (view,) = objective.views(draws(0, 0, "0"), sample, None, family)
            layout = objective.layout(pack(["0"], [prompt], [[view]]), torch.device("cpu"))
            assert layout.positions[-1] == prompt + answer - 1
            assert len(layout.positions) == len(view.token_ids)
            places = layout.positions[torch.from_numpy(view.rows)] + 1  # a row predicts the next position
            assert sorted(places.tolist()) == list(range(prompt, prompt + answer))


@pytest.mark.parametrize(("prompt", "stop", "kept"), [(5, 0, 3), (5, 2, 3), (5, 3, 7), (8, 3, 4), (8, 4, 8), (8, 7, 8)])
def test_padding_ends_with_the_block_of_the_stop_token(prompt: int, stop: int, kept: int) -> None:
    """Blocks of 4 from position 0: behind a prompt of 5 they end at the answer's 3rd and 7th token."""
    _, family, _ = toy("fast_dllm_v2")
    response = np.ones(CANVAS, np.int32)
    response[stop:] = family.eos_token_id
    sample = TrainingSample("0", np.ones(prompt, np.int32), response, None)
    (view,) = OBJECTIVE.views(draws(0, 0, "0"), sample, None, family)
    assert sorted(view.labels.tolist()) == sorted(response[:kept].tolist())
