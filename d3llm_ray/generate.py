"""The verb `generate`: answer prompts offline, one JSON line each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from d3llm_ray.config import DecoderSettings, DecodingOptions, to_yaml
from d3llm_ray.decoding import DiffusionLLM, Output, choose_decoder
from d3llm_ray.errors import IncompleteError, InputError, first_failures, require
from d3llm_ray.models import read_configs
from d3llm_ray.output_folder import is_written, writing
from d3llm_ray.progress import Progress
from d3llm_ray.report import check_output, destination, json_line, write_text
from d3llm_ray.tasks import Problem, read_problems


class GenerateSettings(DecodingOptions):
    """Answer prompts offline. Prints the text of `--prompt`, or writes a JSON line for every row of `--prompts`."""

    verb: ClassVar[str] = "generate"

    model: str = Field("tiny-llada", description="zoo name or checkpoint folder")
    prompt: str | None = Field(None, description="one prompt; its answer is printed")
    prompts: Path | None = Field(None, description=".jsonl or .parquet file with messages or prompt")
    output: Path = Field(
        Path("runs/generate.jsonl"), description="file for the answers to `prompts`; the resolved settings go beside it"
    )
    decoder: str | None = Field(
        None, description="preset or decoding settings file (.yaml); null: the one for the model's family"
    )
    decoder_settings: DecoderSettings = Field({}, description="settings that override the decoder's")


def run(settings: GenerateSettings, progress: Progress | None = None) -> str:
    """The answer to `prompt`, or the path of the answers to `prompts`.

    A line of that file has the row's own `id` where it has one; a prompt that could not be answered has a line with
    `id` and `error`, the reason.

    Raises:
        InputError: bad settings or files; before the model loads.
        DecodingError: `prompt` could not be decoded.
        IncompleteError: some of `prompts` could not be answered; the file with all others is written.
    """
    if (settings.prompt is None) == (settings.prompts is None):
        raise InputError("prompt: accepted: exactly one of --prompt TEXT and --prompts FILE")
    with nullcontext() if settings.prompts is None else writing(settings.output):
        return _answer(settings, progress)


def _answer(settings: GenerateSettings, progress: Progress | None) -> str:
    chosen = choose_decoder(settings.decoder, read_configs(settings.model)[1], **settings.decoder_settings)
    problems = read_problems(settings.prompts) if settings.prompts else []
    _check_ids(problems)
    if settings.prompts is not None:
        _check_output(settings, settings.prompts)
    llm = DiffusionLLM.from_pretrained(
        settings.model, chosen, settings.dtype, settings.device, max_batch_size=settings.max_batch_size
    )
    options: dict[str, Any] = {
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
    }
    if settings.prompt is not None:
        return llm.generate([settings.prompt], **options)[0].text
    progress = progress or Progress()
    with progress.stage("generate", len(problems), "prompt"):
        outputs = llm.generate(
            [problem.messages for problem in problems], progress=progress, errors="return", **options
        )
    lines = [_line(problem, output) for problem, output in zip(problems, outputs, strict=True)]
    for file in (settings.output, settings_file(settings.output)):
        destination(file, "output").parent.mkdir(parents=True, exist_ok=True)
    write_text(settings.output, "".join(line + "\n" for line in lines))
    write_text(settings_file(settings.output), to_yaml(settings))
    failed = [f"row {row}: {output.error}" for row, output in enumerate(outputs, start=1) if output.error is not None]
    if failed:
        raise IncompleteError(
            f"prompts: {len(failed)} of {len(outputs)} not answered, the others are in {settings.output}: "
            f"{first_failures(failed)}"
        )
    return str(settings.output)


def _check_ids(problems: Sequence[Problem]) -> None:
    rows: dict[Any, int] = {}
    for row, problem in enumerate(problems, start=1):
        if problem.user_id is not None and rows.setdefault(problem.user_id, row) != row:
            raise InputError(
                f"prompts: rows {rows[problem.user_id]} and {row} have the id {problem.user_id!r}; "
                "accepted: an id of its own for each row, or none"
            )


def _line(problem: Problem, output: Output) -> str:
    named = {"id": problem.id if problem.user_id is None else problem.user_id}
    values = asdict(output)
    if values.pop("error") is not None:
        values = {"error": output.error}
    return json_line(named | values)


def settings_file(output: Path) -> Path:
    """Where the resolved settings of these answers are."""
    return output.with_name(f"{output.name}.settings.yaml")


def _check_output(settings: GenerateSettings, prompts: Path) -> None:
    """`InputError` where answers or settings would replace something that is not an earlier run's."""
    output, beside = settings.output, settings_file(settings.output)
    accepted = "a name that is free, or the answers of an earlier run"
    real = check_output(output, "output")
    require(real != prompts.resolve(), "output", str(output), f"{accepted}; this is the file of prompts")
    require(_is_answers(real), "output", str(output), f"{accepted}; this file holds something else")
    ours = not check_output(beside, "output").exists() or is_written(beside, GenerateSettings)
    require(ours, "output", str(output), f"{accepted}; {str(beside)!r} would be overwritten, which no run has written")


def _is_answers(file: Path) -> bool:
    """Whether a file is absent, empty, or begins as the answers that `run` writes."""
    if not file.exists() or file.stat().st_size == 0:
        return True
    try:
        with file.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
    except ValueError:
        return False
    return isinstance(first, dict) and "id" in first and ("forwards" in first or "error" in first)
