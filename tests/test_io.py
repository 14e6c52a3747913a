"""Placement files: round trip, everything that a file can get wrong, and whole-or-nothing writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instances import random_placement, random_profile

import placement.io
from placement.errors import InputError
from placement.io import (
    dump_json,
    placement_from_dict,
    placement_to_dict,
    read_placement,
    write_json,
    write_text,
)
from placement.problem import make_problem
from placement.topology import parse_shorthand

GOOD: dict[str, Any] = {
    "format": "moe-placement/1",
    "model": {"name": "test-moe", "moe_layer_ids": [1, 3]},
    "num_layers": 2,
    "num_experts": 4,
    "num_devices": 2,
    "physical_to_logical_map": [[0, 3, 1, 2], [2, 0, 1, 3]],
    "device_of_slot": [0, 0, 1, 1],
}


@given(seed=st.integers(0, 10_000))
def test_round_trip(seed: int) -> None:
    """What is written is what is read, slot by slot."""
    rng = np.random.default_rng(seed)
    problem = make_problem(
        random_profile(rng), parse_shorthand("h100:1x3"), objective="balance", spare_slots=3
    )
    before = random_placement(rng, problem, shuffle=True)
    after = placement_from_dict(json.loads(dump_json(placement_to_dict(before))))
    np.testing.assert_array_equal(after.physical_to_logical_map_LS, before.physical_to_logical_map_LS)
    np.testing.assert_array_equal(after.device_of_slot_S, before.device_of_slot_S)
    assert (after.num_experts, after.num_devices) == (before.num_experts, before.num_devices)


def test_unknown_keys_are_kept() -> None:
    """Rewriting keeps what other tools added, at the top and in the model; given entries replace theirs."""
    model = {**GOOD["model"], "revision": "abc"}
    read = placement_from_dict({**GOOD, "model": model, "note": {"by": "us"}, "objective": {"value": 1}})
    again = placement_to_dict(read, objective={"value": 2})
    assert again["note"] == {"by": "us"}
    assert again["objective"] == {"value": 2}
    assert again["model"] == model
    assert {key: again[key] for key in GOOD if key != "model"} == {k: GOOD[k] for k in GOOD if k != "model"}


def test_sizes_may_follow_from_the_maps() -> None:
    """The two maps are enough."""
    read = placement_from_dict({key: GOOD[key] for key in ("physical_to_logical_map", "device_of_slot")})
    assert (read.num_layers, read.num_experts, read.num_devices, read.model_name) == (2, 4, 2, None)
    assert placement_to_dict(read)["model"] == {"name": None, "moe_layer_ids": [0, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "moe-placement/2"}, "format is 'moe-placement/2'"),
        ({"physical_to_logical_map": None}, "physical_to_logical_map must hold integers"),
        ({"physical_to_logical_map": [[0, 1, 2, 3], [0, 1, 2]]}, "physical_to_logical_map is ragged"),
        ({"physical_to_logical_map": []}, "must hold integers"),
        ({"physical_to_logical_map": [[0, 1, 2, 3.5]] * 2}, "must hold integers"),
        ({"physical_to_logical_map": [[0, True, 2, 3]] * 2}, "must hold integers"),
        ({"physical_to_logical_map": [[0, 1, 2, 2**64 - 1]] * 2}, "must hold integers"),
        ({"physical_to_logical_map": [["0", "1", "2", "3"]] * 2}, "must hold integers"),
        ({"physical_to_logical_map": [0, 1, 2, 3]}, "1 dimensions"),
        ({"physical_to_logical_map": [[0, 1, 2, 9]] * 2}, "holds expert 9"),
        ({"device_of_slot": [0, 0, 1, False]}, "device_of_slot must hold integers"),
        ({"device_of_slot": [0, 0, 1]}, "names 3 slots"),
        ({"num_experts": True}, "num_experts is True; it must be a positive integer"),
        ({"num_devices": 2.0}, "num_devices is 2.0"),
        ({"num_devices": 0}, "num_devices is 0"),
        ({"num_layers": 3}, "num_layers is 3, the map has 2"),
        ({"num_experts": 5}, "cannot hold 5 experts"),
        ({"model": [1]}, "model is a list, not an object"),
        ({"model": {"name": 5}}, "model.name is 5, not a text"),
        ({"model": {"moe_layer_ids": "01"}}, "moe_layer_ids is not a list of integers"),
        ({"model": {"moe_layer_ids": [0, 1.5]}}, "moe_layer_ids is not a list of integers"),
        ({"model": {"moe_layer_ids": [0]}}, "moe_layer_ids names 1 layers"),
    ],
)
def test_what_placements_get_wrong(change: dict[str, Any], message: str) -> None:
    """Every error begins with the source and names the key."""
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        placement_from_dict({**GOOD, **change}, source="here")


@pytest.mark.parametrize("missing", ["physical_to_logical_map", "device_of_slot"])
def test_foreign_json(missing: str) -> None:
    """A JSON object that is no placement is told what it lacks."""
    with pytest.raises(InputError, match=f"is no placement, it lacks {missing}"):
        placement_from_dict({key: value for key, value in GOOD.items() if key != missing})
    with pytest.raises(InputError, match="holds a list, not an object"):
        placement_from_dict([GOOD])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"physical_to_logical_map": [[0, 1', r"is not JSON \(truncated\?\)"),
        (b"", r"is not JSON"),
        (b"\xff\xfe\x00", r"is not JSON"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"num_experts": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"7", "holds a int, not an object"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    """Truncated, binary and hostile files end in one line with the file's name."""
    file = tmp_path / "p.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"p.json: {message}"):
        read_placement(file)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, a folder, or far too large."""
    with pytest.raises(InputError, match=r"none.json: cannot be read: No such file"):
        read_placement(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_placement(tmp_path)
    file = tmp_path / "large.json"
    write_json(file, GOOD)
    monkeypatch.setattr(placement.io, "MAX_FILE_BYTES", 10)
    with pytest.raises(InputError, match=r"bytes; no placement is that large"):
        read_placement(file)


def test_figures_that_do_not_exist_become_null() -> None:
    """JSON knows neither NaN nor infinity."""
    assert (
        dump_json({"a": [float("nan"), 1.5], "b": (float("inf"), None)})
        == '{"a": [null, 1.5], "b": [null, null]}'
    )


def test_writing_replaces_the_file(tmp_path: Path) -> None:
    """The new content is there, readable for whom the umask lets, and nothing else."""
    file = tmp_path / "p.json"
    write_text(file, "old")
    write_json(file, GOOD)
    assert read_placement(file).num_layers == 2
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert file.stat().st_mode & 0o600 == 0o600


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither half a file nor a temporary one stays behind, whatever went wrong."""
    file = tmp_path / "p.json"
    write_text(file, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="cannot be written: No space left on device"):
            write_text(file, "new")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_text(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_folders_that_cannot_be_written_to(tmp_path: Path) -> None:
    """A missing folder and a folder in the file's place are input errors."""
    with pytest.raises(InputError, match="cannot be written: No such file"):
        write_text(tmp_path / "none" / "p.json", "x")
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        write_text(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []
