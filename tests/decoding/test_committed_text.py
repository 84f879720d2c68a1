"""Incremental text: what is sent is never taken back, and adds up to the whole text up to the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from d3llm_ray.decoding.text import CommittedText


def decode_bytes(ids: list[int]) -> str:
    """A byte-level tokenizer: unfinished characters decode to U+FFFD, as in Hugging Face's ByteLevel."""
    return bytes(ids).decode("utf-8", errors="replace")


def naive_answer(text: str, stops: list[str]) -> str:
    """Read character by character, and cut at the first stop string that becomes complete."""
    for end in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - max(len(stop) for stop in ends)]
    return text


def test_character_of_several_tokens_waits_for_its_last_byte() -> None:
    text = CommittedText(decode_bytes)
    sent = [text.push([byte]) for byte in "a€b".encode()]
    assert sent == ["a", "", "", "€", "b"]
    assert text.finish() == ""


def test_unfinished_character_is_shown_at_the_end() -> None:
    text = CommittedText(decode_bytes)
    assert text.push("a€".encode()[:-1]) == "a"
    assert text.finish() == "\ufffd"


def test_partial_stop_string_is_held_back_until_it_is_decided() -> None:
    text = CommittedText(decode_bytes, ["END"])
    assert text.push(b"oneEN") == "one"
    assert text.push(b"Etwo") == "ENEtwo"
    assert text.push(b"E") == ""
    assert text.finish() == "E"
    assert not text.stopped


def test_tokens_count_up_to_the_one_that_completes_the_stop_string() -> None:
    text = CommittedText(decode_bytes, ["END"])
    assert text.push(b"abEN") == "ab"
    assert text.push(b"Dcdefg") == ""
    assert text.stopped
    assert text.tokens == 5
    assert text.push(b"more") == ""
    assert text.finish() == ""
    assert text.tokens == 5


def test_skipped_special_token_does_not_swallow_the_following_space() -> None:
    words = {0: "", 1: " one", 2: " two"}

    def decode(ids: list[int]) -> str:  # a Metaspace decoder strips the space of the whole text's first word only
        return "".join(words[token] for token in ids).removeprefix(" ")

    text = CommittedText(decode)
    assert [text.push([token]) for token in (1, 0, 2)] == ["one", "", " two"]


@given(
    text=st.text(alphabet="ab€é\n ", max_size=30),
    stops=st.lists(st.text(alphabet="ab€ ", min_size=1, max_size=4), max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
)
def test_deltas_add_up_however_tokens_arrive(text: str, stops: list[str], sizes: list[int]) -> None:
    ids = list(text.encode())
    incremental = CommittedText(decode_bytes, stops)
    shown, position, turn = "", 0, 0
    while position < len(ids):
        size = sizes[turn % len(sizes)]
        shown += incremental.push(ids[position : position + size])
        position, turn = position + size, turn + 1
    shown += incremental.finish()
    assert shown == naive_answer(text, stops)
