"""The playground's routes: what a browser needs to be told of its files, and that nothing else is handed out."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import d3llm_ray.serving.playground
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.service import ChatService

FOLDER = Path(d3llm_ray.serving.playground.__file__).parent
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in TYPES)
PLACES = ["/", *(f"/playground/{name}" for name in FILES)]


class Addresses(HTMLParser):
    """What a page loads, what it runs in place, and what it says of style in place."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.in_place: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [value for name in ("src", "href") if (value := values.get(name)) is not None]
        self.in_place += [name for name in values if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and "src" not in values):
            self.in_place.append(tag)


def test_the_page_and_its_files_come_as_they_are(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == (FOLDER / "index.html").read_bytes()
    for name in FILES:
        response = client.get(f"/playground/{name}")
        assert response.status_code == 200
        assert response.headers["content-type"] == TYPES[Path(name).suffix]
        assert response.content == (FOLDER / name).read_bytes()


@pytest.mark.parametrize("place", PLACES)
def test_a_browser_is_held_to_this_host(client: TestClient, place: str) -> None:
    headers = client.get(place).headers
    policy = dict(rule.strip().partition(" ")[::2] for rule in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("place", PLACES)
def test_what_a_browser_has_is_not_sent_again(client: TestClient, place: str) -> None:
    first = client.get(place)
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get(place, headers={"If-None-Match": known})
        assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == tag
    assert client.get(place, headers={"If-None-Match": '"other"'}).content == first.content


def test_tags_are_of_the_content(client: TestClient) -> None:
    tags = [client.get(place).headers["etag"] for place in PLACES]
    assert len(set(tags)) == len(PLACES)
    assert tags == [client.get(place).headers["etag"] for place in PLACES]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_it_is_only_read(client: TestClient, method: str) -> None:
    for place in ("/", "/playground/main.js"):
        response = client.request(method, place)
        assert response.status_code == 405 and "error" in response.json()


@pytest.mark.parametrize(
    "name",
    [
        "nothing.js",
        "__init__.py",
        "index.html",
        "..%2fhttp.py",
        "..%2f..%2fsettings.py",
        "%2e%2e/http.py",
        "..%5chttp.py",
        "%2fetc%2fpasswd",
        "main.js%00.css",
        "",
    ],
)
def test_nothing_else_is_handed_out(client: TestClient, name: str) -> None:
    response = client.get(f"/playground/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("prefix", ["", "/models/tiny"])
def test_behind_a_prefix_every_address_leads_to_a_file(service: ChatService, prefix: str) -> None:
    """Addresses are relative to a page that ends with a slash; one without it is sent there."""
    client = TestClient(create_app(service), root_path=prefix, base_url="http://testserver")
    page = client.get(f"{prefix}/")
    parser = Addresses()
    parser.feed(page.text)
    assert parser.in_place == []
    assert len(parser.loads) >= 3
    for address in parser.loads:
        assert re.fullmatch(r"[a-z/.]+", address) and not address.startswith("/")
        assert client.get(f"{prefix}/{address}").status_code == 200
    if prefix:
        moved = client.get(prefix, follow_redirects=False)
        assert moved.status_code == 307 and moved.headers["location"] == f"http://testserver{prefix}/"


def test_modules_import_what_is_there_and_nothing_far_away() -> None:
    for path in FOLDER.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for imported in re.findall(r'from "([^"]+)"', text):
            assert imported.startswith("./") and (FOLDER / imported).is_file(), (path.name, imported)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), path.name
    for path in FOLDER.iterdir():
        if path.suffix in {*TYPES, ".html"}:
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "http" not in re.sub(r"http-equiv", "", text), path.name
            assert len(text.splitlines()) <= 300, path.name


def test_the_page_is_no_part_of_the_api(client: TestClient) -> None:
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path == "/" or "playground" in path]


def test_the_page_is_told_what_every_decoder_has_to_set(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    told = card["settings_by_decoder"]
    assert list(told) == card["decoders"]
    assert told[card["decoder"]] == card["decoder_settings"]
    assert {name for name, settings in told.items() if "entropy_threshold" in settings} == {
        "d3llm",
        "d3llm-nocache",
        "dparallel",
    }
    assert told["d3llm"]["cache_delay"] == 1 and "cache_delay" not in told["vanilla"]
    assert {settings["block_size"] for settings in told.values()} == {16}
