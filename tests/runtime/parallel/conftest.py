"""Ranks that the tests of this folder share: started once for each number of them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from ranks import Ranks, ranks

MOST_THREADS = 48
"""A process group never gives its threads back, and each wakes up a hundred times a second."""


@pytest.fixture(scope="module")
def group_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Return the ranks of a world size, alive and rested; whoever kills one gets new ones the next time."""
    started: dict[int, Ranks] = {}
    with ExitStack() as ending:

        def get(world_size: int) -> Ranks:
            group = started.get(world_size)
            if group is not None and group.num_threads() > MOST_THREADS:
                group.close()
            if group is None or not all(process.is_alive() for process in group.processes):
                group = ending.enter_context(ranks(world_size, tmp_path_factory.mktemp("ranks")))
                started[world_size] = group
            return group

        yield get
