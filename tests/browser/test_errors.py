"""What can go wrong is said in words, with what can be done; what was said before stays."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.browser.conftest import Playground, served

pytestmark = pytest.mark.browser
CHAT, MODELS = "**/v1/chat/completions", "**/v1/models"


def refuse(playground: Playground, status: int, message: str, pattern: str = CHAT, **headers: str) -> None:
    """The next request is answered with an error in OpenAI's shape; later ones reach the server."""
    body = {"error": {"message": message, "type": "error", "param": headers.pop("param", None), "code": None}}

    def answer(route: Any) -> None:
        route.fulfill(
            status=status, json=body, headers={name.replace("_", "-"): text for name, text in headers.items()}
        )

    playground.page.route(pattern, answer, times=1)


def forgive(playground: Playground) -> None:
    """Chromium itself complains of every answer that is an error."""
    assert all("Failed to load resource" in text for text in playground.complaints)
    playground.complaints.clear()


def test_a_full_server_asks_to_wait_and_is_asked_again(playground: Playground) -> None:
    refuse(playground, 429, "the queue is full", retry_after="2")
    playground.ask()
    playground.wait()
    problem = playground.page.locator(".turn .problem")
    assert "The server is full: it asks to wait 2 s" in problem.inner_text()
    again = problem.get_by_role("button")
    assert again.is_disabled() and again.inner_text() in ("Ask again in 2 s", "Ask again in 1 s")
    playground.page.get_by_role("button", name="Ask again", exact=True).click()
    playground.wait()
    assert playground.text() and playground.page.locator(".problem:visible").count() == 0
    assert len(playground.bodies) == 2 and playground.bodies[0] == playground.bodies[1]
    forgive(playground)


def test_a_really_full_server(open_playground: Any) -> None:
    with (
        served(model="tiny-llada", max_batch_size=1, max_queue=0) as server,
        open_playground(server) as playground,
        server.slowed(),
    ):
        playground.page.get_by_label("race", exact=True).check()
        playground.ask()
        playground.page.locator(".lane").filter(has_text="the queue is full").wait_for()
        playground.page.get_by_role("button", name="Stop").click()
        playground.wait()
        assert "The server is full: it asks to wait 1 s" in playground.page.locator(".turn .problem").inner_text()
        forgive(playground)


def test_a_refused_field_is_named_and_its_slider_marked(playground: Playground) -> None:
    message = "diffusion.entropy_threshold: got 0.5; accepted: at most 0.4"
    refuse(playground, 400, message, param="diffusion.entropy_threshold")
    playground.set("Entropy threshold", 1, "ArrowRight")
    playground.ask()
    playground.wait()
    told = playground.page.locator(".turn .problem").inner_text()
    assert told.startswith(f"The server refuses the field {message}")
    slider = playground.page.get_by_role("slider", name="Entropy threshold")
    assert slider.get_attribute("aria-invalid") == "true"
    playground.set("Entropy threshold", 1, "ArrowLeft")
    assert slider.get_attribute("aria-invalid") is None
    forgive(playground)


def test_the_servers_own_refusal(playground: Playground) -> None:
    playground.ask("apples " * 600)
    playground.wait()
    told = playground.page.locator(".turn .problem").inner_text()
    assert "refuses the field messages" in told and "at most 512 tokens" in told
    assert "refuses the field messages" in playground.page.get_by_role("status").inner_text()
    playground.ask()
    playground.wait()
    assert len(playground.bodies[1]["messages"]) == 1, "what was refused is no part of the conversation"
    forgive(playground)


@pytest.mark.parametrize("ending", ["", 'data: {"error": {"message": "the engine failed; ask again"}}\n\n'])
def test_a_stream_without_its_end_is_no_answer(playground: Playground, ending: str) -> None:
    told = {"forward": 0, "positions": [0], "text": ["Tom"], "entropy": [0.1]}
    extent = {"size": 64, "block_size": 16, "opened": 16, "frozen": 0}
    chunk = {"choices": [{"index": 0, "delta": {"content": "Tom"}}], "diffusion": {**told, **extent}}
    body = f"data: {json.dumps(chunk)}\n\n{ending}"
    headers = {"Content-Type": "text/event-stream"}
    playground.page.route(CHAT, lambda route: route.fulfill(body=body, headers=headers), times=1)
    playground.ask()
    playground.wait()
    assert playground.text() == "Tom", "what came stays"
    reason = "the engine failed; ask again" if ending else "without [DONE]"
    told_text = playground.page.locator(".turn .problem").inner_text()
    assert "Incomplete: " in told_text and reason in told_text
    playground.page.get_by_role("button", name="Ask again").click()
    playground.wait()
    assert len(playground.bodies[1]["messages"]) == 1


def test_a_key_is_asked_for_kept_for_the_tab_and_sent_as_bearer(playground: Playground) -> None:
    page = playground.page
    refuse(playground, 401, "the API key is missing or wrong", MODELS)
    page.reload()
    page.get_by_role("button", name="Enter the key").click()
    sent: list[str | None] = []
    page.on("request", lambda request: sent.append(request.headers.get("authorization")))
    page.get_by_role("textbox", name="Key").fill("sk-secret")
    page.keyboard.press("Enter")
    page.get_by_role("gridcell").first.wait_for()
    playground.ask()
    playground.wait()
    assert set(sent) == {"Bearer sk-secret"}
    assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0
    assert "secret" not in page.content() and "secret" not in page.url
    page.get_by_role("button", name="Key").click()
    page.get_by_role("button", name="Forget").click()
    sent.clear()
    playground.ask()
    playground.wait()
    assert set(sent) == {None}
    forgive(playground)


def test_a_key_that_is_refused_when_asking(playground: Playground) -> None:
    refuse(playground, 401, "the API key is missing or wrong")
    playground.ask()
    playground.wait()
    assert "asks for a valid API key" in playground.page.locator(".turn .problem").inner_text()
    assert playground.page.get_by_role("dialog", name="API key").is_visible()
    playground.page.keyboard.press("Escape")
    assert not playground.page.get_by_role("dialog").is_visible()
    forgive(playground)


def test_the_server_is_gone_and_comes_back(open_playground: Any) -> None:
    with served(model="tiny-llada") as server, open_playground(server) as playground:
        playground.page.route(CHAT, lambda route: route.abort("connectionrefused"), times=1)
        playground.ask()
        playground.wait()
        assert "does not answer" in playground.page.locator(".turn .problem").inner_text()
        playground.page.get_by_role("button", name="Ask again").click()
        playground.wait()
        assert playground.text()
        playground.page.route(MODELS, lambda route: route.abort("connectionrefused"), times=1)
        playground.page.reload()
        assert "does not answer" in playground.page.get_by_role("alert").inner_text()
        assert playground.page.get_by_role("button", name="Ask", exact=True).is_disabled()
        playground.page.get_by_role("button", name="Try again").click()
        playground.page.get_by_role("gridcell").first.wait_for()
        assert playground.page.get_by_role("button", name="Ask", exact=True).is_enabled()
        forgive(playground)


def test_a_failing_engine_in_the_middle_of_an_answer(open_playground: Any) -> None:
    with served(model="tiny-llada") as server, open_playground(server) as playground:
        engine = server.service.llm.engine
        step, left = engine.step, iter(range(4))

        def failing() -> Any:
            if next(left, None) is None:
                raise RuntimeError("injected")
            return step()

        engine.step = failing  # type: ignore[method-assign]
        playground.ask()
        playground.wait()
        assert "Incomplete: " in playground.page.locator(".turn .problem").inner_text()
        assert playground.page.locator(".cell.revealed").count() > 0
        playground.page.get_by_role("button", name="Ask again").click()
        playground.wait()
        assert "(503)" in playground.page.locator(".turn .problem").last.inner_text()
        forgive(playground)


def test_what_cannot_be_read_ends_the_answer_and_nothing_else(playground: Playground) -> None:
    body, headers = 'data: {"nothing": 1}\n\ndata: [DONE]\n\n', {"Content-Type": "text/event-stream"}
    playground.page.route(CHAT, lambda route: route.fulfill(body=body, headers=headers), times=1)
    playground.ask()
    playground.wait()
    assert "cannot read" in playground.page.locator(".turn .problem").inner_text()
    assert len(playground.complaints) == 1 and "TypeError" in playground.complaints.pop()
    playground.page.get_by_role("button", name="Ask again").click()
    playground.wait()
    assert playground.text()


def test_a_server_without_models(playground: Playground) -> None:
    page = playground.page
    page.route(MODELS, lambda route: route.fulfill(json={"object": "list", "data": []}), times=1)
    page.reload()
    assert "the server lists no model" in page.get_by_role("alert").inner_text()
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("gridcell").first.wait_for()
