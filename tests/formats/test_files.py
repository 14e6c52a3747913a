"""Tests of all formats at once: round trips, recognition by content, files whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from formats.samples import HYBRID, model_of, options_of, place, placements
from hypothesis import given, settings

from placement.errors import InputError
from placement.formats.document import parse_document
from placement.formats.files import (
    FORMATS,
    check_name,
    encode_as,
    find_format,
    read_placement_file,
    write_as,
)
from placement.formats.layers import ModelLayers
from placement.formats.protocol import FormatOptions
from placement.formats.rules import by_device
from placement.plan import Placement

WITH_SLOTS = ("sglang", "tensorrt-llm", "vllm", "vllm-ascend", "native")
ONE_REPLICA = ("megatron", "deepspeed")

SMALL = place([[0, 3, 1, 2], [2, 0, 1, 3]], moe_layer_ids=(1, 2), model_name="hybrid")
SMALL_OPTIONS = FormatOptions(layers=ModelLayers.of(HYBRID), num_devices=2)


def again(placement: Placement, name: str) -> Placement:
    """Write a placement in memory and read it back."""
    options = options_of(placement)
    document = parse_document(encode_as(placement, name, options))
    assert find_format(document) == ("megatron" if name == "deepspeed" else name)
    return FORMATS[name].decode(document, options)


@settings(max_examples=40)
@given(placement=placements())
def test_slots_survive(placement: Placement) -> None:
    """Formats that list slots give back every slot, device by device, and the layers where they name them."""
    for name in WITH_SLOTS:
        back = again(placement, name)
        np.testing.assert_array_equal(by_device(back, target="x"), by_device(placement, target="x"))
        assert (back.num_experts, back.num_devices) == (placement.num_experts, placement.num_devices)
        if name != "native":
            assert back.moe_layer_ids == model_of(placement).moe_layer_ids


@settings(max_examples=40)
@given(placement=placements(replicas=False))
def test_devices_survive_a_permutation(placement: Placement) -> None:
    """Contiguous shards keep what is on which device; the order of slots is theirs."""
    for name in ONE_REPLICA:
        back = again(placement, name)
        np.testing.assert_array_equal(back.count_LED, placement.count_LED)
        assert back.moe_layer_ids == model_of(placement).moe_layer_ids


@settings(max_examples=40)
@given(placement=placements(replicas=False, one_map=True))
def test_one_map_for_all_layers_survives(placement: Placement) -> None:
    """The rank of every expert says it all where layers do not differ."""
    back = again(placement, "vllm-ranks")
    np.testing.assert_array_equal(back.count_LED, placement.count_LED)


@settings(max_examples=30)
@given(placement=placements())
def test_from_engine_to_engine(placement: Placement) -> None:
    """A placement that goes through every engine's file in turn is still the same."""
    there = placement
    for name in ("sglang", "vllm-ascend", "tensorrt-llm", "vllm", "sglang"):
        there = again(there, name)
    np.testing.assert_array_equal(there.count_LED, placement.count_LED)


@pytest.mark.parametrize("name", FORMATS)
def test_files_are_found_by_content(name: str, tmp_path: Path) -> None:
    """A file is read by what it holds, whatever it is called."""
    one = place([[0, 3, 1, 2], [0, 3, 1, 2]], moe_layer_ids=(1, 2), model_name="hybrid")
    suffix = FORMATS[name].SUFFIXES[0] if FORMATS[name].SUFFIXES else ".txt"
    write_as(one, tmp_path / f"x{suffix}", name, SMALL_OPTIONS)
    path = (tmp_path / f"x{suffix}").rename(tmp_path / "unnamed")
    back = read_placement_file(path, SMALL_OPTIONS)
    np.testing.assert_array_equal(back.count_LED, one.count_LED)
    assert back.moe_layer_ids == (1, 2)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_written_for_a_placement_that_does_not_fit(name: str, tmp_path: Path) -> None:
    """Uneven devices are refused by every engine, and leave no file behind."""
    uneven = Placement(
        physical_to_logical_map_LS=np.array([[0, 1, 2, 3], [0, 1, 2, 3]]),
        device_of_slot_S=np.array([0, 0, 0, 1]),
        num_experts=4,
        num_devices=2,
        moe_layer_ids=(1, 2),
        model_name="hybrid",
    )
    path = tmp_path / f"x{(*FORMATS[name].SUFFIXES, '')[0]}"
    if name == "native":
        write_as(uneven, path, name, SMALL_OPTIONS)
        assert read_placement_file(path).count_LED.tolist() == uneven.count_LED.tolist()
        return
    with pytest.raises(InputError, match="layer 0 has 1 experts on device 1 and layer 0 3 on device 0"):
        write_as(uneven, path, name, SMALL_OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "native"])
def test_an_empty_slot_is_refused(name: str) -> None:
    """A slot without an expert has no name in any engine."""
    empty = place([[0, 1, 2, 3, 0, -1], [0, 1, 2, 3, 0, 1]], moe_layer_ids=(1, 2))
    with pytest.raises(InputError, match="layer 0 has 2 experts on device 1 and layer 0 3 on device 0"):
        encode_as(empty, name, SMALL_OPTIONS)


def test_spare_slots_that_are_empty_everywhere_do_not_count() -> None:
    """Slots that no layer fills are not there for the engine."""
    spare = place([[0, 1, -1, 2, 3, -1], [3, 1, -1, 2, 0, -1]], moe_layer_ids=(1, 2), model_name="hybrid")
    rows = json.loads(encode_as(spare, "vllm", SMALL_OPTIONS))
    assert rows == [[0, 1, 2, 3], [3, 1, 2, 0]]


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("sglang", "x.txt", r"sglang only loads files that end in \.json"),
        ("vllm-ascend", "x.JSON", r"vllm-ascend only loads files that end in \.json"),
        ("tensorrt-llm", "x.json", r"tensorrt-llm only loads files that end in \.yaml or \.yml"),
        ("sglnag", "x.json", "unknown placement format 'sglnag'; did you mean 'sglang'"),
    ],
)
def test_names_that_engines_do_not_load(name: str, file: str, message: str) -> None:
    """SGLang takes a name without .json for JSON itself; others insist on their ending too."""
    with pytest.raises(InputError, match=message):
        check_name(file, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{}", "is no placement of a known format .*: it holds an object with"),
        ('{"logical_count": [[1]]}', "'logical_count'"),
        ('"text"', "it holds a str"),
        ('{"physical_to_logical_map": [[0, 1', "is not JSON"),
        ('{"physical_to_logical_map": [[0, NaN]]}', "holds NaN, which is no JSON"),
        ('{"physical_to_logical_map": [[0]], "physical_to_logical_map": [[1]]}', "gives .* twice"),
        ("[" * 100_000, "is nested too deeply"),
        ("num_slots: 4\nnum_slots: 5\n", "a key is given twice"),
        ("num_slots: &a [1]\nx: *a\n", "uses YAML aliases"),
        ("num_slots: [1", "is neither JSON nor YAML: line"),
        ("num_slots: !!python/object/apply:os.system [ls]\n", "is neither JSON nor YAML"),
        ("\x00", "is neither JSON nor YAML"),
    ],
)
def test_what_is_no_placement(text: str, message: str, tmp_path: Path) -> None:
    """Damaged and foreign files end in one line that begins with the path."""
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^{path}: .*{message}") as caught:
        read_placement_file(path, SMALL_OPTIONS)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A torch file is no placement, and is not unpickled to find out."""
    path = tmp_path / "dump.pt"
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(InputError, match=r"it is not text \(byte 4\)"):
        read_placement_file(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file and a folder say so."""
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_placement_file(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_placement_file(tmp_path)


def test_a_reader_is_told_only_when_it_asks(tmp_path: Path) -> None:
    """Our own file says all there is, so that nobody has to find out about the model."""

    def told() -> FormatOptions:
        raise AssertionError

    write_as(SMALL, tmp_path / "p.json", "native", SMALL_OPTIONS)
    assert read_placement_file(tmp_path / "p.json", told).model_name == "hybrid"


@pytest.mark.parametrize("name", ["sglang", "tensorrt-llm", "vllm"])
def test_the_number_of_devices_must_be_told(name: str) -> None:
    """Files that list slots do not say how many devices share them."""
    document = parse_document(encode_as(SMALL, name, SMALL_OPTIONS))
    layers = SMALL_OPTIONS.layers
    with pytest.raises(InputError, match="lists 4 slots, but not how many devices"):
        FORMATS[name].decode(document, FormatOptions(layers=layers))
    with pytest.raises(InputError, match="lists 4 slots, which do not divide evenly over 3 devices"):
        FORMATS[name].decode(document, FormatOptions(layers=layers, num_devices=3))
