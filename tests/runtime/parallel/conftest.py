"""Ranks that the tests of this folder share: started once for each number of them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from ranks import Ranks, ranks


@pytest.fixture(scope="session")
def group_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Return the ranks of a world size, alive; whoever kills one gets new ones the next time."""
    started: dict[int, Ranks] = {}
    with ExitStack() as ending:

        def get(world_size: int) -> Ranks:
            group = started.get(world_size)
            if group is None or not all(process.is_alive() for process in group.processes):
                group = ending.enter_context(ranks(world_size, tmp_path_factory.mktemp("ranks")))
                started[world_size] = group
            return group

        yield get
