"""Dashboard and documentation: from this server alone, under a strict policy, without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

import httpx
import pytest

from tests.service.server import ROOT, Server

STATIC = ROOT / "service" / "api" / "static"
PAGES = ("/", "/docs", "/redoc")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of one server for all of these tests."""
    with Server(tmp_path_factory.mktemp("pages") / "data", role="api") as server, server.client() as client:
        yield client


class Loads(HTMLParser):
    """Finds what a page loads, and scripts or styles within it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names."""
        values = dict(attrs)
        if tag in {"script", "img", "link"}:
            self.urls.append(values.get("src") or values.get("href") or "")
        if (tag == "script" and "src" not in values) or tag == "style":
            self.inline.append(tag)
        self.inline += [name for name in values if name.startswith("on") or name == "style"]


@pytest.mark.parametrize("path", PAGES)
def test_pages_load_their_files_from_here(client: httpx.Client, path: str) -> None:
    """Every file is there, has the type that its name says, and nothing is written into the page."""
    page = client.get(path)
    assert page.status_code == 200
    loads = Loads(page.text)
    assert loads.inline == []
    assert loads.urls
    for url in loads.urls:
        assert "//" not in url
        found = client.get(f"/{url}")
        assert found.status_code == 200
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[url.rpartition(".")[2]]
        assert found.headers["content-type"].partition(";")[0] == kind
        assert found.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", PAGES)
def test_pages_have_a_strict_policy(client: httpx.Client, path: str) -> None:
    """Scripts of this server alone, no frames, nothing sent elsewhere."""
    text = client.get(path).headers["content-security-policy"]
    policy = dict(part.strip().partition(" ")[::2] for part in text.split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"


def test_the_dashboard_allows_no_inline_style(client: httpx.Client) -> None:
    """What our own page does not need."""
    assert "unsafe" not in client.get("/").headers["content-security-policy"]


def test_our_scripts_never_write_markup() -> None:
    """What callers named things must not become part of the page."""
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert "localStorage" not in text


def test_other_files_are_not_served(client: httpx.Client) -> None:
    """A name is looked up, never a path."""
    for name in ("dashboard.html", "..%2fapp.py", "%2e%2e/app.py", "nothing.js"):
        assert client.get(f"/assets/{name}").status_code == 404


def test_every_file_is_known(client: httpx.Client) -> None:
    """A page or script that nobody can fetch would be left over."""
    for path in STATIC.iterdir():
        if path.suffix != ".html":
            assert client.get(f"/assets/{path.name}").status_code == 200


def test_the_description_is_what_the_pages_show(client: httpx.Client) -> None:
    """Where both ask for it."""
    assert client.get("/openapi.json").json()["info"]["title"] == "moe-placement"


def test_the_dashboard_asks_for_what_is_there(client: httpx.Client) -> None:
    """Every address in its scripts is answered."""
    text = "".join(path.read_text(encoding="utf-8") for path in STATIC.glob("*.js"))
    asked = set(re.findall(r'ask\([`"]([\w/]+)', text))
    assert asked >= {"health/ready", "v1/status", "v1/solves", "v1/deployments", "v1/traces", "v1/placements"}
    for path in asked:
        if not path.endswith("/"):
            assert client.get(f"/{path}").status_code == 200


def test_probes_answer_head(client: httpx.Client) -> None:
    """Some balancers ask so."""
    for path in ("/health/live", "/health/ready"):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
