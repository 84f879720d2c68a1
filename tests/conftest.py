"""Fixtures shared by all rooms: golden data, a small random checkpoint, one Ray cluster a session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read by Ray when it starts; tests may not depend on a developer's own cluster.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
    RAY_worker_niceness="0",  # of 15, they would starve beside the other half of `make test`
    RAY_DEDUP_LOGS="0",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background: programs that tests start inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("D3LLM_RAY_API_KEYS", None)
torch.set_num_threads(1)

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Published answers and checkpoints; they are kept outside the repository."""
    if not GOLDEN.is_dir():
        pytest.skip("golden data are not here (../shared/golden)")
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaDA-layout checkpoint with the embedded task's tokenizer: 2 layers, hidden size 32."""
    from d3llm_ray.models import Transformer, save_model
    from d3llm_ray.models.families import read_family
    from d3llm_ray.tasks.arith import vocabulary_texts
    from d3llm_ray.tasks.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-random"
    tokenizer = build_tokenizer(vocabulary_texts())
    config = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": 32,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "mlp_hidden_size": 64,
        "vocab_size": len(tokenizer),
        "embedding_size": len(tokenizer),
        "max_sequence_length": 256,
        "rope": True,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape, family = read_family(config, {"block_size": 16})
    torch.manual_seed(0)
    model = Transformer(shape)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    save_model(model, family, folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One embedded Ray for the whole session: 8 logical CPUs, no dashboard."""
    import ray

    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    yield
    ray.shutdown()
