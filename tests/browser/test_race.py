"""Races and replays: lanes side by side, and what was recorded shown again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from d3llm_ray.decoding import DiffusionLLM
from tests.browser.conftest import QUESTION, TOKENS, Playground, Served, served

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def causal() -> Iterator[Served]:
    with served(model="tiny-ar") as started:
        yield started


def start_race(playground: Playground) -> None:
    playground.page.get_by_label("race", exact=True).check()
    playground.answer_length()


def test_a_race_of_what_the_server_lists(playground: Playground, server: Served, offline: DiffusionLLM) -> None:
    start_race(playground)
    page = playground.page
    selects = page.get_by_role("combobox", name="Decoder").all()
    assert [select.input_value() for select in selects] == ["vanilla", "d3llm"]
    playground.ask()
    playground.wait()
    sent = {body["diffusion"].get("decoder"): body for body in playground.bodies}
    assert set(sent) == {"vanilla", None}, "the server's own decoder goes without its name"
    assert all(body["messages"] == [{"role": "user", "content": QUESTION}] for body in sent.values())
    said = page.locator(".race-line").all_inner_texts()
    for lane, decoder in enumerate(("vanilla", "d3llm")):
        (expected,) = offline.generate([QUESTION], max_tokens=TOKENS, decoder=decoder)
        assert playground.figure("forwards", lane) == str(expected.forwards)
        assert said[lane].removeprefix(f"tiny-llada · {decoder}").strip() == expected.text.strip()
    places = page.locator(".place").all_inner_texts()
    assert places[1].startswith("1st, ") and places[0].startswith("2nd, ")
    assert server.in_flight == 0
    assert "Race over" in page.get_by_role("status").inner_text()


def test_both_lanes_run_at_once(playground: Playground, server: Served) -> None:
    start_race(playground)
    with server.slowed():
        playground.ask()
        playground.page.locator(".lane").nth(0).locator(".revealed").first.wait_for()
        playground.page.locator(".lane").nth(1).locator(".revealed").first.wait_for()
        assert server.in_flight == 2
        playground.page.get_by_label("Message").press("Escape")
        playground.wait()
    assert playground.page.locator(".place").all_inner_texts() == ["stopped", "stopped"]


def test_a_race_of_two_models(open_playground: Any, server: Served, causal: Served) -> None:
    with open_playground(server, other=causal) as playground:
        start_race(playground)
        page = playground.page
        models = [select.input_value() for select in page.get_by_role("combobox", name="Model").all()]
        assert models == ["tiny-llada", "tiny-llada", "tiny-ar"]
        playground.ask()
        playground.wait()
        (expected,) = DiffusionLLM.from_pretrained("tiny-ar").generate([QUESTION], max_tokens=TOKENS)
        assert playground.figure("forwards", lane=2) == str(expected.forwards)
        assert sorted(place[:3] for place in page.locator(".place").all_inner_texts()) == ["1st", "2nd", "3rd"]
        page.get_by_label("Lanes").select_option("2")
        assert page.locator(".lane").count() == 2
        page.get_by_role("combobox", name="Model").nth(0).select_option("tiny-ar")
        assert page.get_by_role("combobox", name="Decoder").nth(0).input_value() == "autoregressive"
        playground.ask()
        playground.wait()
        assert [body["model"] for body in playground.bodies[3:]] == ["tiny-ar", "tiny-llada"]


def test_a_model_without_a_replica_tells_nothing_yet_and_is_asked_all_the_same(playground: Playground) -> None:
    page = playground.page
    bare = {"id": "tiny-llada", "object": "model", "created": 0, "owned_by": "d3llm-ray"}
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [bare]}), times=1)
    page.reload()
    page.get_by_role("gridcell").first.wait_for()
    assert page.get_by_role("combobox", name="Decoder").input_value() == "its own"
    assert page.get_by_label("race", exact=True).is_disabled()
    playground.ask()
    playground.wait()
    assert playground.bodies[0]["diffusion"] == {"events": True} and playground.text()


def test_settings_go_to_the_lanes_that_have_them(playground: Playground) -> None:
    start_race(playground)
    playground.set("Entropy threshold", 1, "ArrowRight")
    playground.ask()
    playground.wait()
    of = {body["diffusion"].get("decoder", "d3llm"): body["diffusion"] for body in playground.bodies}
    assert of["d3llm"]["entropy_threshold"] == 0.5 and "entropy_threshold" not in of["vanilla"]


def test_a_replay_shows_each_forward_again(playground: Playground, offline: DiffusionLLM) -> None:
    playground.answer_length()
    playground.ask()
    playground.wait()
    page = playground.page
    whole = playground.cells()
    (expected,) = offline.generate([QUESTION], max_tokens=TOKENS)
    scrubber = page.get_by_role("slider", name="Forwards shown")
    assert scrubber.get_attribute("max") == str(expected.forwards)
    scrubber.focus()
    for forward in range(expected.forwards, -1, -1):
        shown = [name for name in playground.cells() if "forward" in name]
        assert all(int(name.rpartition(" ")[2]) <= forward for name in shown)
        kept = [name for name in whole if "forward" in name and int(name.rpartition(" ")[2]) <= forward]
        assert shown == kept
        assert playground.figure("forwards") == (str(forward) if forward else "–")
        assert (scrubber.get_attribute("aria-valuetext") or "").startswith(f"forward {forward} of {expected.forwards}")
        page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="One forward on").click()
    assert playground.figure("forwards") == "1"
    page.get_by_label("Speed").select_option("1")
    page.get_by_role("button", name="Play", exact=True).press("Enter")
    page.get_by_text(f"forward {expected.forwards} of {expected.forwards}").wait_for()
    page.get_by_role("button", name="Play", exact=True).wait_for()
    assert playground.cells() == whole


def test_a_replay_can_be_held_and_goes_on(playground: Playground, server: Served) -> None:
    with server.slowed():
        playground.ask()
        playground.wait()
    page = playground.page
    page.get_by_label("Speed").select_option("0.25")
    page.get_by_role("button", name="Play", exact=True).click()
    page.get_by_text("forward 2 of").wait_for()
    page.get_by_role("button", name="Pause").click()
    held = page.locator("#moment").inner_text()
    page.wait_for_timeout(600)
    assert page.locator("#moment").inner_text() == held
    assert playground.figure("forwards") == held.split()[1]


def test_an_earlier_answer_comes_back_with_its_decoder(playground: Playground) -> None:
    playground.answer_length()
    playground.ask()
    playground.wait()
    first = playground.cells()
    page = playground.page
    page.get_by_role("combobox", name="Decoder").select_option("vanilla")
    assert not any("forward" in name for name in playground.cells()), "another decoder: an empty canvas"
    playground.ask("Sam has 5 apples. Sam gives away 2. How many apples does Sam have now?")
    playground.wait()
    assert playground.bodies[1]["diffusion"]["decoder"] == "vanilla"
    page.get_by_label("Speed").select_option("1")
    page.get_by_role("button", name="Replay").first.click()
    page.get_by_role("button", name="Play", exact=True).wait_for()
    assert page.get_by_role("combobox", name="Decoder").input_value() == "d3llm"
    assert playground.cells() == first


def test_colour_by_forward_or_entropy_and_never_by_colour_alone(playground: Playground) -> None:
    playground.ask()
    playground.wait()
    page = playground.page
    share = "cells => cells.map((cell) => Number(cell.style.getPropertyValue('--share')))"
    revealed = page.locator(".cell.revealed")
    entropy = revealed.evaluate_all(share)
    page.get_by_label("forward", exact=True).check()
    forward = revealed.evaluate_all(share)
    names = [name for name in playground.cells() if "forward" in name]
    last = max(int(name.rpartition(" ")[2]) for name in names)
    for name, by_entropy, by_forward in zip(names, entropy, forward, strict=True):
        value, step = name.rpartition("entropy ")[2].split(", forward ")
        assert by_entropy == pytest.approx(min(float(value), 1), abs=0.006)
        assert by_forward == pytest.approx((int(step) - 1) / (last - 1), abs=0.001)
    bar = revealed.evaluate_all("cells => cells.map((cell) => parseFloat(getComputedStyle(cell, '::after').width))")
    assert bar[forward.index(max(forward))] > bar[forward.index(min(forward))]
    revealed.nth(3).hover()
    told = page.locator("#details").inner_text()
    assert "entropy" in told and "revealed by forward" in told and "block 1" in told
