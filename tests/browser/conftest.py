"""A real Chromium on the playground of a real server: the embedded models decode what it asks."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# A test's own process, and nothing that a browser does for its vendor beside it.
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
QUESTION = "Tom has 12 apples. Tom buys 7 more. Then Tom loses 5 apples. How many apples does Tom have now?"
TOKENS = 64
STEP_S = 0.08  # of a slowed forward: longer than what the page draws at


@dataclass(frozen=True)
class Served:
    """A server that runs, and the service in it."""

    url: str
    service: ChatService

    @property
    def in_flight(self) -> int:
        return self.service.worker.in_flight

    @contextmanager
    def slowed(self, seconds: float = STEP_S) -> Iterator[None]:
        """Every forward takes so long more while the block runs."""
        engine = self.service.llm.engine
        step = engine.step

        def slow_step() -> Any:
            time.sleep(seconds)
            return step()

        with patch.object(engine, "step", slow_step):
            yield


@contextmanager
def served(**settings: Any) -> Iterator[Served]:
    """`serve_locally`, with the service that it makes."""
    made: list[ChatService] = []

    class Kept(ChatService):
        def __init__(self, settings: ReplicaSettings) -> None:
            super().__init__(settings)
            made.append(self)

    with patch("d3llm_ray.serving.local.ChatService", Kept), serve_locally(ReplicaSettings(**settings)) as url:
        yield Served(url, made[0])


@contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("Playwright's Python package is not here (make browser installs it)")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no Chromium at {CHROMIUM} (Debian: apt install chromium; or name one in CHROMIUM)")
    with chromium() as started:
        yield started


@pytest.fixture(scope="package")
def server() -> Iterator[Served]:
    with served(model="tiny-llada") as started:
        yield started


@pytest.fixture(scope="package")
def offline() -> DiffusionLLM:
    return DiffusionLLM.from_pretrained("tiny-llada")


@dataclass
class Playground:
    """The page as a test handles it."""

    page: Page
    server: Served
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the questions that were sent

    def set(self, slider: str, times: int, key: str = "ArrowLeft") -> None:
        self.page.get_by_role("slider", name=slider).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def answer_length(self, tokens: int = TOKENS) -> None:
        """Move the slider, which has a stop every 8 tokens, to a length."""
        self.set("Answer length", 1, "Home")
        self.set("Answer length", tokens // 8 - 1, "ArrowRight")

    def ask(self, text: str = QUESTION) -> None:
        self.page.locator("#send:enabled").wait_for()
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_label("Message").press("Enter")

    def wait(self) -> None:
        """Until the last answer is complete, stopped or failed."""
        self.page.locator(".turn.answer").last.and_(self.page.locator("[aria-busy=false]")).wait_for()

    def text(self) -> str:
        return self.page.locator(".turn.answer .text").last.inner_text()

    def cells(self, lane: int = 0) -> list[str]:
        """Accessible names of a lane's cells."""
        cells: list[str] = (
            self.page.locator(".lane")
            .nth(lane)
            .get_by_role("gridcell")
            .evaluate_all("cells => cells.map((cell) => cell.ariaLabel)")
        )
        return cells

    def figure(self, name: str, lane: int = 0) -> str:
        return self.page.locator(".lane").nth(lane).locator(f"[data-figure={name}]").inner_text()


def beside(page: Page, server: Served, other: Served) -> None:
    """Have two servers answer at one address, each for its model, as a router of several models does."""

    def models(route: Any) -> None:
        answers = [route.fetch(url=f"{one.url}/v1/models").json() for one in (server, other)]
        route.fulfill(json={**answers[0], "data": [card for answer in answers for card in answer["data"]]})

    def chat(route: Any) -> None:
        asks_other = route.request.post_data_json["model"] == other.service.settings.model_id
        route.continue_(url=f"{(other if asks_other else server).url}/v1/chat/completions")

    page.route("**/v1/models", models)
    page.route("**/v1/chat/completions", chat)


@contextmanager
def opened(
    browser: Browser, server: Served, path: str = "/", other: Served | None = None, **context: Any
) -> Iterator[Playground]:
    """A page in a context of its own, on which nothing is complained of, and which asks no other host.

    With `other` that server's model is offered beside.
    """
    context.setdefault("viewport", {"width": 1280, "height": 860})
    own = browser.new_context(**context)
    page = own.new_page()
    page.set_default_timeout(15_000)
    playground = Playground(page, server)

    def note(request: Any) -> None:
        playground.hosts.add(request.url.split("/")[2])
        if request.method == "POST":
            playground.bodies.append(request.post_data_json)

    page.on("console", lambda message: playground.complaints.append(message.text))
    page.on("pageerror", lambda error: playground.complaints.append(str(error)))
    page.on("request", note)
    if other is not None:
        beside(page, server, other)
    page.goto(server.url + path)
    page.get_by_role("gridcell").first.wait_for()
    yield playground
    own.close()
    assert playground.complaints == []
    assert playground.hosts == {server.url.split("/")[2]}


@pytest.fixture
def playground(browser: Browser, server: Served) -> Iterator[Playground]:
    with opened(browser, server) as page:
        yield page


@pytest.fixture
def open_playground(browser: Browser) -> Any:
    """Context manager: the page of a server, in a browser context with these options."""

    def open_page(server: Served, path: str = "/", **context: Any) -> Any:
        return opened(browser, server, path, **context)

    return open_page
