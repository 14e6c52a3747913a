"""Pages that are watched: whatever a visitor's browser complains about is a failure of the test.

``from tests.browser.visits import Visits``; tests take the fixture `visits`. Each page is a context of its
own, as a fresh profile is. Its console, uncaught errors and requests are listened to from the first line on,
and it leaves a screenshot behind when its test is over.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect

__all__ = ["CHROMIUM_ARGUMENTS", "PHONE", "SHOTS", "Visits", "assert_fits_the_width", "chromium"]

SHOTS = Path(os.environ.get("MOE_PLACEMENT_SHOTS", Path(__file__).parents[2] / "screenshots"))
"""Folder of the screenshots, which nobody commits."""
CHROMIUM_ARGUMENTS = ("--no-sandbox", "--disable-dev-shm-usage", "--font-render-hinting=none")
"""As root and in containers with little shared memory."""
WIDTH, HEIGHT = 1280, 900
PHONE = 390
"""Width of a phone in CSS pixels."""
PATIENCE_S = 20.0
"""How long something on a page may take on a machine that does much else."""

expect.set_options(timeout=1000 * PATIENCE_S)


def chromium() -> str | None:
    """Return the path of Chromium, as Debian packages it; None if it is not installed."""
    return shutil.which("chromium")


class Visits:
    """Opens pages, and at the end asserts that none of them complained.

    Parameters
    ----------
    browser
        Where the pages are opened.
    name
        Of the test, for the names of its screenshots.
    """

    def __init__(self, browser: Browser, name: str) -> None:
        self._browser = browser
        self._name = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
        self._allowed: list[re.Pattern[str]] = []
        self._contexts: list[BrowserContext] = []
        self._num_shots = 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        """URLs of everything that was asked for, in order."""

    def open(
        self,
        url: str,
        *,
        width: int = WIDTH,
        height: int = HEIGHT,
        dark: bool = False,
        offline: bool = False,
        bypass_csp: bool = False,
    ) -> Page:
        """Return a page at a URL, once it and what it loads are there.

        Parameters
        ----------
        width, height
            Of the window in CSS pixels; phones' width comes with their touch screen.
        offline
            Whether the network is cut off.
        bypass_csp
            Whether the page's content security policy is ignored, for tools that run in it.
        """
        context = self._browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            has_touch=width <= PHONE,
            offline=offline,
            bypass_csp=bypass_csp,
            locale="en-GB",
        )
        context.set_default_timeout(1000 * PATIENCE_S)
        self._contexts.append(context)
        page = context.new_page()
        self._watch(page)
        page.goto(url)
        return page

    def allow(self, *patterns: str) -> None:
        """Say which complaints this very test provokes, as regular expressions."""
        self._allowed += [re.compile(pattern) for pattern in patterns]

    def shot(self, page: Page, what: str, *, whole: bool = False) -> Path:
        """Keep a picture of a page (`whole`: beyond the window, too)."""
        self._num_shots += 1
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{self._name}-{self._num_shots:02d}-{what}.png"
        page.screenshot(path=path, full_page=whole)
        return path

    def close(self) -> None:
        """Close all pages, a last picture of each taken."""
        for context in self._contexts:
            for page in context.pages:
                self.shot(page, "end")
            context.close()

    def assert_no_complaints(self) -> None:
        """Nothing went wrong in any page but what the test allowed."""
        left = [text for text in self.complaints if not any(p.search(text) for p in self._allowed)]
        assert left == []

    def _watch(self, page: Page) -> None:
        # Violations of the content security policy are errors in the console, with their directive.
        page.on("console", self._said)
        page.on("pageerror", lambda error: self._complain("uncaught", str(error)))
        page.on("crash", lambda _: self._complain("crash", page.url))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", self._request_failed)

    def _said(self, line: ConsoleMessage) -> None:
        if line.type == "error":
            self._complain("console", line.text)

    def _request_failed(self, request: Request) -> None:
        # The page itself gives up what it no longer needs, such as the events of a view that was left.
        if request.failure != "net::ERR_ABORTED":
            self._complain("request", f"{request.method} {request.url}: {request.failure}")

    def _complain(self, kind: str, text: str) -> None:
        self.complaints.append(f"{kind}: {text}")


_TOO_WIDE = """() => {
    const width = document.documentElement.clientWidth;
    const scrolls = (element) => {
        for (let above = element; above; above = above.parentElement) {
            if (above !== document.body && above !== document.documentElement
                && getComputedStyle(above).overflowX !== "visible") return true;
        }
        return false;
    };
    const wide = [...document.body.querySelectorAll("*")].filter((element) =>
        element.getBoundingClientRect().right > width + 1 && !scrolls(element));
    return {
        width: document.documentElement.scrollWidth,
        wide: wide.slice(0, 5).map((element) => element.outerHTML.slice(0, 120)),
    };
}"""


def assert_fits_the_width(page: Page) -> None:
    """The page does not scroll sideways: what is wider scrolls by itself."""
    found: dict[str, Any] = page.evaluate(_TOO_WIDE)
    width = page.viewport_size["width"] if page.viewport_size else WIDTH
    assert found["width"] <= width, found["wide"]
