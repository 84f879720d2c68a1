"""The pictures in the documentation: `python -m tests.browser.screenshots` (make screenshots)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser.conftest import QUESTION, Playground, Served, chromium, opened, served

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def take(playground: Playground, name: str, **options: Any) -> None:
    path = IMAGES / f"playground-{name}.png"
    playground.page.evaluate("document.activeElement.blur()")
    playground.page.screenshot(path=path, animations="disabled", **options)
    Image.open(path).convert("RGB").quantize(200).save(path, optimize=True)
    print(f"{path.stat().st_size / 1000:6.0f} kB  {path.relative_to(IMAGES.parents[1])}")


def answered(playground: Playground, length: int) -> None:
    playground.answer_length(length)
    playground.ask(QUESTION)
    playground.wait()


def midway(playground: Playground, share: float) -> None:
    """Scrub to a share of what was recorded, as it was then."""
    scrubber = playground.page.get_by_role("slider", name="Forwards shown")
    scrubber.fill(str(round(share * int(scrubber.get_attribute("max") or 0))))


@contextmanager
def servers() -> Iterator[tuple[Served, Served]]:
    with ExitStack() as running:
        names = ("tiny-llada-d3llm", "tiny-ar")
        one, other = (running.enter_context(served(model=name)) for name in names)
        yield one, other


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    wide, tall = {"width": 1280, "height": 780}, {"width": 360, "height": 740}
    with servers() as (server, other), chromium() as browser:
        for scheme in ("light", "dark"):
            with opened(browser, server, viewport=wide, color_scheme=scheme) as playground:
                answered(playground, 128)
                midway(playground, 0.6)
                if scheme == "dark":
                    playground.page.get_by_label("forward", exact=True).check()
                    midway(playground, 1)
                playground.page.get_by_role("gridcell").nth(16).hover()
                take(playground, scheme)
        with opened(browser, server, viewport={"width": 1480, "height": 1000}, other=other) as playground:
            playground.page.get_by_label("race", exact=True).check()
            answered(playground, 64)
            midway(playground, 0.45)
            take(playground, "race")
        with opened(browser, server, viewport=tall, device_scale_factor=2) as playground:
            playground.page.get_by_text("Decoding").click()
            answered(playground, 64)
            playground.page.evaluate("scrollTo(0, document.querySelector('.lane').offsetTop - 12)")
            take(playground, "phone")


if __name__ == "__main__":
    main()
