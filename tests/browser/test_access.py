"""For everyone: by keyboard, on a phone, in the dark, with a screen reader, without motion; and safe."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.browser.conftest import QUESTION, Playground, Served

pytestmark = pytest.mark.browser

# Every text with its ratio of contrast (WCAG 2.2, 1.4.3), computed from the styles: tints are painted and read back.
CONTRAST = """() => {
  const pixel = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d",
    { willReadFrequently: true });
  const blend = (colours) => {
    pixel.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1); }
    return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => rgb.map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest(":disabled, noscript, script")) continue;
    const under = [];
    for (let each = element; each; each = each.parentElement) under.unshift(getComputedStyle(each).backgroundColor);
    const below = blend(under);
    const over = blend([...under, getComputedStyle(element).color]);
    const [light, dark] = [luminance(below), luminance(over)].sort((a, b) => b - a);
    found.push([walker.currentNode.data.trim(), (light + 0.05) / (dark + 0.05)]);
  }
  return found;
}"""


def answered(playground: Playground) -> None:
    playground.ask()
    playground.wait()


@pytest.mark.parametrize("colour", ["entropy", "forward"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(open_playground: Any, server: Served, scheme: str, colour: str) -> None:
    with open_playground(server, color_scheme=scheme, reduced_motion="reduce") as playground:
        answered(playground)
        playground.page.get_by_label(colour, exact=True).check()
        low = [(text, round(ratio, 2)) for text, ratio in playground.page.evaluate(CONTRAST) if ratio < 4.5]
        assert low == []


def test_the_theme_can_be_chosen_and_is_remembered(open_playground: Any, server: Served) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    with open_playground(server, color_scheme="light") as playground:
        page = playground.page
        light = page.evaluate(paper)
        page.get_by_label("Theme").select_option("dark")
        dark = page.evaluate(paper)
        assert dark != light
        page.reload()
        assert page.evaluate(paper) == dark
        page.get_by_label("Theme").select_option("system")
        assert page.evaluate(paper) == light


@pytest.mark.parametrize("width", [320, 360, 768, 1024, 1440])
@pytest.mark.parametrize("mode", ["one decoder", "race"])
def test_no_width_makes_the_page_scroll_sideways(open_playground: Any, server: Served, width: int, mode: str) -> None:
    with open_playground(server, viewport={"width": width, "height": 740}) as playground:
        page = playground.page
        page.get_by_label(mode, exact=True).check()
        playground.ask("x" * 200 + " " + QUESTION)
        playground.wait()
        if not page.get_by_role("slider", name="Answer length").is_visible():
            page.get_by_text("Decoding").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = """width => [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility()
            && each.getBoundingClientRect().right > width + 0.5).map((each) => each.outerHTML.slice(0, 80))"""
        assert page.evaluate(outside, width) == []


def test_every_control_has_a_name_and_the_canvas_is_a_grid(playground: Playground) -> None:
    answered(playground)
    page = playground.page
    controls = "button, input, select, textarea, summary, [tabindex]"
    for control in page.locator(controls).all():
        if not control.is_visible():
            continue
        snapshot = control.aria_snapshot()
        assert re.match(r"- '?\w+ \".+\"|- text: .+|- \w+: .+", snapshot), snapshot
    snapshot = page.locator("body").aria_snapshot()
    for expected in (
        'grid "Canvas of tiny-llada · d3llm"',
        'textbox "Message"',
        'slider "Entropy threshold"',
        'combobox "Model"',
        'combobox "Decoder"',
        'group "Replay"',
        'radio "one decoder" [checked]',
        'rowheader "1 ',
    ):
        assert expected in snapshot
    assert re.search(r'gridcell "1: \S+, entropy \d\.\d\d, forward \d+"', snapshot)


def test_a_whole_walk_by_keyboard(playground: Playground) -> None:
    """Ask, walk over the canvas, replay, change a setting, race: without a pointer; the focus is always seen."""
    page, keyboard = playground.page, playground.page.keyboard
    focused = "() => { const { id, ariaLabel, name } = document.activeElement; return id || ariaLabel || name; }"
    ring = "() => getComputedStyle(document.activeElement).outlineStyle"

    def tab_to(name: str) -> None:
        for _ in range(40):
            keyboard.press("Tab")
            assert page.evaluate(ring) != "none"
            if page.evaluate(focused) == name:
                return
        raise AssertionError(f"{name} cannot be reached")

    tab_to("prompt")
    keyboard.type("Tom has 5 apples.")
    keyboard.press("Shift+Enter")
    keyboard.type("Tom buys 2 more. How many apples does Tom have now?")
    keyboard.press("Enter")
    playground.wait()
    assert playground.bodies[0]["messages"][0]["content"].split("\n")[0] == "Tom has 5 apples."
    cells = playground.cells()
    tab_to(cells[0])
    for key, place in (("ArrowRight", 1), ("ArrowDown", 17), ("End", 31), ("Home", 16), ("ArrowUp", 0)):
        keyboard.press(key)
        assert page.evaluate(focused) == cells[place]
        assert page.evaluate(ring) != "none"
        assert page.locator("#details").inner_text().startswith(f"Position {place + 1} of")
    keyboard.press("Control+End")
    assert page.evaluate(focused) == cells[-1]
    tab_to("play")
    assert page.get_by_role("grid").locator("[tabindex='0']").count() == 1, "the canvas is one stop"
    tab_to("scrubber")
    keyboard.press("Home")
    assert playground.figure("forwards") == "–"
    page.get_by_label("Message").focus()
    tab_to("mode")
    keyboard.press("ArrowRight")
    assert page.locator(".lane").count() == 2
    page.get_by_label("Message").focus()
    keyboard.type(QUESTION)
    keyboard.press("Enter")
    playground.wait()
    assert page.locator(".place").all_inner_texts()[1].startswith("1st")


def test_one_announcement_an_answer_not_one_a_token(playground: Playground, server: Served) -> None:
    page = playground.page
    page.evaluate("""() => {
      window.announced = [];
      const live = document.querySelectorAll("[role=status], [role=alert], [role=log], [aria-live], output");
      for (const region of live) {
        const note = () => window.announced.push(region.textContent);
        new MutationObserver(note).observe(region, { childList: true, characterData: true, subtree: true });
      }
    }""")
    with server.slowed(0.03):
        answered(playground)
    announced = page.evaluate("window.announced")
    assert announced[0] == "Answering." and len(announced) == 2
    assert announced[1].startswith(f"Answer: {playground.text()}")


def test_reduced_motion_moves_nothing(open_playground: Any, server: Served) -> None:
    moving = "() => document.getAnimations().length + [...document.querySelectorAll('*')].filter((each) => " + (
        "parseFloat(getComputedStyle(each).transitionDuration) > 0).length"
    )
    with open_playground(server, reduced_motion="reduce") as playground:
        answered(playground)
        assert playground.page.evaluate(moving) == 0


ATTACK = '<img src=x onerror="window.hit=1"><script>window.hit=1</script><b>bold</b>'


def test_markup_is_text(playground: Playground) -> None:
    """In a message, in an answer, in tokens, in errors and in the names that a server tells."""
    page = playground.page
    told = {"forward": 0, "positions": [0, 1], "text": [ATTACK, "<b>"], "entropy": [0.1, 0.2]}
    extent = {"size": 16, "block_size": 16, "opened": 16, "frozen": 0}
    chunk = {"choices": [{"index": 0, "delta": {"content": ATTACK}}], "diffusion": {**told, **extent}}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    answers = [
        lambda route: route.fulfill(body=body, headers={"Content-Type": "text/event-stream"}),
        lambda route: route.fulfill(status=400, json={"error": {"message": ATTACK, "param": ATTACK}}),
    ]
    page.route("**/v1/chat/completions", lambda route: answers.pop(0)(route))
    playground.ask(ATTACK)
    playground.wait()
    assert playground.text() == ATTACK
    assert page.locator(".turn.asked .text").inner_text() == ATTACK
    cell = page.get_by_role("gridcell").first
    assert cell.text_content() == ATTACK
    cell.hover()
    assert ATTACK in page.locator("#details").inner_text()
    playground.ask("again")
    playground.wait()
    assert ATTACK in page.locator(".turn .problem").inner_text()
    assert page.locator("main b, main img, main script").count() == 0
    assert page.evaluate("window.hit") is None
    assert all("400" in text for text in playground.complaints)
    playground.complaints.clear()


def test_the_policy_stops_what_would_get_through(playground: Playground) -> None:
    page = playground.page
    blocked = """async () => {
      const tries = [
        () => { document.body.innerHTML = "<p>no</p>"; },
        () => { document.body.append(Object.assign(document.createElement("script"), { text: "1" })); },
      ];
      const failed = tries.filter((each) => { try { each(); return false; } catch { return true; } }).length;
      const far = await fetch("http://192.0.2.1/").then(() => "reached", () => "blocked");
      return [failed, far];
    }"""
    assert page.evaluate(blocked) == [2, "blocked"]
    assert any("Content Security Policy" in text for text in playground.complaints)
    playground.complaints.clear()
    playground.hosts.discard("192.0.2.1")


def test_behind_a_route_prefix(open_playground: Any, server: Served) -> None:
    """As behind a proxy that takes a prefix away: the page's addresses and its requests stay below it."""

    def strip(route: Any) -> None:
        route.continue_(url=route.request.url.replace("/models/tiny/", "/"))

    with open_playground(server) as playground:
        page = playground.page
        page.route("**/models/tiny/**", strip)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url.removeprefix(server.url)))
        page.goto(f"{server.url}/models/tiny/")
        page.get_by_role("gridcell").first.wait_for()
        answered(playground)
        assert playground.text()
        assert len(asked) > 10 and all(path.startswith("/models/tiny/") for path in asked)
