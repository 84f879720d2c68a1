"""Fixtures of the distillation tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distillation.rows import write_rows


@pytest.fixture(scope="session")
def write_trajectories() -> Callable[..., Path]:
    """`write_trajectories(folder, rows=, canvas=, vocab_size=, mask_token_id=) -> folder`."""
    return write_rows
