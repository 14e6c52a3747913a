"""Tests of permutations: a placement as an order of experts for contiguous shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.engines import contiguous_shards
from formats.samples import place, placements
from hypothesis import given, settings

from placement.errors import InputError
from placement.formats.permutation import Permutation
from placement.formats.permutation_file import (
    permutation_from_dict,
    permutation_to_dict,
    read_permutation,
)
from placement.plan import Placement

TINY = Permutation(old_expert_of_new_LE=np.array([[2, 0, 3, 1]]), moe_layer_ids=(5,), num_devices=2)


def test_four_experts_by_hand() -> None:
    """New position 0 takes old expert 2, so old expert 2 goes to position 0."""
    assert TINY.new_position_of_old_LE.tolist() == [[1, 3, 0, 2]]
    assert TINY.row(5).tolist() == [2, 0, 3, 1]
    assert TINY.inverse().old_expert_of_new_LE.tolist() == [[1, 3, 0, 2]]
    assert (TINY.num_layers, TINY.num_experts, TINY.is_identity) == (1, 4, False)
    weights = np.array([10, 11, 12, 13])
    assert weights[TINY.row(5)].tolist() == [12, 10, 13, 11]


@settings(max_examples=40)
@given(placement=placements(replicas=False))
def test_shards_of_the_new_order_are_the_placement(placement: Placement) -> None:
    """What a rank loads from the rearranged checkpoint is what the placement wants on its device."""
    layers = tuple(range(placement.num_layers))
    permutation = Permutation.from_placement(placement, moe_layer_ids=layers)
    shards = contiguous_shards(placement.num_experts, placement.num_devices)
    for layer in range(placement.num_layers):
        for device, positions in enumerate(shards):
            held = permutation.row(layer)[positions]
            assert sorted(held) == np.nonzero(placement.count_LED[layer, :, device])[0].tolist()
    again = permutation.to_placement()
    np.testing.assert_array_equal(again.count_LED, placement.count_LED)


@settings(max_examples=40)
@given(placement=placements(replicas=False))
def test_the_inverse_undoes_it(placement: Placement) -> None:
    """Rearranging there and back leaves every expert where it was."""
    permutation = Permutation.from_placement(placement, moe_layer_ids=tuple(range(placement.num_layers)))
    back = np.take_along_axis(
        permutation.old_expert_of_new_LE, permutation.inverse().old_expert_of_new_LE, axis=1
    )
    assert (back == np.arange(placement.num_experts)).all()


@settings(max_examples=40)
@given(placement=placements(replicas=False))
def test_file_round_trip(placement: Placement) -> None:
    """A permutation survives its JSON form."""
    layers = tuple(range(3, 3 + placement.num_layers))
    before = Permutation.from_placement(placement, moe_layer_ids=layers)
    after = permutation_from_dict(json.loads(json.dumps(permutation_to_dict(before))))
    np.testing.assert_array_equal(after.old_expert_of_new_LE, before.old_expert_of_new_LE)
    assert (after.moe_layer_ids, after.num_devices) == (layers, placement.num_devices)


def test_layers_beyond_nine_keep_their_order() -> None:
    """Layer ids are numbers, although JSON's keys are texts."""
    before = Permutation(old_expert_of_new_LE=np.array([[0, 1], [1, 0]]), moe_layer_ids=(9, 10))
    text = json.dumps(permutation_to_dict(before), sort_keys=True)
    assert permutation_from_dict(json.loads(text)).row(10).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("row", "groups", "whole"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 4, True),
        ([6, 7, 0, 1, 3, 2, 5, 4], 4, True),  # groups change places, experts within them too
        ([0, 2, 1, 3, 4, 5, 6, 7], 4, False),
        ([0, 2, 1, 3, 4, 5, 6, 7], 2, True),
        ([7, 6, 5, 4, 3, 2, 1, 0], 1, True),
    ],
)
def test_groups_of_the_router(row: list[int], groups: int, whole: bool) -> None:
    """Groups stay whole when each run of positions holds one old group."""
    permutation = Permutation(old_expert_of_new_LE=np.array([row]), moe_layer_ids=(0,))
    assert permutation.keeps_groups_whole(groups) is whole
    assert permutation.split_layer(groups) == (None if whole else 0)


def test_groups_must_divide() -> None:
    """Three groups of four experts do not exist."""
    with pytest.raises(InputError, match="4 experts do not form 3 equal groups"):
        TINY.keeps_groups_whole(3)


def test_a_group_on_one_device_stays_together() -> None:
    """Slots of a device may be in any order; the permutation puts its experts in ascending order."""
    placement = place([[3, 0, 2, 1, 7, 4, 6, 5]], experts=8, moe_layer_ids=(0,))
    permutation = Permutation.from_placement(placement)
    assert permutation.is_identity
    assert permutation.keeps_groups_whole(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old_expert_of_new_LE": np.array([[0, 0, 1, 2]])}, "expert 0 comes 2 times"),
        ({"old_expert_of_new_LE": np.array([[0, 1, 2, 4]])}, "it names expert 4 of 4"),
        ({"old_expert_of_new_LE": np.array([[0, 1, 2, -1]])}, "it names expert -1 of 4"),
        ({"old_expert_of_new_LE": np.array([0, 1])}, r"shape \(2,\)"),
        ({"old_expert_of_new_LE": np.array([[0.0, 1.0]])}, "float64"),
        ({"moe_layer_ids": (1, 2)}, "must be 1 ascending ids"),
        ({"moe_layer_ids": (-1,)}, "ids of 0 or more"),
        ({"num_devices": 3}, "4 experts do not divide into 3 contiguous shards"),
        ({"num_devices": 0}, "into 0 contiguous shards"),
    ],
)
def test_malformed_permutations(changes: dict[str, Any], message: str) -> None:
    """Every row is a permutation, every layer has one."""
    good = {"old_expert_of_new_LE": np.array([[2, 0, 3, 1]]), "moe_layer_ids": (5,), "num_devices": 2}
    with pytest.raises(InputError, match=message):
        Permutation(**{**good, **changes})


def test_what_is_no_permutation() -> None:
    """Replicas, uneven devices and unknown layers are refused with the numbers."""
    with pytest.raises(InputError, match="expert 0 of layer 0 has 2 replicas"):
        Permutation.from_placement(place([[0, 1, 0, 2]], experts=3, moe_layer_ids=(0,)))
    uneven = Placement(
        physical_to_logical_map_LS=np.array([[0, 1, 2, 3]]),
        device_of_slot_S=np.array([0, 0, 0, 1]),
        num_experts=4,
        num_devices=2,
        moe_layer_ids=(0,),
    )
    with pytest.raises(InputError, match="layer 0 has 1 experts on device 1 and layer 0 3 on device 0"):
        Permutation.from_placement(uneven)
    with pytest.raises(InputError, match="--model"):
        Permutation.from_placement(place([[0, 1, 2, 3]]))
    with pytest.raises(InputError, match="has no layer 4; it has 1 from 5 to 5"):
        TINY.row(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "moe-placement-permutation/2"}, "format is 'moe-placement-permutation/2'"),
        ({"inverse": {"5": [2, 0, 3, 1]}}, "the inverse does not undo the layers"),
        ({"inverse": {"6": [1, 3, 0, 2]}}, "the inverse does not undo the layers"),
        ({"layers": {"five": [2, 0, 3, 1]}}, "has the layer 'five'"),
        ({"layers": {"5": [2, 0, 3, 1], "05": [2, 0, 3, 1]}}, "gives a layer twice"),
        ({"layers": {"5": [2, 0, 3, float("nan")]}}, "holds nan in slot 3"),
        ({"layers": {}}, "must map decoder layers"),
        ({"num_experts": 5}, "num_experts is 5, rows have 4"),
        ({"num_devices": True}, "num_devices is True"),
        ({"model": 7}, "model is 7"),
        ({"note": 1}, "has the key 'note'"),
    ],
)
def test_malformed_files(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A permutation file is refused as a whole, with its path and the reason."""
    path = tmp_path / "order.json"
    path.write_text(json.dumps({**permutation_to_dict(TINY), **changes}))
    values = {**permutation_to_dict(TINY), **changes}
    with pytest.raises(InputError, match=message):
        permutation_from_dict(values)
    with pytest.raises(InputError, match=f"^{path}: "):
        read_permutation(path)


def test_a_file_on_the_disk(tmp_path: Path) -> None:
    """What was written is what is read."""
    path = tmp_path / "order.json"
    path.write_text(json.dumps(permutation_to_dict(TINY)))
    assert read_permutation(path).old_expert_of_new_LE.tolist() == [[2, 0, 3, 1]]
