"""Text to token ids: tokenizer files and chat format, with no way for a message to forge control tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from d3llm_ray.errors import InputError, one_line
from d3llm_ray.models.checkpoint import TOKENIZER_FILES, resolve_model
from d3llm_ray.models.families import Family
from d3llm_ray.models.folder import check_file

Message = dict[str, str]
MARKUP = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")
PRIVATE = range(0xF0000, 0xFFFFE)  # code points of no meaning: what stands in for the first letter of a control token


def load_tokenizer(name_or_path: str | Path, family: Family) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored beside a checkpoint, or None: such a model serves token-id prompts only."""
    path = resolve_model(name_or_path)
    tokenizer: PreTrainedTokenizerBase
    for name in TOKENIZER_FILES:
        check_file(path / name)
    try:
        if (path / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            tokenizer = Qwen2Tokenizer.from_pretrained(path)  # Dream ships Qwen2's two files
        else:
            return None
    except Exception as error:  # the tokenizer's parser raises bare exceptions
        raise InputError(f"model: the tokenizer files of {path} are damaged: {one_line(error)}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = family.layout.chat_template
    return tokenizer


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every token that a message must not forge -> its id.

    The published tokenizers mark most of them as special in `tokenizer.json` alone, and `all_special_tokens` has
    those of `tokenizer_config.json`. Added markup that is not special (Qwen's `<tool_call>`, `<|fim_prefix|>`) is one
    too; other added tokens, such as runs of spaces, are text.
    """
    listed = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    added = [(token.content, number, token.special) for number, token in tokenizer.added_tokens_decoder.items()]
    chosen = ((token, number) for token, number, special in added if special or MARKUP.fullmatch(token))
    return {str(token): number for token, number in (*listed, *chosen) if str(token)}


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, control: bool) -> list[int]:
    """Tokenise without adding anything; the text of control tokens is read as such only when `control`."""
    pieces = [text]
    if not control:  # `split_special_tokens` leaves those whole that are not special
        whole = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
        cuts = [f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in whole if MARKUP.fullmatch(t)]
        pieces = re.split("|".join(cuts), text) if cuts else pieces
    encoded = (tokenizer(piece, add_special_tokens=False, split_special_tokens=not control) for piece in pieces)
    return [number for ids in encoded for number in ids["input_ids"]]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Apply the chat template, assistant header included, and tokenise.

    A message that spells out a control token is tokenised as plain text there, so that a user cannot end a turn or
    plant a mask token, whatever the template does with the message. `InputError` for messages that are not valid, or
    that the template refuses.
    """
    messages = [dict(message) for message in messages]
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(f"messages.{number}: accepted: an object with string fields 'role' and 'content'")
        check_unicode(message["role"] + message["content"], f"messages.{number}")
    if not messages:
        raise InputError("messages: got an empty list; accepted: one or more messages")
    control = control_tokens(tokenizer)
    shields = _Shields(control, f"{messages}{tokenizer.chat_template}")
    rendered = _render(tokenizer, messages, shields.tokens)
    # A token may also be put together from two messages, or by the template's changes to a message. Shielding every
    # letter that could begin one shows that, but hides from the template what it looks for in a message.
    if any(letter in str(messages) for letter in shields.letters):
        strict = _render(tokenizer, messages, shields.letters_of)
        if shields.control(rendered) != shields.control(strict):
            rendered = strict
    expected = [control[token] for token in shields.control(rendered)]
    if not shields.holds(rendered):
        ids = encode_text(tokenizer, rendered, control=True)
        numbers = set(control.values()) - {tokenizer.unk_token_id}
        if [number for number in ids if number in numbers] == expected:
            return ids
    # What stands between the template's control tokens is text, whoever wrote it.
    ids = []
    for piece in shields.pieces(rendered):
        ids += [control[piece]] if piece in control else encode_text(tokenizer, shields.lift(piece), control=False)
    return ids


class _Shields:
    """Characters of no meaning in place of a control token's first letter, so that a text does not spell it."""

    def __init__(self, control: dict[str, int], text: str) -> None:
        self.letters = sorted({token[0] for token in control})
        free = (chr(point) for point in PRIVATE if chr(point) not in text)
        self._shield = dict(zip(self.letters, free, strict=False))
        self._letter = {shield: letter for letter, shield in self._shield.items()}
        longest = sorted(control, key=len, reverse=True)
        self._token = re.compile(f"({'|'.join(re.escape(token) for token in longest)})")
        # The rest is looked at only, so that tokens which overlap are all met.
        self._first = re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in longest))

    def tokens(self, text: str) -> str:
        """`text` without a whole control token."""
        return self._first.sub(lambda match: self._shield[match[0]], text)

    def letters_of(self, text: str) -> str:
        """`text` without any letter that begins a control token."""
        return text.translate({ord(letter): shield for letter, shield in self._shield.items()})

    def lift(self, text: str) -> str:
        return text.translate({ord(shield): letter for shield, letter in self._letter.items()})

    def holds(self, text: str) -> bool:
        return any(shield in text for shield in self._letter)

    def control(self, text: str) -> list[str]:
        return self._token.findall(text)

    def pieces(self, text: str) -> list[str]:
        """Control tokens, and the texts between them."""
        return [piece for piece in self._token.split(text) if piece]


def _shielded(value: Any, shield: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return shield(value)
    if isinstance(value, dict):
        return {key: _shielded(inner, shield) for key, inner in value.items()}
    return [_shielded(inner, shield) for inner in value] if isinstance(value, list | tuple) else value


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], shield: Callable[[str], str]) -> str:
    """The template's text. `InputError` with the template's reason where it refuses the messages."""
    shielded = _shielded(messages, shield)
    try:
        text = tokenizer.apply_chat_template(shielded, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is the checkpoint's program: it may raise by intent, or fail in any way
        raise InputError(f"messages: the model's chat template refuses them: {one_line(error)}") from error
    assert isinstance(text, str)
    return text


def check_unicode(text: str, field: str) -> None:
    """`InputError` that names `field` where JSON has smuggled in what no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"half of a surrogate pair at character {error.start}"
        raise InputError(f"{field}: got {what}; accepted: text that can be written as UTF-8") from error
