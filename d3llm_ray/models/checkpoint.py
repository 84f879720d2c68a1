"""Reading and writing checkpoints in their published layouts, without remote code.

Every name and shape is checked before the first weight is read, and weights are moved one tensor at a time, so
that memory holds one copy of the model and one tensor.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from d3llm_ray.errors import InputError, unknown
from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.families import Family, read_family
from d3llm_ray.models.folder import check_file, no_weights, not_a_checkpoint
from d3llm_ray.models.transformer import Transformer
from d3llm_ray.paths import expanded, not_uploaded
from d3llm_ray.report import destination, partial_name

ZOO = Path(__file__).parent / "zoo"
ZOO_NAMES = (
    *("tiny-llada", "tiny-dream", "tiny-ar"),
    *("tiny-llada-d3llm", "tiny-llada-dparallel", "tiny-llada-d2f", "tiny-fast-dllm-v2"),  # distilled from these
)
DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
STORED_DTYPES = {  # as safetensors spells them; no quantised weights
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def resolve_model(name_or_path: str | Path) -> Path:
    """The checkpoint folder of a zoo name or a path; `InputError` when it is neither."""
    if str(name_or_path) in ZOO_NAMES:
        return ZOO / str(name_or_path)
    path = Path(expanded(name_or_path, "model"))
    if not (path / "config.json").is_file():
        accepted = [*ZOO_NAMES, f"a folder with config.json and *.safetensors{not_uploaded(path)}"]
        raise not_a_checkpoint(path) or unknown("model", str(name_or_path), accepted)
    return path


def _read_json(path: Path, required: bool) -> dict[str, Any]:
    check_file(path)
    if not path.is_file() and not required:
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}; accepted: a JSON object")
    return content


def read_configs(name_or_path: str | Path) -> tuple[ModelConfig, Family]:
    """Shape and conventions of a checkpoint, from its JSON files alone: cheap enough to validate requests with."""
    path = resolve_model(name_or_path)
    generation = _read_json(path / "generation_config.json", required=False)
    return read_family(_read_json(path / "config.json", required=True), generation)


def fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a checkpoint's files: a model trained again under the same path is another model."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file() or index.is_symlink():
        weight_map = _read_json(index, required=True).get("weight_map", {})
        files = [path / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise no_weights(path)
    for file in files:
        check_file(file)
        if not file.is_file():
            raise InputError(
                f"model: shard {file.name} named in {index.name} is missing from {path}{not_uploaded(path)}"
            )
    return files


def _headers(shards: list[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and types of all tensors by name. `InputError` for a name that two files have: which holds is unknown."""
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, str] = {}
    homes: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                if key in homes:
                    where = f"{homes[key]} and {shard.name} of {shard.parent}"
                    raise InputError(f"model: tensor {key} is in both {where}; accepted: every tensor once")
                homes[key], part = shard.name, file.get_slice(key)
                shapes[key], stored[key] = tuple(part.get_shape()), part.get_dtype()
    return shapes, stored


def _common_dtype(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, str]) -> torch.dtype:
    """The type of most weights; a transformer computes in a single one."""
    counts = Counter[str]()
    for name, shape in shapes.items():
        counts[stored[name]] += math.prod(shape)
    ((kind, _),) = counts.most_common(1)
    return STORED_DTYPES[kind]


def _check(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for problem, names in (
        ("missing", expected.keys() - shapes.keys()),
        ("unexpected", shapes.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(f"model: {problem} tensor in {path}: {listed}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InputError(f"model: tensor {name} in {path} has shape {list(shapes[name])}; accepted: {list(shape)}")


def load_model(
    name_or_path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu"
) -> tuple[Transformer, Family]:
    """Load a zoo model or a checkpoint folder (LLaDA, Dream, Qwen2 or Llama layout).

    `dtype`: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own: where its tensors differ (norms in
    float32), the one that most weights have. Raises `InputError` for an unknown name, an unsupported config, and a
    missing, unexpected or mis-shaped tensor, naming it.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    path = resolve_model(name_or_path)
    config, family = read_configs(path)
    with torch.device("meta"):
        model = Transformer(config)
    parameters = dict(model.named_parameters())  # a tied LM head appears once, as the embedding
    names = {family.layout.checkpoint_name(name): name for name in parameters}
    expected = {checkpoint: tuple(parameters[name].shape) for checkpoint, name in names.items()}
    tied_head = family.layout.checkpoint_name("lm_head.weight") if config.tie_word_embeddings else None
    shards = _shards(path)
    try:
        shapes, stored = _headers(shards)
        if tied_head is not None:
            shapes.pop(tied_head, None)
        _check(shapes, expected, path)
        for name, kind in stored.items():
            if kind not in STORED_DTYPES:
                raise InputError(
                    f"model: tensor {name} in {path} is stored as {kind}; accepted: {', '.join(STORED_DTYPES)}"
                )
        precision = DTYPES[dtype] or _common_dtype(shapes, stored)
        for shard in shards:
            with safe_open(shard, framework="pt", device=str(device)) as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                    if key in names:
                        _assign(model, names[key], file.get_tensor(key).to(precision))
    except SafetensorError as error:
        raise InputError(f"model: {path} holds an unreadable safetensors file: {error}") from error
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval(), family


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=True))


def save_model(model: Transformer, family: Family, directory: str | Path) -> Path:
    """Write `config.json`, `generation_config.json` and (sharded) safetensors in the family's own layout.

    Files appear under their final names only when complete; weights of an earlier checkpoint in `directory` go.
    `InputError` where other weights are there, which would be read as this model's.
    """
    directory = destination(directory, "directory", folder=True)
    foreign = [file.name for file in directory.glob("*.safetensors*") if not WEIGHTS.fullmatch(file.name)]
    if foreign:
        accepted = "a folder without other weights"
        raise InputError(f"directory: {str(directory)!r} holds {', '.join(sorted(foreign))}; accepted: {accepted}")
    partial = partial_name(directory)
    partial.mkdir(parents=True)
    try:
        _write_checkpoint(model, family, partial)
        _move_checkpoint(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _write_checkpoint(model: Transformer, family: Family, folder: Path) -> None:
    tensors = {
        family.layout.checkpoint_name(name): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
    }
    save_torch_state_dict(tensors, folder, max_shard_size="5GB")
    if family.generation_config:
        (folder / "generation_config.json").write_text(json.dumps(family.generation_config, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(family.config, indent=2) + "\n")
    for file in folder.iterdir():  # safetensors writes files that only their owner may read
        shutil.copymode(folder / "config.json", file)


def _move_checkpoint(partial: Path, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("*.safetensors*"):
        stale.unlink()
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # config.json last
        file.replace(directory / file.name)


def copy_tokenizer(source: str | Path, directory: str | Path) -> None:
    """Copy a checkpoint's tokenizer files, where it has any."""
    for name in TOKENIZER_FILES:
        file = resolve_model(source) / name
        if file.is_file():
            shutil.copyfile(file, Path(directory) / name)
