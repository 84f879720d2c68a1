"""The verb `generate`: answer prompts offline, one JSON line each."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from d3llm_ray.config import DecoderSettings, DecodingOptions, to_yaml
from d3llm_ray.decoding import DiffusionLLM, choose_decoder
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import read_configs
from d3llm_ray.output_folder import is_written
from d3llm_ray.progress import Progress
from d3llm_ray.report import check_output, write_text
from d3llm_ray.tasks import read_problems


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
    """The answer to `prompt`, or the path of the answers to `prompts`. `InputError` before the model loads."""
    if (settings.prompt is None) == (settings.prompts is None):
        raise InputError("prompt: accepted: exactly one of --prompt TEXT and --prompts FILE")
    chosen = choose_decoder(settings.decoder, read_configs(settings.model)[1], **settings.decoder_settings)
    problems = read_problems(settings.prompts) if settings.prompts else []
    if settings.prompts is not None:
        _check_output(settings, settings.prompts)
    llm = DiffusionLLM.from_pretrained(
        settings.model, chosen, settings.dtype, settings.device, max_batch_size=settings.max_batch_size
    )
    options: dict[str, Any] = {
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    if settings.prompt is not None:
        return llm.generate([settings.prompt], **options)[0].text
    progress = progress or Progress()
    with progress.stage("generate", len(problems), "prompt"):
        outputs = llm.generate([problem.messages for problem in problems], progress=progress, **options)
    answers = [{"id": problem.id, **asdict(output)} for problem, output in zip(problems, outputs, strict=True)]
    for file in (settings.output, settings_file(settings.output)):
        check_output(file, "output").parent.mkdir(parents=True, exist_ok=True)
    write_text(settings.output, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    write_text(settings_file(settings.output), to_yaml(settings))
    return str(settings.output)


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
