"""Switches of the decoding core that only a check turns: everything here patches modules, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import d3llm_ray.decoding.engine as engine_module
from d3llm_ray.decoding import Engine, static, statistics


@contextmanager
def switched(*, triton: bool = True, capture: bool = True) -> Iterator[None]:
    """Engines that are made and run in the block go without the Triton kernel, or replay static shapes without graphs.

    Whether they run static shapes at all is what `Engine(cuda_graphs=...)` says.
    """
    with ExitStack() as patches:
        if not triton:
            for module in (statistics, static):
                patches.enter_context(mock.patch.object(module, "fused_score", lambda _device_type: None))
        if not capture:
            runner = partial(static.StaticRunner, capture=False)
            patches.enter_context(mock.patch.object(engine_module, "StaticRunner", runner))
        yield


def static_shapes(engine: Engine) -> int:
    """Shapes that the engine has run padded so far; 0 where none was, or where a capture has failed."""
    runner = engine._runner
    return 0 if runner is None or runner._failed else len(runner._runs)
