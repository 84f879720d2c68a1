"""How good a student is while it trains: its loss on held-out rows, and accuracy and TPF of what it decodes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from d3llm_ray.decoding import Decoder, DiffusionLLM, read_decoder
from d3llm_ray.decoding.engine import Engine
from d3llm_ray.distillation.lora import transformer_of
from d3llm_ray.distillation.objectives import LossModule
from d3llm_ray.distillation.objectives.batches import MicroBatch
from d3llm_ray.distillation.settings import DistillSettings, SelectBy
from d3llm_ray.distillation.training.engines import TrainingEngine
from d3llm_ray.distillation.training.loop import Line, attention_kernel, barrier
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import Family, load_tokenizer
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import Task, load_task
from d3llm_ray.tasks.task import Message

logger = logging.getLogger("d3llm_ray.distillation")

BEST, SCORE_FILE = "best", "validation.json"


class Validator:
    """Validates the student in place, on all workers for the loss and on the first one for decoding."""

    def __init__(
        self,
        settings: DistillSettings,
        module: LossModule,
        family: Family,
        engine: TrainingEngine,
        held_out: list[MicroBatch],
        write: Callable[[Path], None],
        work: Path,
        device: torch.device,
    ) -> None:
        """`held_out`: this worker's packed share; `write(folder)` exports the student, called on the first worker."""
        self.settings, self.module, self.family, self.engine = settings, module, family, engine
        self._device = device
        self._held_out, self._write, self._best = held_out, write, work / BEST
        self._task = load_task(settings.val_task) if settings.val_task else None

    def __call__(self, step: int) -> Line:
        """Figures after `step` steps, named `val_...`; the best student so far is kept in the work folder."""
        self.module.eval()
        try:
            with self.engine.whole(), torch.no_grad():
                line = self._loss() if self.settings.val_rows else {}
                if self.engine.rank == 0:
                    if self._task is not None:
                        line |= self._decode()
                    self._keep_if_best(step, line)
        finally:
            self.module.train()
        barrier(self.engine)
        return line

    def _loss(self) -> Line:
        device = self._device
        sums = torch.zeros(2, device=device)
        with attention_kernel(device):
            for micro in self._held_out:
                loss, _ = self.module(self.module.batch(micro, device))
                sums += torch.stack((loss.float() * len(micro.prompt_ids), loss.new_tensor(len(micro.prompt_ids))))
        if self.engine.world_size > 1:
            dist.all_reduce(sums)
        return {"val_loss": float(sums[0] / sums[1])}

    def _decode(self) -> Line:
        """Accuracy (percent) and TPF of the student on the task's validation problems, by the engine.

        A problem without an answer (logits that are not finite, a prompt that is refused) counts as wrong; how many
        there are is `val_errors`, and a warning names the first.
        """
        assert self._task is not None
        settings = self.settings
        model = transformer_of(self.module.model)
        vocabulary = len(self._tokenizer) if self._tokenizer is not None else None
        engine = Engine(model, self.family, validation_decoder(settings), vocabulary_size=vocabulary, cuda_graphs=False)
        llm = DiffusionLLM(model, self.family, self._tokenizer, engine)
        prompts, references = zip(*self._problems, strict=True)
        quiet = Progress(quiet=True)
        outputs = llm.generate(prompts, max_tokens=settings.val_max_tokens, progress=quiet, errors="return")
        errors = [f"problem {place}: {output.error}" for place, output in enumerate(outputs, 1) if output.error]
        if errors:
            logger.warning(
                "validation: %d of %d without an answer, the first: %s", len(errors), len(outputs), errors[0]
            )
        right = sum(
            output.error is None and self._task.is_correct(output.text, known)
            for output, known in zip(outputs, references, strict=True)
        )
        tokens, forwards = sum(len(output.token_ids) for output in outputs), sum(output.forwards for output in outputs)
        tpf = tokens / forwards if forwards else 0.0
        return {"val_accuracy": 100.0 * right / len(outputs), "val_errors": len(errors), "val_tpf": tpf}

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        return load_tokenizer(self.settings.teacher, self.family)

    @cached_property
    def _problems(self) -> list[tuple[list[Message], str]]:
        assert self._task is not None
        return validation_problems(self._task, self.settings.val_count)

    def _keep_if_best(self, step: int, line: Line) -> None:
        reached = score(line, self.settings.select_by)
        known = self._best / SCORE_FILE
        if known.is_file():
            held = json.loads(known.read_text())
            # A resumed run meets its own earlier validations again, with the same figures.
            if reached <= score(held, self.settings.select_by):
                return
        partial = self._best.with_name(f"{BEST}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self._write(partial)
        (partial / SCORE_FILE).write_text(json.dumps({"step": step, **line}, indent=2) + "\n")
        shutil.rmtree(self._best, ignore_errors=True)
        partial.rename(self._best)


def validation_decoder(settings: DistillSettings) -> Decoder:
    """What the student decodes with; `InputError` for a preset, file or setting that is not known."""
    return read_decoder(settings.val_decoder, **settings.val_decoder_settings)


def validation_problems(task: Task, count: int) -> list[tuple[list[Message], str]]:
    """Messages and reference of `count` validation problems; `InputError` where a reference is missing."""
    task.check_judge()
    problems = []
    for problem in task.problems("validation", count):
        if problem.reference is None:
            raise InputError(f"val_task: problem {problem.id} has no reference; accepted: a task with expected answers")
        problems.append((problem.messages, problem.reference))
    require(bool(problems), "val_task", task.name, "a task with validation problems")
    return problems


def score(line: Line, by: SelectBy) -> float:
    """What makes a student the best one: the larger, the better."""
    if by == "loss":
        return -float(line["val_loss"])
    accuracy = float(line["val_accuracy"])
    return accuracy if by == "accuracy" else accuracy * float(line["val_tpf"])
