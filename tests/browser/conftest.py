"""A browser for each test file, and pages that are watched."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.visits import CHROMIUM_ARGUMENTS, Visits, chromium

REQUIRE = "MOE_PLACEMENT_REQUIRE_CHROMIUM"
"""Set to 1 where a missing Chromium is a failure rather than a reason to skip."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    path = chromium()
    if path is None:
        reason = "Chromium is not installed: no chromium in PATH"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    # Not for the whole session: while Playwright runs, no other test of the process may start an event loop.
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def visits(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Visits]:
    """Opens pages; afterwards none of them may have complained."""
    found = Visits(
        browser, f"{request.node.path.stem.removeprefix('test_')}-{request.node.name.removeprefix('test_')}"
    )
    yield found
    found.close()
    found.assert_no_complaints()
