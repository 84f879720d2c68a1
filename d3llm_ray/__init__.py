"""Fast diffusion language models: decode, distil, tune and serve them, on one machine or a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d3llm_ray.decoding import DiffusionLLM
    from d3llm_ray.models import load_model

__version__ = "0.1.0"
__all__ = ["DiffusionLLM", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import: `d3llm-ray --help` and bad input should not wait for it.
    if name == "DiffusionLLM":
        from d3llm_ray.decoding import DiffusionLLM

        return DiffusionLLM
    if name == "load_model":
        from d3llm_ray.models import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
