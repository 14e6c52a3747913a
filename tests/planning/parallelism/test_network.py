"""All-to-all, all-reduce and sends over the tiers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.calibration import DataSheetCalibration, LinearCalibration
from placement.errors import InputError
from placement.model_shape import ModelShape
from placement.planning.parallelism import Exchange, ParallelismQuestion, TrainingJob
from placement.planning.parallelism.network import Network, members_per_level, network_of
from placement.planning.parallelism.piper import all_to_all_bound_s
from placement.planning.transformer import TransformerShape
from placement.topology import Topology, parse_topology

# A token takes 2 * 500 = 1000 bytes.
MODEL = ModelShape(name="m", num_layers=1, num_experts=64, top_k=4, hidden_size=500, expert_hidden_size=8)


def network(*, nodes: int = 4, devices: int = 4, message_us: float = 0.0, latency_us: float = 0.0) -> Network:
    """Return nodes at 100 GB/s inside and 10 GB/s across, nothing lost."""
    tiers: list[dict[str, Any]] = [
        {"name": "node", "bandwidth_gbps": 100, "latency_us": latency_us, "efficiency": 1},
        {"name": "cluster", "bandwidth_gbps": 10, "latency_us": latency_us, "efficiency": 1},
    ]
    values = {
        "name": "test",
        "nodes": [{"kind": "a100", "devices": devices, "count": nodes}],
        "tiers": tiers if nodes > 1 else tiers[:1],
    }
    topology = Topology.from_dict(values, source="test")
    return network_of(topology, DataSheetCalibration(), MODEL, message_s=message_us * 1e-6)


@pytest.mark.parametrize(
    ("sizes", "count", "stride", "members"),
    [
        ((8, 64), 4, 1, (4, 4)),
        ((8, 64), 16, 1, (8, 16)),
        ((8, 64), 4, 2, (4, 4)),
        ((8, 64), 16, 2, (4, 16)),
        ((8, 64), 4, 8, (1, 4)),
        # Groups of 12 begin at 0, 12, 24, ...: within nodes of 8 only blocks of 4 never straddle.
        ((8, 96), 12, 1, (4, 12)),
    ],
)
def test_members_of_a_group(
    sizes: tuple[int, ...], count: int, stride: int, members: tuple[int, ...]
) -> None:
    """How many members share a node and the cluster."""
    assert members_per_level(sizes, count=count, stride=stride) == members


def test_exchange_by_hand() -> None:
    """Flat is the slower of both tiers; hierarchical adds the redistribution and saves messages."""
    net = network(message_us=100.0)
    # 16,000 pairs on 16 devices in 4 nodes: 3,000 from the own node, 12,000 from others.
    # Node: 3 MB at 100 GB/s, both ways 60 us; cluster: 12 MB at 10 GB/s, both ways 2.4 ms.
    # Messages: 12 to remote devices or 3 to other nodes, both ways, 100 us each.
    flat = net.exchange_s(16_000, count=16, stride=1, exchange=Exchange.FLAT)
    assert flat == pytest.approx(2.4e-3 + 2 * 12 * 100e-6)
    hierarchical = net.exchange_s(16_000, count=16, stride=1, exchange=Exchange.HIERARCHICAL)
    assert hierarchical == pytest.approx(2.4e-3 + 2 * 3 * 100e-6 + 2 * 12e6 / 100e9)
    # Within a node: 16,000 pairs on 4 devices, 12,000 from the others.
    inside = net.exchange_s(16_000, count=4, stride=1, exchange=Exchange.FLAT)
    assert inside == pytest.approx(2 * 12e6 / 100e9)
    assert net.exchange_s(16_000, count=1, stride=1, exchange=Exchange.FLAT) == 0.0


def test_three_tiers_by_hand() -> None:
    """What leaves the rack passes the rack's tier too; expert parallelism keeps to the rack by default."""
    values = {
        "name": "racks",
        "nodes": [{"kind": "a100", "devices": 2, "count": 4}],
        "tiers": [
            {"name": "node", "bandwidth_gbps": 100, "latency_us": 0, "efficiency": 1},
            {"name": "rack", "nodes": 2, "bandwidth_gbps": 20, "latency_us": 0, "efficiency": 1},
            {"name": "cluster", "bandwidth_gbps": 10, "latency_us": 0, "efficiency": 1},
        ],
    }
    topology = Topology.from_dict(values, source="test")
    net = network_of(topology, DataSheetCalibration(), MODEL, message_s=0.0)
    # 8,000 pairs on 8 devices: 6,000 leave the node (6 MB at 20 GB/s: 0.3 ms), 4,000 the rack (4 MB at
    # 10 GB/s: 0.4 ms), both ways.
    seconds = net.exchange_s(8_000, count=8, stride=1, exchange=Exchange.FLAT)
    assert seconds == pytest.approx(2 * 0.4e-3)
    # A rack's four devices: 2,000 of 4,000 pairs leave the node.
    assert net.exchange_s(4_000, count=4, stride=1, exchange=Exchange.FLAT) == pytest.approx(2 * 0.1e-3)
    job = TrainingJob(
        transformer=TransformerShape(moe=MODEL, num_attention_heads=1), sequence_length=1, global_batch=1
    )
    assert ParallelismQuestion(job=job, topology=topology).fast_domain_devices == 4
    assert ParallelismQuestion(job=job, topology=parse_topology("a100:4x2")).fast_domain_devices == 8
    assert ParallelismQuestion(job=job, topology=topology, fast_domain=2).fast_domain_devices == 2


def test_large_messages_gain_nothing_from_hierarchy() -> None:
    """Without a cost for messages, HALO's redistribution only adds time in this model."""
    net = network()
    flat, hierarchical = (
        net.exchange_s(16_000, count=16, stride=1, exchange=exchange) for exchange in Exchange
    )
    assert hierarchical > flat


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 8), length=st.integers(1, 4096), nodes=st.integers(2, 8),
    message_us=st.floats(0, 50), exchange=st.sampled_from(Exchange),
)  # fmt: skip
def test_piper_bound_holds(
    batch: int, length: int, nodes: int, message_us: float, exchange: Exchange
) -> None:
    """Dispatch and combine take no less than 4 b s k d / (EP B), less a device's message to itself.

    One device per node, so that all of it passes the adapters; b is the group's: EP times a device's.
    """
    net = network(nodes=nodes, devices=1, message_us=message_us, latency_us=20)
    seconds = net.exchange_s(batch * length * 4, count=nodes, stride=1, exchange=exchange)
    bound = all_to_all_bound_s(
        batch=batch * nodes, sequence_length=length, top_k=4, hidden_size=500, expert=nodes, bandwidth=10e9
    )
    assert seconds >= bound * (nodes - 1) / nodes * (1 - 1e-12)
    assert seconds <= bound + 4 * 20e-6 + 2 * nodes * message_us * 1e-6


def test_all_reduce_by_hand() -> None:
    """Rings inside nodes first, then across them on a quarter of the bytes."""
    net = network(latency_us=10)
    # 8 GB: 2 * 3/4 * 8 GB at 100 GB/s = 0.12 s; then 2 GB over 4 nodes: 2 * 3/4 * 2 GB at 10 GB/s = 0.3 s.
    assert net.all_reduce_s(8e9, count=16, stride=1) == pytest.approx(0.42 + 4 * 10e-6)
    # Every fourth device: one in each node, all 8 GB across: 1.2 s.
    assert net.all_reduce_s(8e9, count=4, stride=4) == pytest.approx(1.2 + 2 * 10e-6)
    assert net.all_reduce_s(8e9, count=1, stride=1) == 0.0


def test_sends_take_the_tier_between() -> None:
    """Neighbours in a node send at 100 GB/s, across nodes at 10 GB/s."""
    net = network(latency_us=10)
    assert net.send_s(1e9, source=0, target=3) == pytest.approx(0.01 + 10e-6)
    assert net.send_s(1e9, source=3, target=4) == pytest.approx(0.1 + 10e-6)


def test_unlike_devices_are_refused() -> None:
    """A mesh takes devices for alike, and seconds need a calibration that has them."""
    with pytest.raises(InputError, match=r"mixes devices.*use plan hetero"):
        network_of(parse_topology("a40:1x2+v100:1x2"), DataSheetCalibration(), MODEL)
    with pytest.raises(InputError, match="counts in 'cost', not in seconds"):
        network_of(parse_topology("h100:2x8"), LinearCalibration(), MODEL)
