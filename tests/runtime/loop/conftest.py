"""Two ranks that the tests of this folder share."""

from collections.abc import Iterator

import pytest
from ranks import Ranks, ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Return two ranks, alive."""
    with ranks(2, tmp_path_factory.mktemp("ranks")) as started:
        yield started
