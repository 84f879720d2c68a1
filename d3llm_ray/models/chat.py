"""Text to token ids: tokenizer files and chat format, with no way for a message to forge control tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from d3llm_ray.errors import InputError
from d3llm_ray.models.checkpoint import resolve_model
from d3llm_ray.models.families import Family

Message = dict[str, str]


def load_tokenizer(name_or_path: str | Path, family: Family) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored beside a checkpoint, or None: such a model serves token-id prompts only."""
    path = resolve_model(name_or_path)
    tokenizer: PreTrainedTokenizerBase
    if (path / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        tokenizer = Qwen2Tokenizer.from_pretrained(path)  # Dream ships Qwen2's two files
    else:
        return None
    if tokenizer.chat_template is None:
        tokenizer.chat_template = family.layout.chat_template
    return tokenizer


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, control: bool) -> list[int]:
    """Tokenise without adding anything; special-token text is read as such only when `control`."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"]
    return ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Apply the chat template, assistant header included, and tokenise.

    A message that spells out a special token is tokenised as plain text there, so that a user cannot end a
    turn or plant a mask token.
    """
    messages = [dict(message) for message in messages]
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(f"messages.{number}: accepted: an object with string fields 'role' and 'content'")
        _require_encodable(message["role"] + message["content"], f"messages.{number}")
    if not messages:
        raise InputError("messages: got an empty list; accepted: one or more messages")
    special = tokenizer.all_special_tokens
    if not any(token in message["content"] for message in messages for token in special):
        return encode_text(tokenizer, _render(tokenizer, messages), control=True)
    # Placeholders are unlikely in any text and free of special tokens; what stands between them is the template's.
    marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
    rendered = _render(tokenizer, [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
    ids: list[int] = []
    for message, mark in zip(messages, marks, strict=True):
        before, rendered = rendered.split(mark, 1)
        ids += encode_text(tokenizer, before, control=True)
        ids += encode_text(tokenizer, message["content"].strip(), control=False)
    return ids + encode_text(tokenizer, rendered, control=True)


def _require_encodable(text: str, field: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell (a cut emoji) and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise InputError(f"{field}: {half} is half a surrogate pair; accepted: text of whole characters") from error


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The template's text. `InputError` with the template's reason where it refuses the messages."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is the checkpoint's program: it may raise by intent, or fail in any way
        reason = " ".join(str(error).split())
        raise InputError(f"messages: the model's chat template refuses them: {reason}") from error
    assert isinstance(text, str)
    return text
