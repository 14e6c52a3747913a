"""Notebook 2 runs from scratch, on the sample and on another trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.notebooks.running import check_notebook, other_trace

pytestmark = pytest.mark.slow


def test_it_runs_on_the_sample() -> None:
    """No error, no warning, a page that fetches nothing."""
    check_notebook("2-placement", least_figures=5)


def test_it_runs_on_another_trace(tmp_path: Path) -> None:
    """A user's own trace goes in by the parameters."""
    check_notebook("2-placement", least_figures=5, TRACE=str(other_trace(tmp_path)), WINDOW_TOKENS=256)
