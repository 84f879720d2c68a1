"""What a model is asked: a problem's prompt, and the first one of a task as the model reads it, for people to see.

A wrong template is the commonest mistake of a comparison, and no figure shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from d3llm_ray.decoding import Prompt, WholePrompt
from d3llm_ray.decoding.api import encode_prompt
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.kept import readable
from d3llm_ray.models import load_tokenizer, read_configs
from d3llm_ray.progress import Progress
from d3llm_ray.report import digest, write_text
from d3llm_ray.tasks import Problem


def prompt_of(problem: Problem) -> Prompt:
    """The prompt that `generate` takes for a problem: by the chat template or as it is, with the answer's beginning."""
    if problem.text is None and not problem.prefix:
        return problem.messages
    return WholePrompt(problem.messages if problem.text is None else problem.text, problem.prefix)


def rendered(tokenizer: PreTrainedTokenizerBase | None, prompt_ids: Sequence[int]) -> str | None:
    """The text of a prompt's token ids, special tokens by their names; None without a tokenizer or a prompt."""
    if tokenizer is None or not prompt_ids:
        return None
    return str(tokenizer.decode(list(prompt_ids), clean_up_tokenization_spaces=False))


def first_prompt(model: str, problem: Problem) -> str:
    """A problem's prompt as a model in a folder reads it; why it cannot be read where that is so."""
    try:
        tokenizer = load_tokenizer(model, read_configs(model)[1])
        return rendered(tokenizer, encode_prompt(tokenizer, prompt_of(problem))) or ""
    except InputError as error:  # this problem's; another may be answered
        return f"(refused: {error})"


def show_prompt(output: Path, models: Sequence[str], task: str, text: str, progress: Progress) -> None:
    """Say what the first problem of a task looks like to these models, and keep it in `prompts/`, a file for each."""
    folder = output / "prompts"
    folder.mkdir(exist_ok=True)
    for model in models:
        write_text(folder / f"{readable(f'{model}-{task}')}-{digest([model, task])}.txt", text)
    progress.note(f"the first prompt of {task} for {', '.join(models)}, as the model reads it:\n{text}")
