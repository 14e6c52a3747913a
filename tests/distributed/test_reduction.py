"""The tree of merges: its shape depends on the number of leaves, not on who is ready when."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.distributed.reduction import Node, TreeReduction


def reduce_in(order: list[int], leaves: list[Any], fan_in: int) -> Any:
    """Reduce leaves that become ready in an order; a merge shows what was merged."""
    tree = TreeReduction(len(leaves), fan_in=fan_in)
    ready: list[tuple[Node, Any]] = []
    for index in order:
        ready.append((Node(0, index), leaves[index]))
        while ready:
            node, result = ready.pop()
            merge = tree.put(node, result)
            if merge is not None:
                ready.append((merge.node, merge.parts))
    assert tree.done
    return tree.root


def flat(result: Any) -> list[Any]:
    """Return the leaves of a nested result in order."""
    if isinstance(result, tuple):
        return [leaf for part in result for leaf in flat(part)]
    return [] if result is None else [result]


@given(
    leaves=st.lists(st.one_of(st.none(), st.integers()), min_size=1, max_size=40),
    fan_in=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_the_result_does_not_depend_on_the_order(leaves: list[int | None], fan_in: int, seed: int) -> None:
    """Every order of arrival gives the same nested merges, of all leaves that are there, left to right."""
    order = list(range(len(leaves)))
    straight = reduce_in(order, leaves, fan_in)
    random.Random(seed).shuffle(order)
    assert reduce_in(order, leaves, fan_in) == straight
    assert flat(straight) == [leaf for leaf in leaves if leaf is not None]


@pytest.mark.parametrize(("leaves", "depth"), [(1, 0), (2, 1), (8, 1), (9, 2), (64, 2), (65, 3)])
def test_depth(leaves: int, depth: int) -> None:
    """Eight results a merge: the depth is the logarithm of the leaves."""
    assert TreeReduction(leaves).depth == depth


def test_shape_by_hand() -> None:
    """Five leaves, two a merge: the odd one moves up alone."""
    assert reduce_in([4, 3, 2, 1, 0], list("abcde"), 2) == ((("a", "b"), ("c", "d")), "e")
    assert reduce_in([0, 1, 2, 3, 4], ["a", None, None, None, "e"], 2) == ("a", "e")
