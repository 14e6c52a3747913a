"""An expert-parallel model changes its placement while it serves, on all ranks after the same step."""

from __future__ import annotations

from loop_checks import serve_spread, shifted
from ranks import Ranks


def test_outputs_stay_the_same(two_ranks: Ranks) -> None:
    """Two placements after another; every output is the whole model's."""
    found = two_ranks.run(serve_spread, 30, {1: 2, 2: 1})
    assert found[0]["versions"] == found[1]["versions"]
    versions = [version for version, _ in found[0]["versions"]]
    assert versions[0] == 1
    assert sorted(set(versions)) == [1, 2, 3]
    assert versions == sorted(versions)
    assert found[0]["versions"][-1] == (3, 3)
    assert max(one["worst"] for one in found) < 1e-5
    assert [one["where"] for one in found] == [shifted(1).count_LED.tolist()] * 2


def test_what_arrives_spoilt_is_moved_again(two_ranks: Ranks) -> None:
    """Two changes fail on both ranks, the third does not; no output was ever wrong."""
    found = two_ranks.run(serve_spread, 60, {1: 2}, 2)
    assert found[0]["versions"] == found[1]["versions"]
    assert found[0]["versions"][-1] == (2, 2)
    assert found[1]["left"] == 0
    assert max(one["worst"] for one in found) < 1e-5
    assert [one["where"] for one in found] == [shifted(2).count_LED.tolist()] * 2
