"""What a checkpoint folder is, said in words where it is not one that can be loaded."""

from __future__ import annotations

from pathlib import Path

from d3llm_ray.errors import InputError
from d3llm_ray.paths import not_uploaded

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt")


def check_file(file: Path, field: str = "model") -> None:
    """Raise `InputError` for a file of a checkpoint or dataset that is no more than a stand-in for it, or is empty."""
    if file.is_symlink() and not file.exists():
        where = f"{file} is a broken symbolic link to {file.readlink()}"
        raise InputError(f"{field}: {where}; accepted: the whole download, blobs included")
    if not file.is_file():
        return
    with file.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        how = f"`git lfs pull`, or download {file.name} itself"
        raise InputError(f"{field}: {file} is a Git LFS pointer, not the file: fetch the file ({how})")
    if not start:
        raise InputError(f"{field}: {file} is empty; accepted: the whole file")


def not_a_checkpoint(path: Path) -> InputError | None:
    """The error for a path that is something else than a checkpoint folder; None where it is nothing that we know."""
    if path.is_symlink() and not path.exists():
        return InputError(f"model: {path} is a broken symbolic link to {path.readlink()}")
    if path.is_file():
        return InputError(f"model: {path} is a file; accepted: the folder with config.json that it belongs to")
    check_file(path / "config.json")
    if (path / "adapter_config.json").is_file():
        return InputError(
            f"model: {path} is a LoRA adapter without its base model; accepted: a whole model, "
            "which peft's merge_and_unload makes of the two"
        )
    snapshots = sorted(config.parent for config in path.glob("snapshots/*/config.json"))
    snapshots += sorted(config.parent for config in path.glob("models--*/snapshots/*/config.json"))
    if snapshots:
        named = ", ".join(str(snapshot) for snapshot in snapshots[:3])
        return InputError(
            f"model: {path} is a cache of the Hugging Face Hub; accepted: a snapshot in it, such as {named}"
        )
    if path.is_dir():
        files = "is empty" if not any(path.iterdir()) else "has no config.json"
        accepted = f"a folder with config.json and *.safetensors{not_uploaded(path)}"
        return InputError(f"model: the folder {path} {files}; accepted: {accepted}")
    return None


def no_weights(path: Path) -> InputError:
    """The error for a folder without safetensors."""
    others = sorted(file.name for pattern in OTHER_WEIGHTS for file in path.glob(pattern))
    if others:
        return InputError(
            f"model: {path} has its weights in {others[0]}; accepted: safetensors "
            "(save_pretrained of transformers writes them)"
        )
    return InputError(f"model: no *.safetensors file in {path}; accepted: safetensors weights only{not_uploaded(path)}")
