from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from d3llm_ray.distillation.lora import add_lora, coverage, save_adapter
from d3llm_ray.distillation.student import merged
from d3llm_ray.errors import InputError
from d3llm_ray.models import ModelConfig, Ragged, Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
FAMILIES = {"llada": {"num_kv_heads": 4, "qkv_bias": False}, "dream": {"num_kv_heads": 2, "qkv_bias": True}}
IDS, RAGGED = torch.arange(10), Ragged.build([6, 4])


def model_of(family: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SHAPE, **FAMILIES[family])).eval()


def adapted(model: Transformer, targets: tuple[str, ...] | None = None) -> PeftModel:
    return add_lora(model, rank=4, alpha=8, dropout=0.0, targets=targets)


def train_a_little(model: PeftModel) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model.logits(model(IDS, RAGGED)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_cover_all_seven_projections_and_nothing_else(family: str) -> None:
    model = adapted(model_of(family))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attention = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    mlp = {f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    expected = {
        f"base_model.model.layers.{layer}.{name}.lora_{side}.default.weight"
        for layer in (0, 1)
        for name in attention | mlp
        for side in "AB"
    }
    assert trained == expected
    assert not any("lm_head" in name for name in trained)


@pytest.mark.parametrize("target", ["qproj", "lm_head", "ff_out", "embed_tokens", "input_layernorm", "proj"])
def test_a_target_that_no_layer_has_is_an_error(target: str) -> None:
    with pytest.raises(InputError, match=f"lora_targets: unknown value '{target}'; accepted: down_proj, gate_proj"):
        adapted(model_of("llada"), ("q_proj", target))


def test_published_targets_leave_the_rest_alone() -> None:
    model = adapted(model_of("llada"), ("q_proj", "k_proj", "v_proj", "up_proj"))
    adapters = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapters == {"q_proj", "k_proj", "v_proj", "up_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_function_and_every_other_tensor(family: str) -> None:
    before = {name: tensor.clone() for name, tensor in model_of(family).state_dict().items()}
    model = adapted(model_of(family))
    train_a_little(model)
    with torch.no_grad():
        wrapped = model.logits(model(IDS, RAGGED))
        student = merged(model)
        torch.testing.assert_close(student.logits(student(IDS, RAGGED)), wrapped)
    assert student.state_dict().keys() == before.keys()
    for name, tensor in student.state_dict().items():
        changed = name.endswith("_proj.weight")
        assert torch.equal(tensor, before[name]) != changed, name


def test_a_saved_adapter_is_readable_by_peft(tmp_path: Path) -> None:
    model = adapted(model_of("llada"))
    train_a_little(model)
    save_adapter(model, tmp_path)
    again = PeftModel.from_pretrained(model_of("llada"), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, RAGGED), model(IDS, RAGGED))
        assert not torch.allclose(again(IDS, RAGGED), model_of("llada")(IDS, RAGGED))


def test_coverage_of_all_projections() -> None:
    covered = coverage(adapted(model_of("llada")))
    assert covered.projections == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 2
    )
    assert covered.trained == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))  # layers x rank x (inputs + outputs)
    base = 2 * 40 * 32 + 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    assert covered.parameters == base + covered.trained
    assert str(covered) == (
        "LoRA rank 4, alpha 8: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj in 2 of 2 layers; "
        "0.00 M of 0.02 M parameters trained (16.5%); LM head and embeddings frozen"
    )


def test_coverage_names_what_the_published_targets_miss() -> None:
    covered = coverage(adapted(model_of("llada"), ("q_proj", "k_proj", "v_proj", "up_proj")))
    assert [name for name, layers in covered.projections.items() if layers == 0] == ["o_proj", "gate_proj", "down_proj"]
    assert "q_proj k_proj v_proj up_proj in 2 of 2 layers, NO adapter on o_proj gate_proj down_proj;" in str(covered)


def test_coverage_shows_weights_that_should_be_frozen() -> None:
    model = adapted(model_of("llada"), ("q_proj",))
    for weight in model.get_base_model().lm_head.parameters():
        weight.requires_grad_(True)
    for weight in model.get_base_model().layers[1].self_attn.q_proj.parameters():
        weight.requires_grad_(False)
    assert "q_proj in 1 of 2 layers, NO adapter on" in str(coverage(model))
    assert str(coverage(model)).endswith("LM head trained")


def test_coverage_of_full_fine_tuning() -> None:
    covered = coverage(model_of("dream"))
    assert covered.rank is None and covered.trained == covered.parameters
    assert covered.outside == ("LM head", "embeddings")
    assert str(covered).startswith(
        "full fine-tuning: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj in 2 of 2"
    )
