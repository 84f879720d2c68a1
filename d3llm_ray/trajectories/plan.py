"""What a run will do, worked out and checked before Ray starts or a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from d3llm_ray import __version__
from d3llm_ray.decoding.rules import family_rules
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import ZOO_NAMES, read_configs, resolve_model
from d3llm_ray.tasks import Task
from d3llm_ray.trajectories.prompts import Prompt, distinct_prompts, read_prompts
from d3llm_ray.trajectories.schema import MESSAGES
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.storage import Location

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("messages", MESSAGES),
        pa.field("reference", pa.string()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """A checked run. `staging` holds what is half done: prompts, finished parts, and Ray Data's checkpoint."""

    settings: TrajectorySettings
    task: Task
    prompts: list[Prompt]
    duplicates: int  # prompts that came again in the source
    metadata: Mapping[str, Any]
    output: Location

    @property
    def staging(self) -> Location:
        return self.output / "_staging"

    @property
    def parts(self) -> Location:
        return self.staging / "parts"

    @property
    def checkpoint(self) -> Location:
        return self.staging / "checkpoint"

    @property
    def staged_prompts(self) -> Location:
        return self.staging / "prompts.parquet"

    @property
    def actor_settings(self) -> TrajectorySettings:
        """The settings with a teacher that an actor finds from its own working directory."""
        name = self.settings.teacher
        return self.settings.model_copy(
            update={"teacher": name if name in ZOO_NAMES else str(resolve_model(name).resolve())}
        )

    def prompt_table(self) -> pa.Table:
        rows = [{"prompt_id": p.prompt_id, "messages": p.messages, "reference": p.reference} for p in self.prompts]
        return pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)

    def committed_ids(self) -> set[str]:
        """Ids of the rows that an interrupted run has finished; empty for a new run."""
        files = [file for file in self.checkpoint.files(".parquet") if not file.path.endswith(".pending.parquet")]
        if not files:
            return set()
        ids = pads.dataset([file.path for file in files], filesystem=self.output.filesystem, format="parquet")
        return set(ids.to_table(columns=["prompt_id"])["prompt_id"].to_pylist())


def make_plan(settings: TrajectorySettings) -> Plan:
    """Read prompts and the teacher's configuration. `InputError` for anything that could not be decoded at all."""
    config, family = read_configs(settings.teacher)
    require(family.mask_token_id is not None, "teacher", settings.teacher, "a masked-diffusion model (llada, dream)")
    block_size = settings.block_size or family.block_size
    whole_blocks = f"a multiple of the block size {block_size}"
    require(settings.max_tokens % block_size == 0, "max_tokens", settings.max_tokens, whole_blocks)
    context = config.max_position_embeddings
    shorter = f"less than the teacher's context {context}"
    require(settings.max_tokens < context, "max_tokens", settings.max_tokens, shorter)
    problems, task = read_prompts(settings.texts or settings.prompts, settings.split, settings.count)
    generation = settings.generation(block_size, family_rules(family).remasking == "entropy")
    prompts = distinct_prompts(problems, generation)
    metadata = {"family": family.name, "package": "d3llm-ray", "version": __version__, **generation}
    output = Location.of(settings.output, "output")
    return Plan(settings, task, prompts, len(problems) - len(prompts), metadata, output)


def check_resumable(plan: Plan) -> int:
    """The number of rows already staged; `InputError` when they belong to other settings or prompts."""
    done = plan.committed_ids()
    if not done <= {prompt.prompt_id for prompt in plan.prompts}:
        raise InputError(
            f"output: {plan.settings.output!r} holds a half-finished run of other prompts or settings; accepted: "
            "the settings.yaml beside it, or another folder"
        )
    return len(done)
