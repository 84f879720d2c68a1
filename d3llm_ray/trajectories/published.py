"""One row of a published dataset as one of ours: no files, no state.

Two layouts are known. d3LLM's `trajectory_data_*` list the whole sequence, prompt included, after every step of a
decoding that reveals one token a step. dParallel's `*_Distill_Data` hold question and answer, without an order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from d3llm_ray.errors import InputError, require
from d3llm_ray.models import Family, encode_chat
from d3llm_ray.models.chat import Message, check_unicode, control_tokens, encode_text
from d3llm_ray.tasks import Task
from d3llm_ray.tasks.task import no_problems
from d3llm_ray.trajectories.prompts import prompt_id
from d3llm_ray.trajectories.schema import MAX_CANVAS

Form = Literal["raw", "templated", "other"]
Ids = NDArray[np.integer]
ResponseOf = Callable[[Mapping[str, Any]], str | None]

JUDGE = Task("published", no_problems)


@dataclass(frozen=True)
class Question:
    """A published question. Without text all is None, without a tokenizer all but the messages."""

    messages: list[Message] | None = None  # also None for a rendered chat of another form
    templated: list[int] | None = None  # what training and decoding see
    raw: list[int] | None = None  # the text as it stands, special tokens read as such: the published tokenisation

    def form(self, ids: list[int]) -> Form:
        """How published prompt ids relate to the question."""
        return "templated" if ids == self.templated else "raw" if ids == self.raw else "other"


class ChatTemplate:
    """The teacher's chat template, applied once: some published questions are rendered already."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        mark, bos = "\ue000", tokenizer.bos_token or ""
        chat = [{"role": "user", "content": mark}]
        try:
            rendered = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except Exception:  # of a template that minds what is said: rows are refused one by one
            rendered = mark
        before, _, self._after = (part.strip() for part in rendered.partition(mark))
        # Some renderings leave the start-of-text token to the tokenizer.
        self._befores = (before, before.removeprefix(bos)) if before and self._after else ()

    def encode(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text, control=True)

    def apply(self, question: str) -> Question:
        content = self._unwrap(question)
        raw = self.encode(question)
        if content is None:
            return Question(templated=raw, raw=raw)
        messages = [{"role": "user", "content": content}]
        return Question(messages, encode_chat(self._tokenizer, messages), raw)

    def _unwrap(self, question: str) -> str | None:
        """The user's words, whether `question` is rendered or not; None where it is rendered in another way."""
        text = question.strip()
        opened = [before for before in self._befores if text.startswith(before)]
        closed = bool(self._befores) and text.endswith(self._after)
        if not opened and not closed:
            return question
        content = text[len(opened[0]) : -len(self._after)].strip() if opened and closed else None
        # A chat of several turns has control tokens inside.
        several = content is None or any(token in content for token in control_tokens(self._tokenizer))
        return None if several else content


@dataclass(frozen=True)
class PublishedTeacher:
    """What all rows of an import share."""

    family: Family
    mask_token_id: int
    vocab_size: int
    template: ChatTemplate | None  # None: no tokenizer beside the checkpoint
    generation: Mapping[str, Any]  # part of every `prompt_id`
    retemplate: bool

    def question(self, text: str | None) -> Question:
        require(text is None or isinstance(text, str), "question", text, "text")
        require(bool(text) or not self.retemplate, "question", text, "text (or retemplate: false)")
        if self.template is not None and text:
            return self.template.apply(text)
        return Question([{"role": "user", "content": text}] if text else None)

    def response(self, text: str) -> tuple[list[int], int]:
        """(Ids before the stop token, stop token) of a published response: the one that it has or, as in the
        published training, EOS."""
        assert self.template is not None, "text needs a tokenizer"
        ids = [*self.template.encode(text), self.family.eos_token_id]
        end = next(i for i, token in enumerate(ids) if token in self.family.stop_token_ids)
        require(self.mask_token_id not in ids[:end], "llm_response", "a mask token", "an answer without one")
        return ids[:end], ids[end]


@dataclass(frozen=True)
class Imported:
    """A row of `schema.SCHEMA`, and what was found out about the prompt it was published with."""

    row: dict[str, Any]
    form: Form
    offset: int  # tokens by which the prompt has grown
    inferred: bool  # the prompt's end was read from the masks

    def matches(self, teacher: PublishedTeacher) -> bool:
        """Whether the teacher's answer is the training set's response, token by token."""
        answer = takewhile(lambda token: token not in teacher.family.stop_token_ids, self.row["response_ids"])
        return bool(list(answer) == self.row["reference_ids"])


def own_response(published: Mapping[str, Any]) -> Any:
    """The response that a row brings with it."""
    return published.get("llm_response")


def import_trajectory(published: Any, teacher: PublishedTeacher, response_of: ResponseOf = own_response) -> Imported:
    """One row of `trajectory` (whole sequences, steps x tokens), `question`, and optionally the other columns.

    `response_of` gives the training set's response to a row; where there is a tokenizer, its ids are kept.

    Our positions are relative to the response, so the templated prompt may replace the published one under them.
    Raises `InputError` for a row that is no order of reveals, see `infer_prompt` and `reveal_steps`, or contradicts
    its `final_output`.
    """
    _check_columns(published)
    entries, mask_id = _matrix(published.get("trajectory")), teacher.mask_token_id
    lowest, highest = int(entries.min()), int(entries.max())
    vocabulary = f"ids below the teacher's vocabulary of {teacher.vocab_size}"
    require(0 <= lowest <= highest < teacher.vocab_size, "trajectory", f"ids {lowest} to {highest}", vocabulary)
    final = published.get("final_output")
    require(final is None or np.array_equal(final, entries[-1]), "final_output", "another sequence", "the last step's")
    question, prompt_ids = teacher.question(published.get("question")), published.get("prompt_ids")
    fits = prompt_ids is not None and is_prompt(entries, prompt_ids, mask_id)
    length = len(prompt_ids) if fits else infer_prompt(entries, mask_id, question)
    prompt = entries[0, :length]
    require(bool((entries[:, :length] == prompt).all()), "trajectory", "a prompt token that changes", "one prompt")
    response_ids, steps = reveal_steps(entries[:, length:], mask_id)
    response = response_of(published)
    reference = _reference(published)
    row = {
        "response_ids": response_ids,
        "reveal_step": steps,
        "reference": reference,
        "answer": published.get("llm_answer"),
        # The published code calls an answer without a reference correct; here it is unjudged.
        "is_correct": published.get("is_correct") if reference is not None else None,
        "forwards": max(steps) + 1,
        "reference_ids": teacher.response(response)[0] if response and teacher.template is not None else None,
    }
    return _with_prompt(row, question, prompt.tolist(), teacher, inferred=not fits)


def import_answer(published: Any, teacher: PublishedTeacher, max_tokens: int) -> Imported:
    """One row of `question`, `llm_response` and optionally `gt_answer`: a canvas of `max_tokens`, no order.

    The response ends in its stop token, see `PublishedTeacher.response`; EOS fills the canvas. Raises `InputError` for
    missing text and for a response that is longer.
    """
    _check_columns(published)
    text, response = published.get("question"), published.get("llm_response")
    require(bool(text), "question", text, "text")
    require(isinstance(response, str) and response != "", "llm_response", response, "text")
    question, (ids, stop) = teacher.question(text), teacher.response(response)
    padding, accepted = max_tokens - len(ids) - 1, f"at most {max_tokens} (max_tokens)"
    require(padding >= 0, "llm_response", f"{len(ids) + 1} tokens, stop token included", accepted)
    reference = _reference(published)
    row = {
        "response_ids": [*ids, stop, *[teacher.family.eos_token_id] * padding],
        "reference": reference,
        "answer": JUDGE.extract(response),
        "is_correct": None if reference is None else JUDGE.is_correct(response, reference),
        "reference_ids": ids,
    }
    return _with_prompt(row, question, question.raw or [], teacher, inferred=False)


def is_prompt(entries: Ids, prompt_ids: Sequence[int], mask_id: int) -> bool:
    """Whether every step of `entries` [steps, tokens] begins with `prompt_ids`, and the response behind them.

    Where every later step reveals one token, a first one that reveals more holds the rest of the prompt.
    """
    length = len(prompt_ids)
    if not 0 < length < entries.shape[1] or mask_id in prompt_ids:
        return False
    if not (entries[:, :length] == np.asarray(prompt_ids)).all():
        return False
    first = int((entries[0, length:] != mask_id).sum())
    return first <= 1 or not _one_a_step(entries, mask_id)


def infer_prompt(entries: Ids, mask_id: int, question: Question) -> int:
    """Length of the prompt in `entries` [steps, tokens], from the masks of the first: one token is revealed there.

    Is it behind the first mask, the prompt ends at that mask. Is none behind it, the revealed token is the one before
    the mask, or there is none yet; then the prompt is the one that the question gives. Raises `InputError` where that
    does not tell.
    """
    masked = entries[0] == mask_id
    first = int(masked.argmax())
    behind = int((~masked[first:]).sum())
    ends = [first]
    if behind == 0:
        candidates = (max(0, first - 1), first)
        ends = [end for end in candidates if question.form(entries[0, :end].tolist()) != "other"]
    clear = first > 0 and behind <= 1 and len(ends) == 1 and _one_a_step(entries, mask_id)
    accepted = "ids that every step begins with, or masks that tell where the response starts"
    require(clear, "prompt_ids", "none that fit the trajectory", accepted)
    return ends[0]


def reveal_steps(response: Ids, mask_id: int) -> tuple[list[int], list[int]]:
    """(final ids, 0-based step that revealed each) of a response [steps, canvas] as it stood after every step.

    A first entry that is all mask (the canvas before decoding) and repeats of the last one (a decoder that ran on
    with nothing left to reveal) are no steps and are dropped. A repeat in between is refused: a step of these
    decoders always reveals, so an entry was lost. Raises `InputError` naming what is wrong.
    """
    require(max(response.shape) <= MAX_CANVAS, "trajectory", response.shape, f"at most {MAX_CANVAS} steps and tokens")
    revealed = response != mask_id
    require(bool(revealed[-1].all()), "trajectory", "a position masked to the end", "a finished decoding")
    require(bool((revealed[1:] >= revealed[:-1]).all()), "trajectory", "a position masked again", "reveals that stay")
    stays = (response[1:] == response[:-1]) | ~revealed[:-1]
    require(bool(stays.all()), "trajectory", "a revealed token that changes", "reveals that stay")
    counts = revealed.sum(axis=1)
    counts = counts[: int(np.argmax(counts == response.shape[1])) + 1]
    require(bool((np.diff(counts) > 0).all()), "trajectory", "a step without a reveal", "a reveal in every step")
    return response[-1].tolist(), (revealed.argmax(axis=0) - int(counts[0] == 0)).tolist()


def _one_a_step(entries: Ids, mask_id: int) -> bool:
    """Whether every step but the first reveals one token, or none."""
    counts = (entries == mask_id).sum(axis=1)
    return len(entries) > 1 and bool(np.isin(counts[:-1] - counts[1:], (0, 1)).all())


def _with_prompt(
    row: dict[str, Any], question: Question, published_ids: list[int], teacher: PublishedTeacher, *, inferred: bool
) -> Imported:
    """Complete `row` with its prompt: the templated question, or the published ids."""
    prompt_ids = published_ids
    if teacher.retemplate and question.templated is not None:
        prompt_ids = question.templated
    prompt = {
        "prompt_id": prompt_id(question.messages or prompt_ids, teacher.generation),
        "messages": question.messages,
        "prompt_ids": prompt_ids,
    }
    return Imported(prompt | row, question.form(published_ids), len(prompt_ids) - len(published_ids), inferred)


def _check_columns(published: Any) -> None:
    """Refuse a row that is no mapping, and values of the optional columns that our row cannot hold."""
    if not isinstance(published, Mapping):
        raise InputError(f"row: got {str(published)[:80]}; accepted: a JSON object")
    for name in ("question", "llm_response", "gt_answer", "llm_answer"):
        check_unicode(str(published.get(name)), name)
    for name, kinds, accepted in (
        ("prompt_ids", (list, np.ndarray), "token ids"),
        ("gt_answer", (str, int, float), "text or a number"),
        ("llm_response", str, "text"),
        ("llm_answer", str, "text"),
        ("is_correct", bool, "true or false"),
    ):
        value = published.get(name)
        require(value is None or isinstance(value, kinds), name, value, accepted)


def _reference(published: Mapping[str, Any]) -> str | None:
    """`gt_answer`; an empty one is none."""
    reference = published.get("gt_answer")
    return None if reference is None else str(reference).strip() or None


def _matrix(trajectory: Any) -> Ids:
    """The sequences as [steps, tokens]."""
    lists = (list, np.ndarray)
    listed = isinstance(trajectory, lists) and all(isinstance(entry, lists) for entry in trajectory)
    require(listed and len(trajectory) > 0, "trajectory", "no steps", "a list of token ids after every step")
    lengths = sorted({len(entry) for entry in trajectory})
    require(len(lengths) == 1 and lengths[0] > 1, "trajectory", f"sequences of {lengths} tokens", "prompt and response")
    entries = np.asarray(trajectory)
    require(entries.dtype.kind in "iu" and entries.ndim == 2, "trajectory", "other values", "whole numbers")
    return entries
