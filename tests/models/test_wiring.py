"""Every field of a checkpoint's files arrives where it acts, and loading takes what it is told in one copy."""

from __future__ import annotations

import json
import weakref
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3llm_ray.errors import InputError
from d3llm_ray.models import (
    Family,
    ModelConfig,
    Ragged,
    Transformer,
    checkpoint,
    encode_chat,
    load_model,
    load_tokenizer,
    read_configs,
    save_model,
)
from d3llm_ray.models.attention import flash_attention, sdpa_attention
from d3llm_ray.models.checkpoint import TOKENIZER_FILES, copy_tokenizer
from d3llm_ray.models.families import read_family
from d3llm_ray.models.ragged import BlockCausal

SHAPE = {
    "vocab_size": 50, "hidden_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 20,
    "max_position_embeddings": 96, "rope_theta": 123.0, "rms_norm_eps": 0.01, "qkv_bias": True,
    "tie_word_embeddings": True,
}  # fmt: skip
LLADA = {
    "model_type": "llada", "vocab_size": 48, "embedding_size": 50, "d_model": 24, "n_layers": 3, "n_heads": 4,
    "n_kv_heads": 2, "mlp_hidden_size": 20, "max_sequence_length": 96, "rope_theta": 123.0, "rms_norm_eps": 0.01,
    "include_qkv_bias": True, "weight_tying": True,
}  # fmt: skip
LLAMA = {
    "model_type": "Dream", "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 96, "rope_theta": 123.0,
    "rms_norm_eps": 0.01, "tie_word_embeddings": True,
}  # fmt: skip
IDS = {"mask_token_id": 40, "eos_token_id": 41, "pad_token_id": 42}


@pytest.mark.parametrize("config", [LLADA, LLAMA], ids=["llada", "llama"])
def test_every_field_of_a_config_arrives_in_the_shape(config: dict[str, Any]) -> None:
    assert SHAPE.keys() == {field.name for field in fields(ModelConfig)}
    shape, _ = read_family({**config, **IDS}, {})
    assert {name: getattr(shape, name) for name in SHAPE} == SHAPE


def test_the_ids_of_a_checkpoint_arrive_in_the_family() -> None:
    generation = {"block_size": 8, "eos_token_id": [43, 41]}
    _, family = read_family({**LLAMA, **IDS}, generation)
    assert {field.name for field in fields(Family)} == {
        "name", "layout", "mask_token_id", "eos_token_id", "pad_token_id", "stop_token_ids", "block_size", "config",
        "generation_config",
    }  # fmt: skip
    assert (family.name, family.mask_token_id, family.eos_token_id, family.pad_token_id) == ("dream", 40, 41, 42)
    assert family.stop_token_ids == (41, 43) and family.block_size == 8 and family.logit_shift
    assert (family.config, family.generation_config) == ({**LLAMA, **IDS}, generation)
    assert read_family({**LLAMA, **IDS, "bd_size": 4}, {})[1].block_size == 4
    without_pad = {name: value for name, value in IDS.items() if name != "pad_token_id"}
    assert read_family({**LLAMA, **without_pad}, {})[1].pad_token_id == 41
    wide = {**LLADA, **IDS, "embedding_size": 126464, "eos_token_id": [41, 44]}
    assert read_family(wide, {"eos_token_id": 45})[1].stop_token_ids == (41, 44, 45, 126348)  # <|eot_id|>


def filled(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 7.0}, {"rms_norm_eps": 0.5}, {"num_heads": 2, "num_kv_heads": 1}, {"num_layers": 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_weights_of_its_own_changes_what_the_network_computes(change: dict[str, Any]) -> None:
    config = ModelConfig(**{**SHAPE, "tie_word_embeddings": False})
    model, ids = filled(config), torch.arange(9)
    other = Transformer(replace(config, **change)).eval()
    other.load_state_dict(model.state_dict(), strict="num_layers" not in change)
    assert not torch.allclose(model(ids, Ragged.build([9])), other(ids, Ragged.build([9])), atol=1e-3)


def written(folder: Path, model: Transformer, config: dict[str, Any], generation: dict[str, Any]) -> Family:
    shape, family = read_family(config, generation)
    assert shape == model.config
    save_model(model, family, folder)
    return family


def test_loading_takes_dtype_and_device_and_never_holds_a_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are followed while they are read: of those of another precision one is there at a time."""
    written(tmp_path / "m", filled(ModelConfig(**SHAPE)), {**LLAMA, **IDS}, {})
    real, devices, most, read = checkpoint.safe_open, [], [0], []

    class Watched:
        def __init__(self, file: Path, framework: str, device: str = "cpu") -> None:
            devices.append(device)
            self.file = real(file, framework=framework)

        def __enter__(self) -> Watched:
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inside, name)

        def get_tensor(self, key: str) -> torch.Tensor:
            tensor = self.inside.get_tensor(key)
            read.append(weakref.ref(tensor))
            most[0] = max(most[0], sum(reference() is not None for reference in read))
            return tensor

    made: list[Transformer] = []
    initialise = Transformer.__init__

    def watch(self: Transformer, config: ModelConfig) -> None:
        initialise(self, config)
        made.extend([self] * all(parameter.is_meta for parameter in self.parameters()))

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
    monkeypatch.setattr(Transformer, "__init__", watch)
    model, _ = load_model(tmp_path / "m", "bfloat16", "cuda:3")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert devices[-1] == "cuda:3" and len(read) == len(list(model.parameters()))
    assert most[0] <= 2, "float32 tensors that are there together"  # the one in hand and the one before it
    assert made == [model]


@pytest.mark.parametrize(("config", "head"), [(LLADA, "model.transformer.ff_out"), (LLAMA, "lm_head")])
def test_a_tied_head_is_the_embedding_wherever_it_was_made(tmp_path: Path, config: dict[str, Any], head: str) -> None:
    model = filled(ModelConfig(**SHAPE))
    written(tmp_path, model, {**config, **IDS}, {})
    tensors = load_file(tmp_path / "model.safetensors")
    assert f"{head}.weight" not in tensors
    loaded, _ = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight and not loaded.lm_head.weight.is_meta
    hidden = torch.randn(2, 24)
    assert torch.equal(loaded.logits(hidden), hidden @ model.embed_tokens.weight.T)
    # Some checkpoints store the tied head as well; it is the same, and not another tensor.
    save_file({**tensors, f"{head}.weight": torch.zeros(50, 24)}, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path)[0].logits(hidden), loaded.logits(hidden))


def test_a_saved_folder_is_whole_with_its_config_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where config.json is, all is: an interrupted write is no checkpoint."""
    generation = {"block_size": 8, "eos_token_id": 43}
    moved: list[str] = []
    move = Path.replace

    def watch(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return move(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    family = written(tmp_path / "m", filled(ModelConfig(**SHAPE)), {**LLADA, **IDS}, generation)
    assert moved[-1] == "config.json" and set(moved) == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == generation
    assert read_configs(tmp_path / "m")[1] == family


def test_every_file_of_a_tokenizer_is_copied(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    (source / "config.json").write_text("{}")
    for name in TOKENIZER_FILES:
        (source / name).write_text(name)
    copy_tokenizer(source, target)
    assert {file.name: file.read_text() for file in target.iterdir()} == {name: name for name in TOKENIZER_FILES}


def test_the_template_is_the_tokenizers_own_and_ends_in_the_answers_header(tiny_checkpoint: Path) -> None:
    family = read_configs(tiny_checkpoint)[1]
    tokenizer = load_tokenizer(tiny_checkpoint, family)
    assert tokenizer is not None and tokenizer.chat_template != family.layout.chat_template
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}<|eot_id|>{% endif %}"
    assert encode_chat(tokenizer, [{"role": "user", "content": "5"}])[-1] == tokenizer.convert_tokens_to_ids(
        "<|eot_id|>"
    )
    with pytest.raises(InputError, match=r"messages\.0: got half of a surrogate pair"):
        encode_chat(tokenizer, [{"role": "us\ud83der", "content": "5"}])


def test_patterned_rows_and_wide_numbers_never_reach_flash_attn() -> None:
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        pytest.fail("flash-attn was called")

    ragged = Ragged.build([6], patterns=[BlockCausal(2)])
    q, k = torch.randn(6, 4, 6), torch.randn(6, 2, 6)
    for dtype, layout in ((torch.bfloat16, ragged), (torch.float32, Ragged.build([6]))):
        values = (q.to(dtype), k.to(dtype), k.to(dtype), layout)
        assert torch.equal(flash_attention(refuse, *values), sdpa_attention(*values))
    asked: list[dict[str, Any]] = []
    plain = (q.bfloat16(), k.bfloat16(), k.bfloat16(), Ragged.build([6]))
    flash_attention(lambda *_, **options: asked.append(options) or q, *plain)
    assert asked == [{"causal": False}]
