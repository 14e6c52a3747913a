"""The watch over pages itself: every kind of complaint is noticed."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.accessibility import violations
from tests.browser.visits import Visits, assert_fits_the_width

POLICY = "<meta http-equiv='Content-Security-Policy' content=\"script-src 'nonce-own'; img-src 'none'\">"


def content(body: str) -> str:
    """Return a page with a policy."""
    head = f"<head><title>t</title>{POLICY}</head>"
    return f"<!DOCTYPE html><html lang='en'>{head}<body>{body}</body></html>"


def page_of(visits: Visits, body: str) -> Page:
    """Open a page with a body of HTML."""
    page = visits.open("about:blank")
    page.set_content(content(body))
    return page


WRONG = """
<script nonce='own'>console.error('so wrong')</script>
<script nonce='own'>missing()</script>
<script>var hidden = 1</script>
<img src='data:image/png;base64,AA==' alt=''>
<script nonce='own'>fetch('http://127.0.0.1:9/x').catch(() => console.error('last'))</script>
"""
NOTICED = (
    "console: so wrong",
    "uncaught: missing is not defined",
    "script-src",
    "img-src",
    "request: GET http://127.0.0.1:9/x",
)


def test_complaints_are_noticed(browser: Browser) -> None:
    """One of each kind; unless all are allowed the test fails."""
    visits = Visits(browser, "visits-wrong")
    page = page_of(visits, "")
    with page.expect_console_message(lambda line: line.text == "last"):
        page.set_content(content(WRONG))
    visits.close()
    for text in NOTICED:
        assert any(text in complaint for complaint in visits.complaints), visits.complaints
    with pytest.raises(AssertionError):
        visits.assert_no_complaints()
    visits.allow(".*")
    visits.assert_no_complaints()


def test_violations_of_accessibility_are_found(visits: Visits) -> None:
    """A picture without a text and pale grey letters, under a policy that lets no script in."""
    visits.allow("Content Security Policy")
    page = page_of(visits, "<main><h1>x</h1><img src='x.png'><p style='color: #ccc'>pale</p></main>")
    found = " ".join(violations(page))
    assert "image-alt" in found
    assert "color-contrast" in found
    assert "image-alt" not in " ".join(violations(page, colours_alone=True))


def test_what_is_too_wide_is_found(visits: Visits) -> None:
    """Unless it scrolls by itself."""
    page = page_of(visits, "<div style='overflow-x: auto'><p style='width: 5000px'>x</p></div>")
    assert_fits_the_width(page)
    page.evaluate("() => { document.querySelector('p').parentElement.style.overflow = 'visible'; }")
    with pytest.raises(AssertionError, match="5000px"):
        assert_fits_the_width(page)
