"""Ranks that read or write files fail together, and say which of them it was."""

from __future__ import annotations

from collections.abc import Callable

import loading_checks as checks
import pytest
from ranks import Ranks

from placement.errors import InputError
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.patience import Patience


def test_one_rank_alone_needs_no_group() -> None:
    """What is raised inside comes out as it is."""
    patience = Patience(Mesh.single())
    assert patience.gather(3) == [3]
    with patience.together():
        pass
    with pytest.raises(InputError, match="no such disk"), patience.together():
        raise InputError("no such disk")


def test_all_ranks_fail_with_the_first(group_of: Callable[[int], Ranks]) -> None:
    """Ranks 1 and 2 fail by themselves; rank 0 hears of rank 1, and afterwards all go on."""
    outcomes = group_of(3).outcomes(checks.fail_together, [1, 2])
    assert [str(one) for one in outcomes] == ["rank 1: disk of 1", "disk of 1", "disk of 2"]
    assert all(isinstance(one, InputError) for one in outcomes)
    assert group_of(3).run(checks.fail_together, []) == [[0, 1, 2]] * 3
