"""Ask, watch and stop: what the page shows is what the server decodes, where and when it does."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from typing import Any

import pytest

from d3llm_ray.decoding import DiffusionLLM
from tests.browser.conftest import QUESTION, TOKENS, Playground, Served

pytestmark = pytest.mark.browser

# Collects, at every change of the canvas, which forwards have revealed cells.
WATCH = """() => {
  window.seen = [];
  const cells = [...document.querySelectorAll(".cell")];
  const look = () => {
    const now = cells.map((cell) => Number(/forward (\\d+)/.exec(cell.ariaLabel)?.[1] ?? 0));
    const boxes = cells.map((cell) => cell.getBoundingClientRect()).map((box) => [box.x, box.y, box.width].join());
    const states = [...document.querySelectorAll(".block")].map((block) => block.dataset.state);
    window.seen.push({ now, states, boxes: boxes.join(";") });
  };
  new MutationObserver(look).observe(document.querySelector(".canvas"), { subtree: true, childList: true,
    attributes: true, attributeFilter: ["aria-label"] });
  look();
}"""


def complete(server: Served, **fields: Any) -> Any:
    """The API's own answer, without a browser."""
    body = {"model": "tiny-llada", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": TOKENS}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps({**body, **fields}).encode(), headers
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_the_answer_is_the_apis_and_the_canvas_is_the_response(
    playground: Playground, server: Served, offline: DiffusionLLM
) -> None:
    playground.answer_length()
    playground.ask()
    playground.wait()
    answer = complete(server)
    assert playground.text() == answer["choices"][0]["message"]["content"]
    usage = answer["usage"]
    assert playground.figure("forwards") == str(usage["forwards"])
    assert playground.figure("tokens") == str(usage["completion_tokens"])
    assert float(playground.figure("perForward")) == pytest.approx(usage["tpf"], abs=0.006)
    assert f"{usage['completion_tokens']} tokens in {usage['forwards']} forwards" in playground.page.content()

    (expected,) = offline.generate([QUESTION], max_tokens=TOKENS)
    assert offline.tokenizer is not None
    cells = playground.cells()
    assert len(cells) == TOKENS
    for position, name in enumerate(cells):
        token = offline.tokenizer.decode([expected.response_ids[position]])
        if position > len(expected.token_ids) and name == f"{position + 1}: masked":
            assert token == "<|endoftext|>"  # filled in behind the stop token: no forward has revealed it
            continue
        called = {"\n": "line break"}.get(token, f"special token {token}" if token.startswith("<|") else token)
        revealed = f"entropy {expected.reveal_entropies[position]:.2f}, forward {expected.reveal_steps[position] + 1}"
        assert name == f"{position + 1}: {called}, {revealed}"


def test_tokens_appear_forward_by_forward_and_nothing_moves(
    playground: Playground, server: Served, offline: DiffusionLLM
) -> None:
    playground.answer_length()
    playground.page.evaluate(WATCH)
    with server.slowed():
        playground.ask()
        playground.wait()
    seen = playground.page.evaluate("window.seen")
    (expected,) = offline.generate([QUESTION], max_tokens=TOKENS)
    told = playground.cells()
    steps = [0 if name.endswith("masked") else step + 1 for name, step in zip(told, expected.reveal_steps, strict=True)]
    shown = [max(one["now"]) for one in seen]
    assert shown == sorted(shown)
    assert set(shown) >= set(range(expected.forwards + 1)), "every forward has been on the screen by itself"
    for one, forwards in zip(seen, shown, strict=True):
        assert one["now"] == [step if step <= forwards else 0 for step in steps]
    assert len({one["boxes"] for one in seen}) == 1, "no cell has moved or grown"
    assert seen[0]["states"] == ["waiting"] * (TOKENS // 16)
    assert {state for one in seen for state in one["states"]} >= {"waiting", "open", "done"}


def test_states_of_blocks_are_words_and_come_in_order(playground: Playground, server: Served) -> None:
    order = ["waiting", "open", "done", "frozen"]
    playground.answer_length(128)
    playground.page.evaluate(WATCH)
    with server.slowed(0.03):
        playground.ask()
        playground.wait()
    seen = playground.page.evaluate("window.seen")
    assert "frozen" in {state for one in seen for state in one["states"]}
    for block in range(8):
        states = [order.index(one["states"][block]) for one in seen if one["states"][block] in order]
        assert states == sorted(states)
    words = playground.page.locator(".label").all_inner_texts()
    assert words == [f"{index + 1} {state}" for index, state in enumerate(seen[-1]["states"])]


def test_stop_frees_the_slot_and_keeps_what_was_said(playground: Playground, server: Served) -> None:
    with server.slowed():
        playground.ask()
        playground.page.locator(".cell.revealed").nth(8).wait_for()
        assert server.in_flight == 1
        assert not playground.page.get_by_role("button", name="Ask", exact=True).is_visible()
        playground.page.get_by_role("button", name="Stop").click()
        playground.wait()
        deadline = time.monotonic() + 5
        while server.in_flight and time.monotonic() < deadline:
            time.sleep(0.01)
    assert server.in_flight == 0
    assert "stopped after" in playground.page.locator(".turn.answer").inner_text()
    assert playground.page.get_by_role("button", name="Ask", exact=True).is_enabled()
    playground.ask()  # the next one goes through
    playground.wait()
    assert len(playground.page.locator(".turn.answer").all()) == 2


def test_earlier_turns_go_along_unless_they_should_not(playground: Playground) -> None:
    playground.answer_length()
    playground.ask()
    playground.wait()
    first = playground.text()
    playground.ask("and\nnow?")
    playground.wait()
    playground.page.get_by_label("with earlier turns").uncheck()
    playground.ask("alone")
    playground.wait()
    playground.page.get_by_role("button", name="Clear").click()
    assert playground.page.locator(".turn").count() == 0
    playground.page.get_by_label("with earlier turns").check()
    playground.ask("anew")
    playground.wait()
    sent = [body["messages"] for body in playground.bodies]
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": first}
    assert sent == [
        [question],
        [question, answer, {"role": "user", "content": "and\nnow?"}],
        [{"role": "user", "content": "alone"}],
        [{"role": "user", "content": "anew"}],
    ]


def test_an_example_is_filled_in_and_empty_messages_are_not_sent(playground: Playground) -> None:
    page = playground.page
    page.get_by_label("Message").press("Enter")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name=re.compile("Sam has 5 apples")).click()
    assert page.get_by_label("Message").input_value().startswith("Sam has 5 apples")
    assert playground.bodies == []


def test_settings_reach_the_request(playground: Playground) -> None:
    playground.answer_length()
    playground.ask()
    playground.wait()
    playground.set("Entropy threshold", 3, "ArrowRight")
    playground.set("Cache delay", 2, "ArrowRight")
    playground.set("Cache refresh", 1, "Home")
    playground.set("Cache refresh", 3, "ArrowRight")
    playground.answer_length(96)
    playground.ask()
    playground.wait()
    playground.page.get_by_role("button", name="Reset").click()
    playground.ask()
    playground.wait()
    plain, moved, back = playground.bodies
    assert (plain["model"], plain["max_tokens"], plain["diffusion"]) == ("tiny-llada", 64, {"events": True})
    assert moved["max_tokens"] == 96
    assert moved["diffusion"] == {"events": True, "entropy_threshold": 0.6, "cache_delay": 3, "refresh_interval": 4}
    assert back["diffusion"] == {"events": True} and back["max_tokens"] == 128
    assert all(body["stream"] is True for body in playground.bodies)


def test_a_looser_threshold_needs_fewer_forwards(playground: Playground) -> None:
    playground.ask()
    playground.wait()
    careful = int(playground.figure("forwards"))
    playground.page.get_by_label("with earlier turns").uncheck()
    playground.set("Entropy threshold", 1, "End")
    playground.ask()
    playground.wait()
    assert int(playground.figure("forwards")) < careful
