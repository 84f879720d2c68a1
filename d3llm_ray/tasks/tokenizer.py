"""A word-level tokenizer for the embedded task, in Hugging Face's file format, with LLaDA's chat markers."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, MASK, UNKNOWN = "<|pad|>", "<|endoftext|>", "<|mdm_mask|>", "<|unk|>"
BOS, HEADER_START, HEADER_END, TURN_END = "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (PAD, EOS, MASK, UNKNOWN, BOS, HEADER_START, HEADER_END, TURN_END)

# LLaDA's template: the assistant header is always appended (LLaDA-8B-Instruct's tokenizer_config.json).
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ '" + BOS + "' }}{% endif %}"
    "{{ '"
    + HEADER_START
    + "' + message['role'] + '"
    + HEADER_END
    + "' + message['content'] | trim + '"
    + TURN_END
    + "' }}"
    "{% endfor %}"
    "{{ '" + HEADER_START + "assistant" + HEADER_END + "' }}"
)
_WORD = Regex(r"▁?[A-Za-z]+|▁?\d+|▁?#+|▁?[^\sA-Za-z\d]|\n")


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word, number or mark; a leading space belongs to its word, so decoding gives the text back.

    `texts` must hold every word once; numbers 0 to 99 are single tokens. Unknown words become `<|unk|>`.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split(_WORD, behavior="isolated"),
        ]
    )
    words: dict[str, None] = {}
    for text in ["user assistant system", *texts]:
        words.update((piece, None) for piece, _ in splitter.pre_tokenize_str(text))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *sorted(set(words) - {"▁"})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        mask_token=MASK,
        additional_special_tokens=[HEADER_START, HEADER_END, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
