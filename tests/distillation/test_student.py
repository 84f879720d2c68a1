"""What is trained, and what is written, for every kind of teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from d3llm_ray.config import build
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.student import build_student, merged, student_family, write_student
from d3llm_ray.errors import InputError
from d3llm_ray.models import Ragged, load_model, load_tokenizer, read_configs, save_model
from tests.distillation.toys import toy

CPU = torch.device("cpu")
IDS = torch.tensor([5, 9, 2, 7])


def settings_of(teacher: str | Path, **values: Any) -> DistillSettings:
    given = {"teacher": str(teacher), "trajectories": "rows", "output": "out", "precision": "float32", "lora_rank": 4}
    return build(DistillSettings, {**given, **values})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Write a toy model of a kind as a checkpoint folder."""

    def write(kind: str) -> Path:
        model, family, _ = toy(kind, torch.float32)
        return save_model(model, family, tmp_path / kind)

    return write


@pytest.mark.parametrize("alpha", [4, 16])
def test_merging_is_pefts_and_leaves_the_student_as_it_was(tiny_checkpoint: Path, tmp_path: Path, alpha: int) -> None:
    settings = settings_of(tiny_checkpoint, lora_alpha=alpha, save_adapter=True)
    module, family = build_student(settings, CPU)
    assert isinstance(module.model, PeftModel)
    torch.manual_seed(1)
    for name, parameter in module.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = module.model(IDS, Ragged.build([4]))
    write_student(module.model, family, settings, tmp_path / "student")
    assert torch.equal(module.model(IDS, Ragged.build([4])), before)
    written, _ = load_model(tmp_path / "student")
    torch.testing.assert_close(written(IDS, Ragged.build([4])), before, rtol=1e-4, atol=1e-4)
    oracle = PeftModel.from_pretrained(load_model(tiny_checkpoint)[0], str(tmp_path / "student" / "adapter"))
    for name, tensor in oracle.merge_and_unload().state_dict().items():
        torch.testing.assert_close(written.state_dict()[name], tensor)


def test_full_training_trains_everything_and_copies_nothing_away(tiny_checkpoint: Path) -> None:
    module, _ = build_student(settings_of(tiny_checkpoint, lora_rank=0), CPU)
    assert all(parameter.requires_grad for parameter in module.parameters())
    copy = merged(module.model)
    for name, tensor in copy.state_dict().items():
        original = module.model.state_dict()[name]
        assert torch.equal(tensor, original) and tensor.data_ptr() != original.data_ptr()


@pytest.mark.parametrize(("rank", "gradient"), [(0, False), (4, None)])
def test_the_padding_row_of_the_embedding_is_not_trained(rank: int, gradient: bool | None) -> None:
    """As published (an embedding with a padding index). tiny-dream pads with 0; its answers end with another token."""
    module, family = build_student(settings_of("tiny-dream", lora_rank=rank), CPU)
    assert family.pad_token_id == 0 != family.eos_token_id
    module.model(torch.tensor([5, 0, family.eos_token_id, 7]), Ragged.build([4])).square().sum().backward()
    weight = next(tensor for name, tensor in module.named_parameters() if name.endswith("embed_tokens.weight"))
    if gradient is None:  # adapters leave the whole embedding alone
        assert weight.grad is None
        return
    assert weight.grad is not None
    reached = weight.grad.abs().sum(1) > 0
    assert reached.nonzero().flatten().tolist() == sorted([5, family.eos_token_id, 7])


def test_adapter_alone_is_written_without_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_checkpoint, merge=False, save_adapter=True)
    module, family = build_student(settings, CPU)
    write_student(module.model, family, settings, tmp_path / "student")
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["adapter"]


def test_recomputed_activations_change_no_gradient(tiny_checkpoint: Path) -> None:
    gradients = []
    for recompute in (False, True):
        module, _ = build_student(settings_of(tiny_checkpoint, lora_rank=0, activation_checkpointing=recompute), CPU)
        module.model(IDS, Ragged.build([4])).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert (kept is None) == (recomputed is None)
        if kept is not None:
            torch.testing.assert_close(kept, recomputed)


def test_the_embedded_causal_model_becomes_a_block_diffusion_student(tmp_path: Path) -> None:
    settings = settings_of("tiny-ar", objective={"name": "block-diffusion", "block_size": 32}, lora_rank=0)
    module, family = build_student(settings, CPU)
    tokenizer = load_tokenizer("tiny-ar", read_configs("tiny-ar")[1])
    assert tokenizer is not None and family.mask_token_id == tokenizer.mask_token_id
    write_student(module.model, family, settings, tmp_path / "student")
    written, again = load_model(tmp_path / "student")
    assert (again.name, again.block_size, again.mask_token_id) == ("fast_dllm_v2", 32, family.mask_token_id)
    causal, _ = load_model("tiny-ar")
    assert torch.equal(written(IDS, Ragged.build([4])), causal(IDS, Ragged.build([4])))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("qwen2", {}, r"teacher: .* accepted: a masked-diffusion model with full attention, or objective: block-diff"),
        ("fast_dllm_v2", {}, r"teacher: .* accepted: a masked-diffusion model with full attention"),
        (
            "llada",
            {"objective": "block-diffusion"},
            r"teacher: .* accepted: a causal model or a block-diffusion model, or objective: windows, d2f",
        ),
        (
            "fast_dllm_v2",
            {"objective": "block-diffusion"},
            r"objective.block_size: got 16; accepted: 4, the teacher's own",
        ),
        (
            "qwen2",
            {"objective": "block-diffusion"},
            r"teacher: .* has no mask token; accepted: ",
        ),
    ],
)
def test_teachers_that_an_objective_cannot_start_from(
    checkpoint: Callable[[str], Path], kind: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        student_family(settings_of(checkpoint(kind), **values))
