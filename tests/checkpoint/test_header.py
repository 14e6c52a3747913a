"""Headers of safetensors files: read with suspicion, rewritten with other names only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tensor_files import write_raw, write_tensors

from placement.checkpoint.header import Header, read_header
from placement.errors import InputError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_a_header_is_read(tmp_path: Path) -> None:
    """Names, types, shapes and places of all tensors, in the order of their bytes."""
    path = write_raw(
        tmp_path / "a.safetensors",
        {
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "F4", "shape": [2, 2], "data_offsets": [8, 10]},
            "a": F32,
            "empty": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [8, 8]},
        },
        bytes(10),
    )
    header = read_header(path)
    assert [(t.name, t.dtype, t.shape, t.num_bytes) for t in header.tensors] == [
        ("a", "F32", (2,), 8),
        ("empty", "BF16", (0, 3), 0),
        ("b", "F4", (2, 2), 2),
    ]
    assert header.data_begin + header.data_bytes == path.stat().st_size


def test_names_change_and_nothing_else(tmp_path: Path) -> None:
    """A name is replaced where it stands; spaces, order, escapes and metadata stay."""
    text = b'{ "b" : {"shape":[2],"dtype":"F32", "data_offsets":[0,8]},\n"__metadata__":{"b":"b\\u00e9"}}'
    text += b" " * (-len(text) % 8)
    header = read_header(write_raw(tmp_path / "a.safetensors", text, bytes(8)))
    changed = text.rstrip().replace(b'"b" :', b'"weights" :')
    expected = changed + b" " * (-len(changed) % 8)
    assert header.renamed({"b": "weights"}) == len(expected).to_bytes(8, "little") + expected


def test_foreign_padding_keeps_its_length(tmp_path: Path) -> None:
    """A writer that aligns to more than 8 bytes, or not at all, finds its own padding back."""
    for padding in (b"", b" " * 40):
        text = json.dumps({"abc": F32}).encode()
        text += b" " * (padding == b"" and len(text) % 8 == 0) + padding
        header = read_header(write_raw(tmp_path / "a.safetensors", text, bytes(8)))
        assert header.renamed({"abc": "x"})[8:] == text.replace(b"abc", b"x")


@given(
    names=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_renaming_back_restores_every_byte(tmp_path_factory: Any, names: list[str], order: Any) -> None:
    """Exchanged names, exchanged back, give the header that the library wrote."""
    names = [name for name in names if name != "__metadata__"] or ["a"]
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    save_file({name: np.full(3, i, np.int16) for i, name in enumerate(names)}, path, metadata={"x": "y"})
    shuffled = list(names)
    order.shuffle(shuffled)
    there = dict(zip(names, shuffled, strict=True))
    original = path.read_bytes()
    header = read_header(path)
    path.write_bytes(header.renamed(there) + original[header.data_begin :])
    moved = read_header(path)
    assert {there[t.name]: t.begin for t in header.tensors} == {t.name: t.begin for t in moved.tensors}
    back = moved.renamed({new: old for old, new in there.items()})
    assert back + original[header.data_begin :] == original


LIES: list[tuple[str, object, bytes, str]] = [
    ("no JSON", b"{]      ", b"", "not JSON"),
    ("no text", b"\xff\xfe{}    ", b"", "not JSON"),
    ("a list", b"[]", b"", "no object"),
    ("text after it", b"{} {}   ", b"", "not JSON"),
    ("nothing", b"", b"", "not JSON"),
    ("an open object", b'{"a":', b"", "not JSON"),
    ("endless nesting", b'{"a":' + b"[" * 100_000, b"", "not JSON"),
    ("an endless number", b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}", b"", "not JSON"),
    (
        "a name twice",
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}',
        b"",
        "'a' is given twice",
    ),
    ("a key twice", b'{"a":{"dtype":"U8","dtype":"U8"}}', b"", "'dtype' is given twice"),
    ("metadata of numbers", {"__metadata__": {"a": 1}}, b"", "__metadata__"),
    ("no description", {"a": 3}, b"", "describes tensor 'a' by 3"),
    ("a key too many", {"a": {**F32, "more": 1}}, bytes(8), "describes tensor 'a'"),
    ("an unknown type", {"a": {**F32, "dtype": "F99"}}, bytes(8), "unknown type 'F99'"),
    ("a negative size", {"a": {**F32, "shape": [-2]}}, bytes(8), "impossible shape"),
    ("a true size", {"a": {**F32, "shape": [True]}}, bytes(8), "impossible shape"),
    ("too many axes", {"a": {**F32, "shape": [1] * 65}}, bytes(8), "impossible shape"),
    ("offsets backwards", {"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), "impossible data_offsets"),
    ("three offsets", {"a": {**F32, "data_offsets": [0, 4, 8]}}, bytes(8), "impossible data_offsets"),
    ("another size", {"a": {**F32, "shape": [3]}}, bytes(8), "takes 12 bytes, its offsets give 8"),
    (
        "half a byte",
        {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}},
        bytes(1),
        "takes 1.5 bytes",
    ),
    ("a gap", {"a": {**F32, "data_offsets": [4, 12]}}, bytes(12), "leaves a gap"),
    ("an overlap", {"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12), "'b' overlaps"),
    ("less data", {"a": F32}, bytes(7), "is truncated: its tensors take 8 bytes, it holds 7"),
    ("more data", {"a": F32}, bytes(9), "belong to no tensor"),
]


@pytest.mark.parametrize(
    ("header", "data", "message"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES]
)
def test_a_lying_header_is_refused_in_one_line(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    """Whatever is wrong is said with the file's name, in one line."""
    path = write_raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"\x10\0\0\0\0\0\0\0{}", "is truncated: its header takes 16 bytes, the file has 10"),
        (b"\xff" * 8, "its header would be 18446744073709551615 bytes"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Before anything is allocated: the header's length is checked against the file and the format."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_header(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The operating system's reason is in the message."""
    with pytest.raises(InputError, match="No such file"):
        read_header(tmp_path / "none.safetensors")


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: Any, at: int, byte: int, cut: int) -> None:
    """No damage raises anything but an input error, and what is accepted fits the file."""
    path = tmp_path_factory.mktemp("damage") / "a.safetensors"
    write_tensors(path, {"a": np.arange(6, dtype=np.float32), "b": np.arange(9, dtype=np.int64)})
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content[: max(0, len(content) - cut // 4)])
    try:
        header: Header | None = read_header(path)
    except InputError:
        header = None
    if header is not None:
        assert header.data_begin + header.data_bytes == path.stat().st_size
        assert sum(tensor.num_bytes for tensor in header.tensors) == header.data_bytes
