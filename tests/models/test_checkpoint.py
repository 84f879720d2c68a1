"""Published layouts: golden logits, byte-identical round trips, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3llm_ray.errors import InputError
from d3llm_ray.models import Ragged, Transformer, load_model, resolve_model, save_model
from d3llm_ray.models.families import read_family

DREAM = {
    "model_type": "Dream",
    "vocab_size": 160000,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "mask_token_id": 151666,
    "pad_token_id": 151643,
    "eos_token_id": 151643,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_logits_equal_the_published_models(golden: Path, family: str) -> None:
    model, _ = load_model(golden / f"tiny_{family}")
    for case in json.loads((golden / f"{family}_given.json").read_text())["logits"]:
        ids = torch.tensor(case["input_ids"])
        logits = model.logits(model(ids, Ragged.build([len(ids)]))[torch.tensor(case["rows"])])
        expected = torch.tensor(case.get("logits", case.get("raw_logits")))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_saving_writes_the_same_tensors_back(golden: Path, tmp_path: Path, family: str) -> None:
    source = golden / f"tiny_{family}"
    model, conventions = load_model(source, dtype="auto")
    save_model(model, conventions, tmp_path / "copy")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(
            tensor.view(torch.uint8), after[name].view(torch.uint8)
        )
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "copy/config.json").read_text())
    assert not list(tmp_path.glob("*.partial"))


def test_saving_removes_an_earlier_checkpoint_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, family = load_model(tiny_checkpoint)
    (tmp_path / "disk" / "copy").mkdir(parents=True)
    (tmp_path / "copy").symlink_to(tmp_path / "disk" / "copy")
    (tmp_path / "copy.partial").mkdir()
    kept = [tmp_path / "copy.partial" / "mine", tmp_path / "copy" / "notes.txt"]
    for file in kept:
        file.write_text("mine")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / "copy" / name).write_text("of an earlier checkpoint, of two shards")
    save_model(model, family, tmp_path / "copy")
    assert [file.read_text() for file in kept] == ["mine", "mine"] and (tmp_path / "copy").is_symlink()
    assert load_model(tmp_path / "copy")[1].name == family.name  # the earlier index is gone
    assert not list((tmp_path / "disk").glob(".*"))
    (tmp_path / "copy" / "adapter_model.safetensors").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
    with pytest.raises(InputError, match=r"directory: .* holds adapter_model\.safetensors"):
        save_model(model, family, tmp_path / "copy")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}


def test_sharded_and_bfloat16_checkpoints_load(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tiny_checkpoint / "model.safetensors").items()}
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, tmp_path / f"model-{number}.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    model, family = load_model(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[family.layout.checkpoint_name(name)])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard model-1\.safetensors"):
        load_model(tmp_path)


def test_loading_holds_one_copy_of_the_weights(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Python-side allocations while loading stay small: tensors come from the file one at a time."""
    tracemalloc.start()
    model, _ = load_model(tiny_checkpoint)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert peak < 5_000_000


def _copy(source: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    tensors = load_file(source / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    shutil.copy(source / "config.json", target)
    return target


def test_wrong_checkpoints_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    head = "model.transformer.ff_out.weight"
    with pytest.raises(InputError, match=f"missing tensor.*{head}"):
        load_model(_copy(tiny_checkpoint, tmp_path / "a", **{head: None}))
    with pytest.raises(InputError, match=r"unexpected tensor.*extra\.weight"):
        load_model(_copy(tiny_checkpoint, tmp_path / "b", **{"extra.weight": torch.zeros(2)}))
    with pytest.raises(InputError, match=rf"{head}.*shape \[2, 32\]; accepted: \[\d+, 32\]"):
        load_model(_copy(tiny_checkpoint, tmp_path / "c", **{head: torch.zeros(2, 32)}))
    broken = _copy(tiny_checkpoint, tmp_path / "d")
    (broken / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(InputError, match="unreadable safetensors"):
        load_model(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        load_model(broken)
    with pytest.raises(InputError, match="accepted:.*tiny-llada"):
        resolve_model("no-such-model")
    with pytest.raises(InputError, match="dtype.*accepted: auto, bfloat16, float16, float32"):
        load_model(tiny_checkpoint, dtype="int3")


def test_unsupported_architectures_are_refused(tiny_checkpoint: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    for field, value in (("alibi", True), ("activation_type", "gelu"), ("model_type", "mamba"), ("d_model", None)):
        with pytest.raises(InputError, match=field):
            read_family({**config, field: value}, {})


def test_conventions_of_the_published_vocabularies() -> None:
    shape, dream = read_family(DREAM, {})
    assert dream.logit_shift and dream.stop_token_ids == (151643, 151645) and dream.mask_token_id == 151666
    names = {dream.layout.checkpoint_name(name) for name, _ in Transformer(shape).named_parameters()}
    assert {"model.layers.0.self_attn.q_proj.bias", "lm_head.weight", "model.norm.weight"} <= names
    llada = {
        "model_type": "llada", "d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 24, "rope_theta": 5e5,
        "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 64, "rms_norm_eps": 1e-5,
        "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
    }  # fmt: skip
    shape, family = read_family(llada, {})
    assert not family.logit_shift and family.stop_token_ids == (126081, 126348)
    names = {family.layout.checkpoint_name(name) for name, _ in Transformer(shape).named_parameters()}
    assert {"model.transformer.blocks.0.ff_out.weight", "model.transformer.ff_out.weight"} <= names


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    config = {**DREAM, "vocab_size": 40, "mask_token_id": 1, "pad_token_id": 2, "eos_token_id": 2}
    shape, family = read_family({**config, "tie_word_embeddings": True}, {})
    save_model(Transformer(shape), family, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model, _ = load_model(tmp_path / "tied")
    assert model.lm_head.weight is model.embed_tokens.weight
