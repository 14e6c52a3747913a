"""Tests of links: which groups a tier enters, and what a token adds on entering one."""

from __future__ import annotations

import numpy as np
import pytest
from instances import LINEAR, cluster, model_for, random_profile

from placement.cost.links import links_of
from placement.problem import PlacementProblem, make_problem
from placement.topology import Topology

PROFILE = random_profile(np.random.default_rng(0), experts=8)


def problem(topology: Topology, **options: object) -> PlacementProblem:
    return make_problem(PROFILE, topology, model=model_for(PROFILE), **options)  # type: ignore[arg-type]


def test_one_node_has_one_link_into_its_devices() -> None:
    """With unknown homes three of four tokens live elsewhere; with known ones all or none."""
    (link,) = links_of(problem(cluster([0, 0, 0, 0])))
    assert (link.name, link.num_groups) == ("node", 4)
    assert link.enter_HG[0].tolist() == [0.75] * 4
    np.testing.assert_array_equal(link.enter_HG[1:], 1.0 - np.eye(4))


def test_nodes_are_entered_by_all_their_devices() -> None:
    """A node of two takes in a token in halves, one on each rail; uneven nodes by their own size."""
    inner, outer = links_of(problem(cluster([0, 0, 1, 1])))
    assert [inner.name, outer.name] == ["node", "cluster"]
    assert inner.group_D.tolist() == [0, 1, 2, 3]
    assert outer.group_D.tolist() == [0, 0, 1, 1]
    assert outer.enter_HG.tolist() == [[0.25, 0.25], [0, 0.5], [0, 0.5], [0.5, 0], [0.5, 0]]
    uneven = links_of(
        problem(
            cluster([0, 0, 0, 1]),
        )
    )[1]
    np.testing.assert_allclose(uneven.enter_HG[0], [0.25 / 3, 0.75])


def test_slow_devices_take_longer() -> None:
    """Volumes are in tokens at the best device's bandwidth; a group is as fast as its slowest device."""
    topology = cluster(
        [0, 0, 1, 1], inside_gbps=[100.0, 50.0, 100.0, 25.0], across_gbps=[10.0, 10.0, 10.0, 5.0]
    )
    inner, outer = links_of(problem(topology))
    assert inner.enter_HG[0].tolist() == [0.75, 1.5, 0.75, 3.0]
    assert outer.enter_HG[0].tolist() == [0.25, 0.5]


def test_pairs_travel_to_their_device() -> None:
    """Without de-duplication every tier enters devices, from outside the tier's inner group."""
    inner, outer = links_of(problem(cluster([0, 0, 1, 1]), semantics="dispatch-nodedup"))
    assert inner.num_groups == outer.num_groups == 4
    assert outer.enter_HG[0].tolist() == [0.5] * 4
    assert outer.enter_HG[1].tolist() == [0, 0, 1, 1]


def test_linear_costs_have_one_flat_link() -> None:
    """Every token counts, at every device, whatever the tiers."""
    (link,) = links_of(problem(cluster([0, 0, 1, 1]), calibration=LINEAR))
    assert (link.enter_HG == 1.0).all()
    assert link.dispatch(3.0) == 12.0
    assert link.combine(3.0) == 0.0


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_one_device_has_nowhere_to_send(phase: str) -> None:
    """Nothing enters the only device; the phase's latency is left."""
    (link,) = links_of(problem(cluster([0])))
    assert link.enter_HG.tolist() == [[0.0], [0.0]]
    assert getattr(link, phase)(0.0) == pytest.approx(5e-6)
