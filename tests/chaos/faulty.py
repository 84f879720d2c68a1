"""A replica whose engine fails when a test says so: its step raises, or does not end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from d3llm_ray.serving.app import DEPLOYMENT, DecoderReplica, _deployment
from d3llm_ray.serving.settings import ReplicaSettings

HANG_S = 120.0
STEP_S = 0.02  # that a forward takes longer: answers are under way when the fault comes


class FaultyReplica(DecoderReplica):
    """Fails once the folder `faults` has a file `raises` or `hangs`, and puts `happened` in its place.

    The latter holds the moment of the fault (`time.time`). The replica that comes after this one is sound.
    """

    async def __init__(self, settings: ReplicaSettings, faults: Path) -> None:  # type: ignore[misc]  # Serve awaits it
        await super().__init__(settings)
        engine: Any = self._service.llm.engine
        sound = engine.step

        def step() -> Any:
            time.sleep(STEP_S)
            for fault in ("raises", "hangs"):
                if (faults / fault).exists():
                    (faults / "written").write_text(repr(time.time()))
                    (faults / "written").rename(faults / "happened")
                    (faults / fault).unlink()
                    time.sleep(HANG_S if fault == "hangs" else 0)
                    raise RuntimeError("secret detail")
            return sound()

        engine.step = step


def faulty(settings: ReplicaSettings, faults: Path) -> Application:
    """As `app.application`, of one such replica."""
    model = settings.replica().checked()
    return _deployment(serve.ingress()(FaultyReplica), DEPLOYMENT, model, {}).bind(model, faults)
