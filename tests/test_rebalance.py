"""Tests of the drop-in for EPLB: the same shapes and rules, more even, fewer moves."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placement.errors import InfeasibleError, InputError
from placement.rebalance import rebalance_experts
from placement.solvers import eplb
from placement.solvers.replicas import without_duplicates

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

# The example of EPLB's README: 2 layers, 12 experts in 4 groups, 16 replicas on 2 nodes of 4 GPUs.
README_WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


@st.composite
def problems(draw: st.DrawFn) -> tuple[FloatArray, int, int, int, int]:
    """Draw loads and sizes of both policies."""
    num_nodes = draw(st.sampled_from([1, 2, 4]))
    num_gpus = num_nodes * draw(st.integers(1, 3))
    num_groups = draw(st.sampled_from([1, 2, 4, 6]))
    num_experts = num_groups * draw(st.integers(1, 4))
    num_replicas = (-(-num_experts // num_gpus) + draw(st.integers(0, 2))) * num_gpus
    loads = st.integers(0, 40).map(float) | st.floats(0, 1e4, width=32)
    rows = st.lists(loads, min_size=num_experts, max_size=num_experts)
    return (
        np.array(draw(st.lists(rows, min_size=1, max_size=2))),
        num_replicas,
        num_groups,
        num_nodes,
        num_gpus,
    )


def fullest(row_R: IntArray, load_E: FloatArray, num_gpus: int) -> float:
    """Load of the fullest device when replicas share evenly."""
    share_E = load_E / np.bincount(row_R, minlength=load_E.size)
    return float(share_E[row_R].reshape(num_gpus, -1).sum(axis=1).max())


def received(after_LR: IntArray, before_LR: IntArray, num_gpus: int) -> int:
    """Replicas that devices hold now and did not before."""
    sides = (map_LR.reshape(-1, map_LR.shape[1] // num_gpus) for map_LR in (after_LR, before_LR))
    return sum(
        len(set(after) - set(before)) for after, before in zip(*map(np.ndarray.tolist, sides), strict=True)
    )


def check_maps(p2l: IntArray, l2p: IntArray, count: IntArray, num_gpus: int) -> None:
    """Both maps tell the same, every expert is there, and no device holds one twice."""
    num_layers, num_experts = count.shape
    assert l2p.shape == (num_layers, num_experts, count.max())
    assert (count >= 1).all()
    for held in p2l.reshape(num_layers * num_gpus, -1).tolist():
        assert len(set(held)) == len(held)
    for layer in range(num_layers):
        assert np.array_equal(count[layer], np.bincount(p2l[layer], minlength=num_experts))
        for expert in range(num_experts):
            slots, padding = np.split(l2p[layer, expert], [count[layer, expert]])
            assert (p2l[layer, slots] == expert).all()
            assert (padding == -1).all()


@settings(max_examples=100, deadline=None)
@given(problems())
def test_never_worse_than_eplb(problem: tuple[FloatArray, int, int, int, int]) -> None:
    """Maps are whole, and the fullest device is not fuller than with EPLB's answer, repaired."""
    weight, num_replicas, num_groups, num_nodes, num_gpus = problem
    nodes = num_nodes if num_groups % num_nodes == 0 else 1
    assume(num_replicas // num_gpus <= weight.shape[1] // nodes)
    p2l, l2p, count = rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)
    check_maps(p2l, l2p, count, num_gpus)
    theirs, _, their_count = eplb.rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)
    if nodes > 1:
        group_size = weight.shape[1] // num_groups
        nodes_of_group = [set() for _ in range(num_groups)]  # type: list[set[int]]
        for slot, expert in enumerate(p2l[0].tolist()):
            nodes_of_group[expert // group_size].add(slot // (num_replicas // nodes))
        assert all(len(found) == 1 for found in nodes_of_group)
    if their_count.max() > num_gpus // nodes:
        return
    repaired = without_duplicates(theirs, num_gpus, weight, num_nodes=nodes)
    per_node = [rows.reshape(len(rows), nodes, -1) for rows in (theirs, repaired)]
    if not np.array_equal(*(np.sort(rows, axis=2) for rows in per_node)):
        return  # its repair broke a group
    for layer, load_E in enumerate(weight):
        assert fullest(p2l[layer], load_E, num_gpus) <= fullest(repaired[layer], load_E, num_gpus) * (
            1 + 1e-9
        )


@pytest.mark.parametrize(("groups", "nodes"), [(4, 2), (1, 1)])
def test_readme_example(groups: int, nodes: int) -> None:
    """EPLB's own example: int64 maps; nothing is left to gain with whole groups, but something without."""
    p2l, l2p, count = rebalance_experts(README_WEIGHT, 16, groups, nodes, 8)
    check_maps(p2l, l2p, count, 8)
    assert {str(array.dtype) for array in (p2l, l2p, count)} == {"int64"}
    theirs, _, _ = eplb.rebalance_experts(README_WEIGHT, 16, groups, nodes, 8)
    loads = np.array(README_WEIGHT, dtype=np.float64)
    ours_L, theirs_L = (
        [fullest(row_R, load_E, 8) for row_R, load_E in zip(map_LR, loads, strict=True)]
        for map_LR in (p2l, theirs)
    )
    if groups == 4:
        assert ours_L == theirs_L == [156.0, 179.5]
    else:
        assert sum(ours_L) < sum(theirs_L)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_scale_of_loads_does_not_matter(scale: float) -> None:
    """Loads in pairs or in seconds: the same map (powers of two leave no rounding)."""
    weight = np.array(README_WEIGHT, dtype=np.float64)
    for mine, other in zip(
        rebalance_experts(weight, 16, 4, 2, 8), rebalance_experts(weight * scale, 16, 4, 2, 8), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


def test_a_silent_layer_is_spread() -> None:
    """A dense layer of zeros gets a whole map, too."""
    p2l, l2p, count = rebalance_experts(np.zeros((1, 8)), 12, 1, 1, 4)
    check_maps(p2l, l2p, count, 4)
    assert count.max() <= 2


def test_windows_are_evened_out_one_by_one() -> None:
    """Experts 0, 1 surge together and 2, 3 together: each device gets one of both pairs."""
    windows = np.array([[[5.0, 5, 1, 1]], [[1.0, 1, 5, 5]]])
    p2l, _, _ = rebalance_experts(windows.sum(axis=0), 4, 1, 1, 2, windows=windows)
    assert {expert // 2 for expert in p2l[0, :2].tolist()} == {0, 1}


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (8, 4)])
def test_nothing_moves_without_need(groups: int, nodes: int) -> None:
    """The same loads again: the same map, slot for slot, whatever the seed says."""
    weight = np.random.default_rng(0).gamma(0.5, 100.0, size=(2, 64))
    before, _, _ = rebalance_experts(weight, 96, groups, nodes, 16)
    after, _, _ = rebalance_experts(weight, 96, groups, nodes, 16, previous=before)
    np.testing.assert_array_equal(after, before)


def test_what_stays_keeps_its_slot() -> None:
    """After a drift, a device's experts that it held are in the slots where they were."""
    rng = np.random.default_rng(1)
    weight = rng.gamma(0.5, 100.0, size=(2, 32))
    before, _, _ = rebalance_experts(weight, 40, 1, 1, 8)
    drifted = weight * rng.uniform(0.7, 1.3, weight.shape)
    after, _, _ = rebalance_experts(drifted, 40, 1, 1, 8, previous=before)
    plain, _, _ = rebalance_experts(drifted, 40, 1, 1, 8)
    assert received(after, before, 8) < received(plain, before, 8)
    for new, old in zip(after.reshape(-1, 5), before.reshape(-1, 5), strict=True):
        stayed = np.isin(old, new)
        np.testing.assert_array_equal(new[stayed], old[stayed])


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (8, 4)])
def test_moves_are_limited_and_well_spent(groups: int, nodes: int) -> None:
    """Never more than allowed, none changes nothing, and more moves are never worse on these loads."""
    rng = np.random.default_rng(2)
    weight = rng.gamma(0.5, 100.0, size=(3, 64))
    before, _, _ = rebalance_experts(weight, 80, groups, nodes, 16)
    drifted = weight * rng.uniform(0.6, 1.4, weight.shape)
    values = []
    for most in (0, 3, 10, 30, 1000):
        after, l2p, count = rebalance_experts(drifted, 80, groups, nodes, 16, previous=before, max_moves=most)
        check_maps(after, l2p, count, 16)
        assert received(after, before, 16) <= most
        values.append(np.mean([fullest(row, load, 16) for row, load in zip(after, drifted, strict=True)]))
    np.testing.assert_array_equal(
        rebalance_experts(drifted, 80, groups, nodes, 16, previous=before, max_moves=0)[0], before
    )
    assert values == sorted(values, reverse=True)
    assert values[2] < values[0]


class FakeTensor:
    """What is asked of a torch tensor."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    def detach(self) -> FakeTensor:
        """Leave the graph."""
        return self

    cpu = detach

    def is_floating_point(self) -> bool:
        """Tell loads from ids."""
        return self.array.dtype.kind == "f"

    def double(self) -> FakeTensor:
        """Widen."""
        return FakeTensor(self.array.astype(np.float64))

    def numpy(self) -> npt.NDArray[Any]:
        """Return the array."""
        return self.array


def test_tensors_come_back_as_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch is loaded, tensors in give tensors out, and arrays still give arrays."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=FakeTensor, from_numpy=FakeTensor))
    weight = np.array(README_WEIGHT, dtype=np.float32)
    tensors: Any = rebalance_experts(FakeTensor(weight), 16, 4, 2, 8)  # type: ignore[arg-type]
    arrays = rebalance_experts(weight, 16, 4, 2, 8)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert isinstance(tensor, FakeTensor)
        np.testing.assert_array_equal(tensor.array, array)


BEFORE = [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0, 2.0], 2, 1, 1, 1), {}, InputError, r"weight has shape \(2,\)"),
        (([[1.0, float("nan")]], 2, 1, 1, 1), {}, InputError, r"weight\[0\]\[1\] is nan"),
        (([[1.0, 2.0, 3.0]], 2, 1, 1, 1), {}, InfeasibleError, "2 replicas cannot hold 3 experts"),
        (([[1.0, 2.0]], 3, 1, 1, 2), {}, InfeasibleError, "3 replicas do not divide evenly over 2 GPUs"),
        (([[1.0, 2.0]], 2, 0, 1, 1), {}, InputError, "0 groups, 1 nodes, 1 GPUs"),
        (([[1.0, 2.0]], 6, 1, 1, 2), {}, InfeasibleError, "3 slots per GPU .* from 2 experts .* at most 4"),
        (([[1.0] * 4], 4, 1, 1, 2), {"max_moves": 1}, InputError, "max_moves is 1; it goes with previous"),
        (
            ([[1.0] * 4], 4, 1, 1, 2),
            {"previous": BEFORE, "max_moves": -1},
            InputError,
            "max_moves is -1",
        ),
        (([[1.0] * 4], 4, 1, 1, 2), {"previous": [[0, 1, 2]]}, InputError, r"previous has shape \(1, 3\)"),
        (([[1.0] * 4], 4, 1, 1, 2), {"previous": [[0, 1, 2, 2]]}, InputError, "gives expert 3 of layer 0 no"),
        (([[1.0] * 3], 4, 1, 1, 2), {"previous": [[0, 0, 1, 2]]}, InputError, "layer 0 twice on GPU 0"),
        (([[1.0] * 4], 4, 1, 1, 2), {"windows": [[1.0] * 4]}, InputError, r"not \[windows, 1, 4\]"),
    ],
)
def test_malformed_input_is_explained(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Every wrong argument is one line with the numbers."""
    with pytest.raises(error, match=message) as caught:
        rebalance_experts(*arguments, **options)
    assert "\n" not in str(caught.value)
