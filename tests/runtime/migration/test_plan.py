"""The dry run: bytes, seconds and memory of a change that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from placement.errors import InputError
from placement.plan import Placement
from placement.runtime.migration.plan import link_rates, plan_migration
from placement.runtime.migration.schedule import schedule_migration
from placement.runtime.migration.stages import ALIGNMENT, LINE_BYTES
from placement.topology import parse_shorthand

# Layer 0: devices 0 and 1 swap experts 1 and 2. Layer 1: devices 1 and 2 get a replica of expert 0.
BEFORE = Placement(
    physical_to_logical_map_LS=np.array([[0, 1, 2, -1, 3, -1], [0, 1, 2, -1, 3, -1]]),
    device_of_slot_S=np.repeat(np.arange(3), 2),
    num_experts=4,
    num_devices=3,
)
AFTER = BEFORE.with_layers(np.array([[0, 2, 1, -1, 3, -1], [0, 1, 2, 0, 3, 0]]))
SIZES = {"up": 600, "up.exp_avg": 400}
MESSAGE = LINE_BYTES + ALIGNMENT
"""One expert with the space behind it, and its checksum."""


def test_bytes_memory_and_seconds() -> None:
    """Four copies of 1,000 bytes: one round a layer; in layer 1 device 0 sends two."""
    schedule = schedule_migration(BEFORE, AFTER)
    plan = plan_migration(schedule, [SIZES] * 2, rate_DD=link_rates(3, gb_per_s=1e-6))
    assert (plan.num_moves, plan.num_rounds, plan.total_bytes) == (4, 2, 4000)
    assert plan.bytes_by_tensor == {"up": 2400, "up.exp_avg": 1600}
    assert plan.sent_bytes_D.tolist() == [3000, 1000, 0]
    assert plan.received_bytes_D.tolist() == [1000, 2000, 1000]
    # In layer 0 two ranks send one and receive one; what device 0 sends twice in layer 1 is packed once.
    assert plan.peak_bytes_D.tolist() == [2 * MESSAGE, 2 * MESSAGE, MESSAGE]
    assert plan.seconds == pytest.approx(
        1.0 + 2.0
    )  # 1 kB/s: a swap both ways at once, then two from device 0
    assert plan.to_dict()["peak_extra_bytes"] == [2 * MESSAGE, 2 * MESSAGE, MESSAGE]
    assert plan.describe().splitlines() == [
        "4 copies of experts in 2 of 2 layers, in 2 rounds",
        "4 kB in all, 2 kB into the busiest rank, 3 s of transfer",
        "16.4 kB of extra memory on the fullest rank (1 expert at a time)",
        "  up          2.4 kB",
        "  up.exp_avg  1.6 kB",
    ]


def test_all_at_once_needs_more_memory() -> None:
    """Device 1 holds both of its experts until the switch; by turns two buffers send what is cut up."""
    schedule = schedule_migration(BEFORE, AFTER, commit="all")
    plan = plan_migration(schedule, [{"up": 12_000}] * 2)
    assert (plan.num_moves, plan.num_rounds) == (4, 1)
    whole, two, half = (lines * LINE_BYTES + ALIGNMENT for lines in (2, 3, 1))
    assert plan.peak_bytes_D.tolist() == [whole + two + whole, two + whole, whole]
    assert plan.seconds is None
    # Device 0 sends halves of two experts in the first stages, and goes on with one of them.
    plan = plan_migration(schedule, [{"up": 12_000}] * 2, chunk_bytes=12_000)
    assert plan.peak_bytes_D.tolist()[1] == 2 * whole + whole
    plan = plan_migration(schedule, [{"up": 12_000}] * 2, chunk_bytes=6_000)
    assert plan.peak_bytes_D.tolist() == [2 * half + 4 * half, 4 * half + 2 * half, 2 * half]


def test_turning_rows_takes_one_expert() -> None:
    """Two rows that change places need one of them put aside."""
    turned = BEFORE.with_layers(np.array([[1, 0, 2, -1, 3, -1], [0, 1, -1, 2, 3, -1]]))
    plan = plan_migration(schedule_migration(BEFORE, turned, exact_rows=True), [SIZES] * 2)
    assert (plan.num_moves, plan.num_rounds) == (0, 1)
    assert plan.peak_bytes_D.tolist() == [608 + 400, 0, 0]


def test_nothing_to_do() -> None:
    """The placement that runs."""
    plan = plan_migration(
        schedule_migration(BEFORE, BEFORE), [SIZES] * 2, rate_DD=link_rates(3, gb_per_s=1.0)
    )
    assert plan.seconds == 0
    assert plan.describe() == "nothing to migrate: every device holds what it needs"


def test_rates_follow_the_tiers() -> None:
    """Inside a node NVLink's achieved rate, across the adapter's."""
    topology = parse_shorthand("h100:2x2")
    rate_DD = link_rates(4, topology=topology)
    assert rate_DD is not None
    node, cluster = (tier.effective_bandwidth_D[0] for tier in topology.tiers)
    assert rate_DD[0].tolist() == [node, node, cluster, cluster]
    assert link_rates(4) is None


def test_what_does_not_fit_is_named() -> None:
    """Bytes of other layers, a rate that is none."""
    with pytest.raises(InputError, match="bytes of 1 layers for 2 layers"):
        plan_migration(schedule_migration(BEFORE, AFTER), [SIZES])
    with pytest.raises(InputError, match="rate of 0 GB/s"):
        link_rates(3, gb_per_s=0)
