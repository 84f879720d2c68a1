"""One full forward without a cache, with classifier-free guidance (algorithms.md 3.1, step 3)."""

from __future__ import annotations

from .canvas import Canvas
from .network import Network, Rows


def full_forward(network: Network, canvas: Canvas, cfg_scale: float) -> Rows:
    """Compute the whole canvas. With guidance a second sequence hides the prompt; both count as one forward."""
    canvas.forwards += 1
    conditional = network.forward(canvas.ids, 0, canvas.length, network.store())
    if cfg_scale == 0:
        return conditional
    mask_id = canvas.conventions.mask_id
    assert mask_id is not None
    hidden = [mask_id] * canvas.prompt + canvas.ids[canvas.prompt :]
    unconditional = network.forward(hidden, 0, canvas.length, network.store())
    return {p: unconditional[p] + (cfg_scale + 1) * (conditional[p] - unconditional[p]) for p in conditional}
