"""Who gathers and who exchanges: HybridEP's Algorithm 1."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.planning.cross_dc import Level, Relation, location, message_counts, relation, relation_GG
from placement.planning.cross_dc.level import divisors


def network(*sizes: int) -> tuple[Level, ...]:
    """Return levels of some sizes."""
    return tuple(Level(name=f"level {i}", size=size, bandwidth=1e9) for i, size in enumerate(sizes))


def test_locations_follow_the_paper() -> None:
    """In 2 x 3 x 4, device 17 = 1 * 12 + 1 * 4 + 1 sits at (1, 1, 1)."""
    assert location(17, network(2, 3, 4)) == (1, 1, 1)
    assert location(23, network(2, 3, 4)) == (1, 2, 3)


def test_one_level_of_four_in_domains_of_two() -> None:
    """0-1 and 2-3 gather, 0-2 and 1-3 exchange, 0-3 and 1-2 have nothing to do with each other."""
    gather, exchange = Relation.GATHER, Relation.EXCHANGE
    expected = [
        [0, gather, exchange, 0],
        [gather, 0, 0, exchange],
        [exchange, 0, 0, gather],
        [0, exchange, gather, 0],
    ]
    assert relation_GG(network(4), (2,)).tolist() == expected


def test_devices_that_differ_at_two_levels_do_not_talk() -> None:
    """In 2 x 2, device 0 reaches device 3 by way of 1 or 2."""
    levels = network(2, 2)
    assert relation(0, 3, levels=levels, sizes=(1, 2)) is Relation.NONE
    assert relation(0, 2, levels=levels, sizes=(1, 2)) is Relation.EXCHANGE
    assert relation(0, 1, levels=levels, sizes=(1, 2)) is Relation.GATHER
    assert relation(1, 1, levels=levels, sizes=(1, 2)) is Relation.NONE


@settings(max_examples=25, deadline=None)
@given(data=st.data(), sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3))
def test_pairs_agree_with_the_counts_in_closed_form(data: st.DataObject, sizes: list[int]) -> None:
    """The matrix says the same as pair by pair, is symmetric, and adds up to the counts."""
    levels = network(*sizes)
    domains = tuple(data.draw(st.sampled_from(divisors(size))) for size in sizes)
    found = relation_GG(levels, domains)
    for a, b in itertools.product(range(len(found)), repeat=2):
        assert found[a, b] == relation(a, b, levels=levels, sizes=domains)
    counts = message_counts(levels, domains)
    assert np.array_equal(found, found.T)
    assert int((found == Relation.GATHER).sum()) == sum(count.gather for count in counts)
    assert int((found == Relation.EXCHANGE).sum()) == sum(count.exchange for count in counts)
