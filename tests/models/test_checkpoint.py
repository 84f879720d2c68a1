"""Published layouts: golden logits, byte-identical round trips, and every way a checkpoint can be wrong."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3llm_ray.errors import InputError
from d3llm_ray.models import Ragged, Transformer, checkpoint, load_model, load_tokenizer, resolve_model, save_model
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


def _alive() -> dict[int, int]:
    """Bytes of every tensor of the process that has any, by address."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not thing.is_meta]
    return {tensor.data_ptr(): tensor.nbytes for tensor in tensors}


def test_loading_holds_one_copy_of_the_weights(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a weight is put in its place, nothing but the model so far and that one, as stored, is in memory."""
    sizes = [tensor.nbytes for tensor in load_file(tiny_checkpoint / "model.safetensors").values()]
    before, assign, beside = _alive(), checkpoint._assign, []

    def watched(model: Transformer, name: str, tensor: torch.Tensor) -> None:
        assign(model, name, tensor)
        beside.append(0)
        if len(beside) == 14:
            own = {parameter.data_ptr() for parameter in model.parameters()}
            beside[-1] = sum(size for address, size in _alive().items() if address not in own and address not in before)

    monkeypatch.setattr(checkpoint, "_assign", watched)
    load_model(tiny_checkpoint, dtype="bfloat16")
    assert len(beside) == len(sizes) > 20 and max(beside) <= max(sizes) < sum(sizes) / 4


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


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 133\n"
LLAMA = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn", "longrope"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_scaled_rotary_embedding_is_refused_by_name(tiny_checkpoint: Path, field: str, kind: str) -> None:
    llada = json.loads((tiny_checkpoint / "config.json").read_text())
    for config in (DREAM, llada, {**LLAMA, "rope_theta": 1e4}):
        for spelling in ("rope_type", "type"):
            values = {spelling: kind, "factor": 2.0, "rope_theta": 1e4}
            with pytest.raises(InputError, match=rf"config.json: {field}\.rope_type: got '{kind}'"):
                read_family({**config, field: values}, {})
            with pytest.raises(InputError, match=rf"{field}\.full_attention\.rope_type: got '{kind}'"):
                read_family({**config, field: {"full_attention": values}}, {})
    with pytest.raises(InputError, match=f"{field}: got 'yarn'; accepted: a mapping"):
        read_family({**DREAM, field: "yarn"}, {})


def test_plain_rotary_embedding_is_read_in_both_spellings() -> None:
    for config in (
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
    ):
        assert read_family({**LLAMA, **config}, {})[0].rope_theta == 5e5
    layers = {name: {"rope_type": "default", "rope_theta": 1e4} for name in ("full_attention", "sliding_attention")}
    with pytest.raises(InputError, match="rope_parameters: got 'settings by layer type: full_attention, sliding"):
        read_family({**LLAMA, "rope_parameters": layers}, {})
    with pytest.raises(InputError, match="partial_rotary_factor: got 0.5"):
        read_family({**LLAMA, "rope_theta": 1e4, "partial_rotary_factor": 0.5}, {})


def test_mixtures_of_experts_are_refused_as_such(tiny_checkpoint: Path) -> None:
    config = {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "num_experts": 64, "hidden_size": 2048}
    for moe in (config, {"model_type": "qwen2_moe", "num_experts": 60}, {**LLAMA, "num_local_experts": 8}):
        with pytest.raises(InputError, match="experts: a mixture-of-experts model; accepted: dense models"):
            read_family(moe, {})


def test_a_tensor_in_two_files_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = _copy(tiny_checkpoint, tmp_path / "a")
    save_file({"model.transformer.ln_f.weight": torch.zeros(32)}, broken / "other.safetensors")
    with pytest.raises(InputError, match=r"ln_f\.weight is in both model\.safetensors and other\.safetensors"):
        load_model(broken)


@pytest.mark.parametrize(("norm", "rest"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_auto_takes_the_precision_of_most_weights(tiny_checkpoint: Path, tmp_path: Path, norm, rest) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    mixed = {name: tensor.to(norm if tensor.dim() == 1 else rest) for name, tensor in tensors.items()}
    model, _ = load_model(_copy(tiny_checkpoint, tmp_path / "a", **mixed), dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {rest}
    assert model.logits(model(torch.tensor([5, 6]), Ragged.build([2]))).isfinite().all()
    integers = _copy(tiny_checkpoint, tmp_path / "b", **{name: tensor.to(torch.int8) for name, tensor in mixed.items()})
    for dtype in ("auto", "float32"):
        with pytest.raises(InputError, match="is stored as I8; accepted: F64, F32, F16, BF16"):
            load_model(integers, dtype)


@pytest.mark.parametrize(
    ("content", "message"), [(LFS_POINTER, "is a Git LFS pointer, not the file"), ("", "is empty"), (None, "broken")]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"])
def test_stand_ins_for_files_are_named(
    tiny_checkpoint: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "a")
    (broken / name).unlink(missing_ok=True)
    if content is None:
        (broken / name).symlink_to("../blobs/0a1b")
    else:
        (broken / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name} .*{message}|{name} is a {message} symbolic link to \.\./blobs/0a1b"):
        load_tokenizer(broken, load_model(broken)[1])


def test_a_damaged_tokenizer_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "a")
    for content in ("{", "{}", (broken / "tokenizer.json").read_text()[:500]):
        (broken / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match="the tokenizer files of .* are damaged") as caught:
            load_tokenizer(broken, load_model(broken)[1])
        assert "\n" not in str(caught.value)


def test_folders_of_other_kinds_are_said_to_be_what_they_are(tiny_checkpoint: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(InputError, match="the folder .* is empty"):
        resolve_model(adapter)
    (adapter / "README.md").touch()
    with pytest.raises(InputError, match=r"has no config\.json"):
        resolve_model(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="a LoRA adapter without its base model"):
        resolve_model(adapter)
    with pytest.raises(InputError, match="is a file; accepted: the folder"):
        resolve_model(tiny_checkpoint / "model.safetensors")
    hub = tmp_path / "hub"
    snapshot = hub / "models--GSAI-ML--LLaDA-8B-Instruct" / "snapshots" / "08b83a6f"
    shutil.copytree(tiny_checkpoint, snapshot)
    for folder in (hub, snapshot.parents[1]):
        with pytest.raises(InputError, match=f"a cache of the Hugging Face Hub; accepted: .*{snapshot}"):
            resolve_model(folder)
    load_model(snapshot)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has its weights in pytorch_model\.bin; accepted: safetensors"):
        load_model(snapshot)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="is a broken symbolic link to nowhere"):
        resolve_model(tmp_path / "link")
