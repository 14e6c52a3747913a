"""Which tests the fast lane leaves out: those that start processes, run models or search for long."""

from __future__ import annotations

import pytest

SLOW = (
    "tests/browser/",
    "tests/distributed/",
    "tests/gpu_benchmarks/test_ranks.py",
    "tests/change/",
    "tests/checkpoint/test_families.py",
    "tests/cli/test_batch_cli.py",
    "tests/cli/test_change_cli.py",
    "tests/cli/test_plan_",
    "tests/cli/test_spread_cli.py",
    "tests/notebooks/",
    "tests/runtime/loop/",
    "tests/runtime/measure/test_calibrate.py",
    "tests/runtime/migration/",
    "tests/runtime/parallel/",
    "tests/runtime/test_families.py",
    "tests/runtime/test_hook.py",
    "tests/service/",
    "tests/test_bounds",
    "tests/traces/test_record_",
    "tests/traces/test_bad_input.py",
)
"""Beginnings of paths."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
