"""Settings of the verb `check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from d3llm_ray.checks.figures import FEWEST_ROUNDS
from d3llm_ray.evaluation.settings import MeasureOptions


class CheckSettings(MeasureOptions):
    """Ask one of the paper's claims again: `d3llm-ray check blocks`."""

    verb: ClassVar[str] = "check"
    positional: ClassVar[tuple[str, ...]] = ("check",)

    check: Literal["thresholds", "blocks", "early-stop", "cache", "refresh"] = Field(
        description="which one, see docs/checks.md"
    )
    model: str | None = Field(None, description="zoo name or checkpoint folder; null: the check's own")
    task: str | None = Field(None, description="embedded or published task, or task file; null: the check's own")
    split: Literal["test", "validation"] = Field("test", description="which problems")
    count: int = Field(200, gt=0, description="problems")
    rounds: int = Field(
        FEWEST_ROUNDS,
        gt=1,
        description="times that every decoder is timed, by turns, with the same tokens each time; of fewer than "
        f"{FEWEST_ROUNDS} no speed is said to differ",
    )
    output: Path = Field(Path("runs/checks"), description="folder of the report; default: runs/checks/CHECK")

    @model_validator(mode="before")
    @classmethod
    def _folder_of_its_own(cls, values: Any) -> Any:
        if isinstance(values, dict) and "check" in values and "output" not in values:
            return {**values, "output": f"runs/checks/{values['check']}"}
        return values
