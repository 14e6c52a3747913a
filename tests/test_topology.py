"""Tests of topologies: shorthand, YAML file, validation, round trip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from placement.devices import DEVICE_KINDS, device_kind
from placement.errors import InputError
from placement.tier import ACROSS_LATENCY_S, NODE_LATENCY_S
from placement.topology import Tier, Topology, parse_shorthand, parse_topology


def tier(name: str, groups: list[int], **other: Any) -> Tier:
    return Tier(
        **{"name": name, "group_D": groups, "bandwidth_D": [1e9] * len(groups), "latency_s": 1e-4, **other}
    )


def topology(*tiers: Tier, **other: Any) -> Topology:
    num_devices = tiers[0].group_D.size
    given: dict[str, Any] = {"name": "test", "kinds": (DEVICE_KINDS["h100"],), "tiers": tiers}
    return Topology(**{**given, "kind_of_device_D": [0] * num_devices, **other})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def assert_same(a: Topology, b: Topology) -> None:
    """Compare every device's kind, limits and tiers; bandwidths to rounding in the file's units."""
    assert (a.name, a.optical_switch, a.num_tiers) == (b.name, b.optical_switch, b.num_tiers)
    assert [a.kind_of(d) for d in range(a.num_devices)] == [b.kind_of(d) for d in range(b.num_devices)]
    for left, right in ((a.slots_D, b.slots_D), (a.memory_bytes_D, b.memory_bytes_D)):
        assert (None if left is None else left.tolist()) == (None if right is None else right.tolist())
    for inner, outer in zip(a.tiers, b.tiers, strict=True):
        assert (inner.name, inner.ports) == (outer.name, outer.ports)
        assert np.array_equal(inner.group_D, outer.group_D)
        np.testing.assert_allclose(inner.bandwidth_D, outer.bandwidth_D, rtol=1e-15)
        assert inner.latency_s == pytest.approx(outer.latency_s, rel=1e-12)
        assert inner.bandwidth_efficiency == outer.bandwidth_efficiency


# ---------------------------------------------------------------------------------------------- presets


def test_h100_preset_is_the_data_sheet() -> None:
    """An H100 has 989 TFLOP/s peak, 794.5 achieved, 80 GiB, 3.35 TB/s, 450 GB/s NVLink and 400 Gb/s."""
    h100 = device_kind("H100")
    assert (h100.peak_flops, h100.achieved_flops) == (989e12, 794.5e12)
    assert (h100.memory_bytes, h100.memory_bandwidth) == (80 * 2**30, 3.35e12)
    assert (h100.scale_up_bandwidth, h100.nic_bandwidth) == (450e9, 50e9)


def test_kind_without_measurement_achieves_three_quarters() -> None:
    """Where no matmul was measured, 75 % of the peak is assumed."""
    assert device_kind("v100").measured_flops is None
    assert device_kind("v100").achieved_flops == 0.75 * 125e12


def test_kinds_without_scale_up_link_use_pcie() -> None:
    """L40S and T4 talk over PCIe: gen 4 x16 is twice gen 3 x16."""
    assert device_kind("l40s").scale_up_bandwidth == 2 * device_kind("t4").scale_up_bandwidth == 31.5e9


def test_every_requested_preset_is_there() -> None:
    """The presets cover the fleets that the project plans for."""
    wanted = "v100 v100-32 a40 l40s t4 a100 a100-40 a800 h100 h800 h200 b200 gb200 mi300x mi250x-gcd"
    assert list(DEVICE_KINDS) == wanted.split()


def test_unknown_kind_names_the_nearest() -> None:
    """A misspelt kind gets a suggestion and the list."""
    with pytest.raises(InputError, match=r"unknown device kind 'h10'; did you mean 'h100'\? known: v100, .*"):
        device_kind("h10")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_kind_rejects_impossible_figures(value: float) -> None:
    """Speeds are positive and finite."""
    with pytest.raises(InputError, match="memory_bandwidth of device kind 'h100'"):
        replace(DEVICE_KINDS["h100"], memory_bandwidth=value)
    with pytest.raises(InputError, match="measured_flops of device kind 'h100'"):
        replace(DEVICE_KINDS["h100"], measured_flops=value)


# -------------------------------------------------------------------------------------------- shorthand


def test_one_node_has_one_tier() -> None:
    """One node of 8 talks over NVLink only, at 55 % of 450 GB/s."""
    parsed = parse_topology("h100:1x8")
    assert [t.name for t in parsed.tiers] == ["node"]
    assert (parsed.num_devices, parsed.num_nodes, parsed.is_homogeneous) == (8, 1, True)
    assert parsed.tiers[0].effective_bandwidth_D.tolist() == pytest.approx([247.5e9] * 8)
    assert parsed.tiers[0].latency_s == NODE_LATENCY_S


def test_single_device_is_a_topology() -> None:
    """One device is one node of one tier."""
    parsed = parse_topology("t4:1x1")
    assert (parsed.num_devices, parsed.num_tiers, parsed.tier_between(0, 0)) == (1, 1, None)


def test_two_nodes_have_two_tiers() -> None:
    """Two nodes of 2: devices 0 and 1 share a node, 1 and 2 only the cluster."""
    parsed = parse_topology("h100:2x2")
    assert [t.name for t in parsed.tiers] == ["node", "cluster"]
    assert parsed.node_of_device_D.tolist() == [0, 0, 1, 1]
    assert parsed.tiers[1].group_D.tolist() == [0, 0, 0, 0]
    assert (parsed.tier_between(0, 1), parsed.tier_between(1, 2), parsed.tier_between(3, 3)) == (0, 1, None)
    assert parsed.tiers[1].bandwidth_D.tolist() == [50e9] * 4
    assert parsed.tiers[1].latency_s == ACROSS_LATENCY_S
    assert [sizes.tolist() for sizes in parsed.group_sizes] == [[2, 2], [4]]


def test_mixed_kinds_keep_their_own_links() -> None:
    """Every device brings its own bandwidth, speed and memory."""
    parsed = parse_topology("a40:1x2 + V100:1x1")
    assert [kind.name for kind in parsed.kinds] == ["a40", "v100"]
    assert parsed.kind_of_device_D.tolist() == [0, 0, 1]
    assert parsed.tiers[0].bandwidth_D.tolist() == [56.25e9, 56.25e9, 150e9]
    assert parsed.achieved_flops_D.tolist() == [0.75 * 149.7e12] * 2 + [0.75 * 125e12]
    assert parsed.expert_memory_bytes_D.tolist() == [48 * 2**30] * 2 + [16 * 2**30]
    assert parsed.memory_bandwidth_D.tolist() == [0.696e12] * 2 + [0.90e12]
    assert not parsed.is_homogeneous


def test_same_kind_twice_is_one_kind() -> None:
    """Nodes of different size may share a kind, and are then not alike."""
    parsed = parse_topology("h100:1x4+h100:1x2")
    assert len(parsed.kinds) == 1
    assert parsed.tiers[0].group_sizes.tolist() == [4, 2]
    assert not parsed.is_homogeneous


@pytest.mark.parametrize("text", [" H100 : 2 X 8 ", "h100:2*8", "H100_SXM:2x8"])
def test_shorthand_is_tolerant(text: str) -> None:
    """Case, spaces, a star for the cross and other names of a kind are understood."""
    parsed = parse_topology(text)
    assert (parsed.num_devices, parsed.kinds[0].name) == (16, "h100")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100:8", r"'h100:8' is not KIND:NODESxDEVICES; write for example h100:2x8"),
        ("", r"'' is not KIND:NODESxDEVICES"),
        ("h100:1x2+", r"'' is not KIND:NODESxDEVICES"),
        ("h100:1.5x2", r"is not KIND:NODESxDEVICES"),
        ("h1000:1x8", r"unknown device kind 'h1000'; did you mean 'h100'"),
        ("h100:0x8", r"0 x 8 devices; both counts must be 1 or more"),
        ("h100:2x-8", r"2 x -8 devices; both counts must be 1 or more"),
        ("h100:1001x1000", r"1001 x 1000 is more than 1000000 devices"),
        ("h100:1x" + "9" * 5000, r"is more than 1000000 devices"),
        ("h100:1x600000+h100:1x600000", r"nodes hold 1200000 devices; at most 1000000"),
    ],
)
def test_malformed_shorthand_is_explained(text: str, message: str) -> None:
    """Every malformed shorthand is one line that says what and how."""
    with pytest.raises(InputError, match=message) as caught:
        parse_shorthand(text)
    assert "\n" not in str(caught.value)


def test_a_million_devices_is_the_limit() -> None:
    """The largest accepted topology is built."""
    assert parse_shorthand("h100:1000x1000").num_devices == 1_000_000


# ------------------------------------------------------------------------------------------------- YAML

FULL = """
name: two-racks
device_kinds:
  slow-nic: {base: h100, nic_gbits: 200}
  own:
    bf16_tflops: 100
    memory_gib: 32
    memory_bandwidth_tbps: 1
    scale_up_gbps: 64
    nic_gbits: 100
nodes:
  - {kind: slow-nic, devices: 2, count: 3, slots: 5, memory_gib: 40}
  - {kind: own, devices: 1, slots: 3}
tiers:
  - {name: node, latency_us: 20, efficiency: 0.6}
  - {name: rack, nodes: 2, bandwidth_gbps: [20, 20, 20, 20, 20, 20, 10]}
  - {name: cluster, bandwidth_gbps: 5, latency_us: 500, ports: 8}
optical_switch: {ports: 500, anything: [1, 2]}
"""


def test_yaml_describes_everything(tmp_path: Path) -> None:
    """Kinds, limits, tiers and the switch arrive in SI units."""
    parsed = parse_topology(write(tmp_path / "cluster.yaml", FULL))
    assert (parsed.name, parsed.num_devices, parsed.num_nodes, parsed.num_tiers) == ("two-racks", 7, 4, 3)
    assert [kind.name for kind in parsed.kinds] == ["slow-nic", "own"]
    assert (parsed.kinds[0].nic_bandwidth, parsed.kinds[0].measured_flops) == (25e9, 794.5e12)
    assert parsed.kinds[1].achieved_flops == 75e12
    assert parsed.slots_D is not None
    assert parsed.slots_D.tolist() == [5] * 6 + [3]
    assert parsed.expert_memory_bytes_D.tolist() == [40 * 2**30] * 6 + [32 * 2**30]
    assert parsed.tiers[0].bandwidth_D.tolist() == [450e9] * 6 + [64e9]
    assert (parsed.tiers[0].latency_s, parsed.tiers[0].bandwidth_efficiency) == (20e-6, 0.6)
    assert parsed.tiers[1].group_D.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert parsed.tiers[1].bandwidth_D.tolist() == [20e9] * 6 + [10e9]
    assert (parsed.tiers[2].latency_s, parsed.tiers[2].ports) == (500e-6, 8)
    assert parsed.optical_switch == {"ports": 500, "anything": [1, 2]}
    assert [parsed.tier_between(0, d) for d in (1, 2, 4)] == [0, 1, 2]


def test_yaml_name_defaults_to_the_file(tmp_path: Path) -> None:
    """A minimal file needs only nodes."""
    parsed = parse_topology(write(tmp_path / "lab.yml", "nodes: [{kind: a100, devices: 4}]"))
    assert (parsed.name, parsed.num_devices, parsed.num_tiers) == ("lab", 4, 1)


def test_existing_file_of_any_name_is_read(tmp_path: Path) -> None:
    """A path needs no .yaml ending where the file exists."""
    path = write(tmp_path / "cluster", "nodes: [{kind: a100, devices: 4}]")
    assert parse_topology(str(path)).num_devices == 4


def test_mixed_node_is_joined_by_groups() -> None:
    """Two kinds in one node are two entries joined by groups on the first tier."""
    parsed = Topology.from_dict(
        {
            "nodes": [{"kind": "a40", "devices": 1, "count": 2}, {"kind": "v100", "devices": 2}],
            "tiers": [{"name": "node", "groups": [0, 1, 0, 1]}, {"name": "cluster"}],
        }
    )
    assert parsed.num_nodes == 2
    assert parsed.tier_between(0, 2) == 0
    assert_same(parsed, Topology.from_dict(parsed.to_dict()))


def test_new_peak_drops_the_presets_measurement() -> None:
    """What a preset's chip achieves says nothing of another peak."""
    parsed = Topology.from_dict(
        {"device_kinds": {"x": {"base": "h100", "bf16_tflops": 100}}, "nodes": [{"kind": "x", "devices": 1}]}
    )
    assert parsed.kinds[0].achieved_flops == 75e12


BAD_YAML = [
    ("[]", r"the top level must be a mapping, not \[\]"),
    ("", r"the top level must be a mapping, not None"),
    ("nodes: [", r"is not valid YAML: line 1 column 9"),
    ("nodes: 1\nnodes: 2", r"is not valid YAML: line 2 column 1: 'nodes' is given twice"),
    ("when: 2024-13-45", r"is not valid YAML: month must be in 1..12"),
    ("[" * 5000, r"is not valid YAML: nested too deeply"),
    ("nodes: !!python/object:os.system [x]", r"is not valid YAML: .*could not determine a constructor"),
    ("name: x", r"nodes is missing"),
    ("nodse: []", r"the top level has the unknown key 'nodse'; did you mean 'nodes'\?"),
    ("nodes: []", r"nodes must be a list that is not empty, not \[\]"),
    ("nodes: [3]", r"nodes\[0\] must be a mapping, not 3"),
    ("nodes: [{kind: h100}]", r"nodes\[0\]\.devices is missing"),
    (
        "nodes: [{kind: h100, devices: two}]",
        r"nodes\[0\]\.devices must be an integer from 1 to .*, not 'two'",
    ),
    ("nodes: [{kind: h100, devices: 0}]", r"nodes\[0\]\.devices must be an integer from 1"),
    ("nodes: [{kind: h100, devices: true}]", r"nodes\[0\]\.devices must be an integer"),
    ("nodes: [{kind: h100, devices: 1, slots: -1}]", r"nodes\[0\]\.slots must be an integer from 0"),
    (
        "nodes: [{kind: h100, devices: 1, slot: 1}]",
        r"nodes\[0\] has the unknown key 'slot'; did you mean 'slots'",
    ),
    (
        "nodes: [{kind: h10, devices: 1}]",
        r"nodes\[0\]\.kind is the unknown device kind 'h10'; did you mean 'h100'",
    ),
    ("nodes: [{kind: 7, devices: 1}]", r"nodes\[0\]\.kind must be a text, not 7"),
    ("nodes: [{kind: h100, devices: 1, memory_gib: .nan}]", r"memory_gib must be a positive number"),
    (
        "nodes: [{kind: h100, devices: 1, memory_gib: 1.0e+300}]",
        r"memory_gib must be a positive number up to",
    ),
    ("nodes: [{kind: h100, devices: 1, memory_gib: 1.0e-30}]", r"memory_bytes_D of device 0 is 0"),
    (
        "nodes: [{kind: h100, devices: 1, slots: 1}, {kind: h100, devices: 1}]",
        r"nodes\[1\]\.slots is missing; give it for all nodes or for none",
    ),
    (
        "{device_kinds: {x: {bf16_tflops: 1}}, nodes: [{kind: x, devices: 1}]}",
        r"device_kinds\.x\.memory_gib is missing; give it, or a base",
    ),
    (
        "{device_kinds: {x: {base: h1000}}, nodes: [{kind: x, devices: 1}]}",
        r"device_kinds\.x\.base is the unknown device kind 'h1000'; did you mean 'h100'",
    ),
    (
        "{device_kinds: {1: {}}, nodes: [{kind: h100, devices: 1}]}",
        r"device_kinds must be a mapping with text keys",
    ),
    ("{optical_switch: 3, nodes: [{kind: h100, devices: 1}]}", r"optical_switch must be a mapping"),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML)
def test_wrong_yaml_is_explained(tmp_path: Path, text: str, message: str) -> None:
    """Every wrong file is one line with the file, the place and the value."""
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(InputError, match=message) as caught:
        parse_topology(path)
    assert "\n" not in str(caught.value)


FOUR_NODES = {"nodes": [{"kind": "h100", "devices": 2, "count": 4}]}
BAD_TIERS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"name": "node"}], r"the last tier 'node' has 4 groups; add a tier that joins all devices"),
    ([{"name": "rack", "nodes": 2}, {"name": "all"}], r"tiers\[0\]\.nodes is given, but the first tier"),
    ([{"name": "node"}, {"name": "rack"}, {"name": "all"}], r"tiers\[1\]\.nodes is missing"),
    ([{"name": "node"}, {"name": "node"}], r"tier 'node' is given twice"),
    ([{"name": "node"}, {"name": "all", "nodes": 2}], r"the last tier 'all' has 2 groups"),
    (
        [{"name": "n"}, {"name": "a", "nodes": 3}, {"name": "b", "groups": [0, 0, 1, 1]}, {"name": "c"}],
        r"group 0 of tier 'a' is split over groups of tier 'b' \(device 4\)",
    ),
    ([{"name": "n"}, {"name": "all", "groups": [0, 0]}], r"groups has 2 numbers; there are 4 nodes"),
    (
        [{"name": "n"}, {"name": "all", "groups": [0, 0, 9, 9]}],
        r"names group 9; 4 nodes have at most groups 0..3",
    ),
    (
        [{"name": "n"}, {"name": "all", "groups": [0, 0, -1, 0]}],
        r"tiers\[1\]\.groups\[2\] must be an integer of 0",
    ),
    (
        [{"name": "n"}, {"name": "all", "groups": [0, 0, 2, 2]}],
        r"groups of tier 'all' must be numbered 0\.\.1",
    ),
    (
        [{"name": "n"}, {"name": "all", "nodes": 4, "groups": [0] * 4}],
        r"tiers\[1\] gives both nodes and groups",
    ),
    ([{"name": "n", "bandwidth_gbps": 0}, {"name": "all"}], r"tiers\[0\]\.bandwidth_gbps must be a positive"),
    (
        [{"name": "n", "bandwidth_gbps": [1, 2]}, {"name": "all"}],
        r"bandwidth_gbps has 2 figures; .* 8 devices",
    ),
    (
        [{"name": "n", "bandwidth_gbps": [1] * 7 + ["x"]}, {"name": "all"}],
        r"bandwidth_gbps\[7\] must be a positive",
    ),
    (
        [{"name": "n", "efficiency": 1.5}, {"name": "all"}],
        r"tiers\[0\]\.efficiency must be a share of at most 1",
    ),
    ([{"name": "n", "latency_us": -1}, {"name": "all"}], r"tiers\[0\]\.latency_us must be a number from 0"),
    ([{"latency_us": 1}], r"tiers\[0\]\.name is missing"),
]


@pytest.mark.parametrize(("tiers", "message"), BAD_TIERS)
def test_wrong_tiers_are_explained(tiers: list[dict[str, Any]], message: str) -> None:
    """Tiers must nest, join all devices, and carry sane figures."""
    with pytest.raises(InputError, match=message):
        Topology.from_dict({**FOUR_NODES, "tiers": tiers})


def test_number_without_a_dot_is_a_number() -> None:
    """YAML 1.1 reads 1e1 as text; it is taken for 10."""
    values = yaml.safe_load("{nodes: [{kind: h100, devices: 1}], tiers: [{name: n, bandwidth_gbps: 1e1}]}")
    assert Topology.from_dict(values).tiers[0].bandwidth_D.tolist() == [1e10]


def test_message_about_a_self_repeating_value_is_short() -> None:
    """A value that grows when it is written out (YAML aliases) does not blow up the message."""
    value: list[Any] = ["x"]
    for _ in range(60):
        value = [value] * 9
    with pytest.raises(InputError, match="name must be a text") as caught:
        Topology.from_dict({**FOUR_NODES, "name": value})
    assert len(str(caught.value)) < 300


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A path that ends in .yaml is never taken for the shorthand."""
    with pytest.raises(InputError, match=r"topology file '.*nowhere\.yaml' cannot be read: No such file"):
        parse_topology(str(tmp_path / "nowhere.yaml"))


def test_directory_is_no_topology(tmp_path: Path) -> None:
    """A directory given as a path is a clear error."""
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        parse_topology(tmp_path)


def test_large_and_binary_files_are_refused(tmp_path: Path) -> None:
    """Nothing beyond a few MiB is read, and text must be UTF-8."""
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (4 * 2**20 + 1))
    with pytest.raises(InputError, match="is larger than 4 MiB"):
        parse_topology(large)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff")
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 6\)"):
        parse_topology(binary)


# ------------------------------------------------------------------------------------- dataclass checks


def test_arrays_are_read_only() -> None:
    """A topology cannot be changed behind its validation."""
    parsed = parse_topology("h100:2x2")
    for array in (parsed.kind_of_device_D, parsed.tiers[0].group_D, parsed.tiers[0].bandwidth_D):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_tiers_must_nest() -> None:
    """A node split over two racks is refused, naming the device."""
    with pytest.raises(InputError, match=r"group 0 of tier 'node' is split .* \(device 1\)"):
        topology(tier("node", [0, 0, 1]), tier("rack", [0, 1, 1]), tier("all", [0, 0, 0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": " "}, "a tier needs a name"),
        ({"group_D": [[0]]}, "group_D of tier 'node' must be a list of integers"),
        ({"group_D": [0.5, 1]}, "group_D of tier 'node' must be a list of integers"),
        ({"group_D": [1, 2]}, r"must be numbered 0\.\.1 without holes, not 1\.\.2"),
        ({"bandwidth_D": [1.0]}, "tier 'node' gives 1 bandwidths for 2 devices"),
        ({"bandwidth_D": [1.0, np.inf]}, "bandwidth_D of tier 'node' of device 1 is inf"),
        ({"bandwidth_D": ["a", "b"]}, "must be a list of numbers"),
        ({"latency_s": float("nan")}, "latency of tier 'node' is nan s"),
        ({"bandwidth_efficiency": 0.0}, r"it must lie in \(0, 1\]"),
        ({"ports": 0}, "tier 'node' has 0 ports"),
    ],
)
def test_tier_rejects_wrong_values(change: dict[str, Any], message: str) -> None:
    """A tier checks its own figures."""
    with pytest.raises(InputError, match=message):
        tier(**{"name": "node", "groups": [0, 0], **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ()}, "a topology needs a device kind"),
        ({"kinds": (DEVICE_KINDS["h100"],) * 2}, "device kind 'h100' is given twice"),
        ({"kind_of_device_D": [0, 1]}, r"kind_of_device_D must lie within 0\.\.0"),
        ({"kind_of_device_D": [0, 0, 0]}, "tier 'node' names 2 devices, the topology 3"),
        ({"slots_D": [1]}, "slots_D names 1 devices, not 2"),
        ({"slots_D": [1, -2]}, "slots_D of device 1 is -2; it must be 0 or more"),
        ({"memory_bytes_D": [0, 1]}, "memory_bytes_D of device 0 is 0; it must be 1 or more"),
        ({"tiers": ()}, "a topology needs a tier"),
    ],
)
def test_topology_rejects_wrong_values(change: dict[str, Any], message: str) -> None:
    """A topology checks that its parts fit together."""
    with pytest.raises(InputError, match=message):
        topology(tier("node", [0, 0]), **change)


def test_tier_between_rejects_unknown_devices() -> None:
    """Asking for a device that is not there is an error, not an index from the end."""
    with pytest.raises(InputError, match="device -1 of 2"):
        parse_topology("h100:1x2").tier_between(0, -1)


def test_limits_make_devices_unlike() -> None:
    """Devices that differ in slots alone are not alike."""
    assert topology(tier("node", [0, 0]), slots_D=[4, 4]).is_homogeneous
    assert not topology(tier("node", [0, 0]), slots_D=[4, 5]).is_homogeneous


def test_optical_switch_is_a_copy() -> None:
    """Changing the dictionary that was given does not change the topology."""
    switch = {"ports": [1]}
    built = topology(tier("node", [0]), optical_switch=switch)
    switch["ports"].append(2)
    assert built.optical_switch == {"ports": [1]}


# ------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("text", ["h100:1x8", "gb200:1x72", "a40:1x2+v100:1x2", "h100:2x4+h100:1x2+t4:3x1"])
def test_shorthand_survives_the_round_trip(text: str) -> None:
    """What the shorthand builds is written as YAML and read back."""
    built = parse_shorthand(text)
    assert_same(built, Topology.from_dict(yaml.safe_load(yaml.safe_dump(built.to_dict()))))


def test_full_file_survives_the_round_trip() -> None:
    """Own kinds, limits, racks, per-device bandwidths and the switch are kept."""
    built = Topology.from_dict(yaml.safe_load(FULL))
    assert_same(built, Topology.from_dict(built.to_dict()))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Draw nested tiers over mixed devices, with figures of no round unit."""
    num_devices = draw(st.integers(1, 8))
    figures = st.floats(1e6, 1e13, allow_nan=False)
    tiers: list[Tier] = []
    group = np.arange(num_devices)
    for name in ("node", "rack", "pod")[: draw(st.integers(0, 3))]:
        parent = draw(st.lists(st.integers(0, 2), min_size=num_devices, max_size=num_devices))
        group = np.unique(np.array(parent)[group], return_inverse=True)[1]
        bandwidth = draw(st.lists(figures, min_size=num_devices, max_size=num_devices))
        tiers.append(tier(name, group.tolist(), bandwidth_D=bandwidth, latency_s=draw(st.floats(0, 1))))
    tiers.append(tier("all", [0] * num_devices, ports=draw(st.none() | st.integers(1, 9))))
    limits = st.none() | st.lists(st.integers(1, 2**40), min_size=num_devices, max_size=num_devices)
    slots = st.none() | st.lists(st.integers(0, 9), min_size=num_devices, max_size=num_devices)
    own = replace(DEVICE_KINDS["h100"], name="own", peak_flops=draw(figures), measured_flops=None)
    return topology(
        *tiers,
        kinds=(DEVICE_KINDS["a40"], own),
        kind_of_device_D=draw(st.lists(st.integers(0, 1), min_size=num_devices, max_size=num_devices)),
        slots_D=draw(slots),
        memory_bytes_D=draw(limits),
    )


@given(topologies())
def test_any_topology_survives_the_round_trip(built: Topology) -> None:
    """Writing and reading keeps nodes, tiers, limits and figures, whatever the nesting."""
    again = Topology.from_dict(built.to_dict())
    kinds = [again.kind_of(d) for d in range(again.num_devices)]
    for device, kind in enumerate(kinds):
        expected = built.kind_of(device)
        assert (kind.name, kind.memory_bytes) == (expected.name, expected.memory_bytes)
        assert kind.achieved_flops == pytest.approx(expected.achieved_flops, rel=1e-12)
    assert_same(replace(built, kinds=again.kinds, kind_of_device_D=again.kind_of_device_D), again)


@given(topologies())
def test_tier_between_is_symmetric_and_innermost(built: Topology) -> None:
    """Two devices talk over the first tier whose group they share, from either side."""
    for a in range(built.num_devices):
        for b in range(built.num_devices):
            found = built.tier_between(a, b)
            assert found == built.tier_between(b, a)
            shared = [i for i, t in enumerate(built.tiers) if t.group_D[a] == t.group_D[b]]
            assert found == (None if a == b else shared[0])
