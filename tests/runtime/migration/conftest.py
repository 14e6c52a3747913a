"""Ranks that the tests of this folder share."""

from collections.abc import Iterator

import pytest
from ranks import Ranks, ranks


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three ranks, alive for a file."""
    with ranks(3, tmp_path_factory.mktemp("ranks")) as started:
        yield started
