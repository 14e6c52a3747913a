"""Tests of `traces.importers.torch_file`: tensors are loaded, code is refused and never run."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces import files
from traces.importers import torch_file
from traces.importers.torch_file import as_array, is_torch_file, leading_strings, load_torch

CONTENT = {
    "records": [{"rank": 1, "topk": torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)}],
    "last": None,
}


class Malicious:
    """Unpickles to a shell command that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def refusal(path: Path) -> str:
    """Load what must not be loadable; return the one line that names the path."""
    with pytest.raises(InputError) as caught:
        load_torch(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_tensors_and_plain_values_are_loaded(tmp_path: Path, new: bool) -> None:
    """Both formats of PyTorch are known by content and loaded."""
    torch.save(CONTENT, tmp_path / "a", _use_new_zipfile_serialization=new)
    assert is_torch_file(tmp_path / "a")
    content = load_torch(tmp_path / "a")
    assert content["records"][0]["rank"] == 1
    assert as_array(content["records"][0]["topk"], "topk").tolist() == np.arange(24).reshape(2, 3, 4).tolist()
    assert content["last"] is None


def test_tensors_of_a_gpu_are_loaded_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump names the device that each tensor was on; it is loaded on the CPU."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(CONTENT, tmp_path / "a.pt")
    content = load_torch(tmp_path / "a.pt")
    assert as_array(content["records"][0]["topk"], "topk")[1, 2].tolist() == [20, 21, 22, 23]


def test_the_first_keys_are_seen_without_loading(tmp_path: Path) -> None:
    """A sniff reads the texts at the start of the pickle, of complete and of cut files."""
    torch.save(CONTENT, tmp_path / "a.pt")
    assert leading_strings(tmp_path / "a.pt")[:2] == ("records", "rank")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    assert leading_strings(tmp_path / "cut.pt")[:2] == ("records", "rank")


@pytest.mark.parametrize("content", [b"", b"PK", b"text", b"\x80\x04.", b"PK\x03\x04" + bytes(40)])
def test_other_files_are_no_torch_files(tmp_path: Path, content: bytes) -> None:
    """Neither are folders."""
    (tmp_path / "a.pt").write_bytes(content)
    assert not is_torch_file(tmp_path / "a.pt")
    assert not is_torch_file(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "before 1.6", "nested", "bare"])
def test_malicious_pickles_are_refused_and_never_run(tmp_path: Path, kind: str) -> None:
    """The message says that there is code; what it would have done is not done."""
    mark, path = tmp_path / "mark", tmp_path / "evil.pt"
    evil = Malicious(mark)
    if kind == "bare":
        path.write_bytes(pickle.dumps(evil))
    else:
        content = {"records": [{"rank": evil}]} if kind == "nested" else {"a": evil}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "before 1.6")
    message = refusal(path)
    assert "code or objects that are not tensors" in message
    assert ("posix.system" in message) == (kind != "bare")
    assert not mark.exists()
    pickle.loads(pickle.dumps(evil))  # noqa: S301 - what the refusal kept from happening
    assert mark.exists()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.97])
def test_truncated_files_are_named(tmp_path: Path, new: bool, kept: float) -> None:
    """Wherever the copy stopped, the message says that the file is damaged."""
    torch.save(CONTENT, tmp_path / "whole.pt", _use_new_zipfile_serialization=new)
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * kept)])
    assert refusal(tmp_path / "cut.pt").startswith("is damaged")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    """Neither zip archive nor pickle."""
    (tmp_path / "a.pt").write_text("once upon a time")
    assert "neither a zip archive nor a pickle" in refusal(tmp_path / "a.pt")


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    """PyTorch stores; whatever compresses is a bomb or somebody else's."""
    torch.save(CONTENT, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as stored,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    assert "is compressed (a/data.pkl), as PyTorch never does" in refusal(tmp_path / "b.pt")


def test_bombs_are_refused_before_they_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are those that the archive's directory declares."""
    monkeypatch.setattr(files, "_RATIO_MATTERS_BYTES", 1 << 16)
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    assert "over 100 times its size" in refusal(tmp_path / "a.pt")


def test_pickles_too_large_for_objects_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects take many times the room of their pickle."""
    monkeypatch.setattr(torch_file, "_LIMIT_PICKLE_BYTES", 100)
    torch.save({"records": list(range(100))}, tmp_path / "a.pt")
    assert "bytes beside its tensors" in refusal(tmp_path / "a.pt")


def test_tensors_that_repeat_their_memory_are_refused(tmp_path: Path) -> None:
    """A stride of 0 lets a few bytes claim any size."""
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a claims \[1099511627776\] torch.float32 values"):
        as_array(load_torch(tmp_path / "a.pt")["a"], "a")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "a is list, not a tensor"),
        (torch.zeros(2, 2).to_sparse(), "a is no dense tensor"),
        (torch.zeros(2, dtype=torch.bfloat16), "a holds torch.bfloat16 values"),
    ],
)
def test_values_that_are_no_arrays_are_named(value: object, message: str) -> None:
    """The message gives the name and the kind."""
    with pytest.raises(InputError, match=message):
        as_array(value, "a")


def test_arrays_pass_as_they_are() -> None:
    """What is an array already needs no torch."""
    array = np.arange(3)
    assert as_array(array, "a") is array


def test_a_missing_torch_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the command that installs it."""
    torch.save(CONTENT, tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refusal(tmp_path / "a.pt").endswith("pip install 'moe-placement[torch]'")


def small_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"records": [1, "a", torch.arange(4)]}, Path(folder) / "a.pt")
        return (Path(folder) / "a.pt").read_bytes()


SMALL = small_file()


@settings(max_examples=100, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.integers(0, len(SMALL)),
)
def test_damaged_files_never_fail_otherwise(flips: list[tuple[int, int]], length: int) -> None:
    """Any bytes load, or end in an input error."""
    content = bytearray(SMALL)
    for place, value in flips:
        content[place] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        for damaged in (content, content[:length]):
            path.write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    outcome: object = load_torch(path)
                except InputError as exc:
                    outcome = exc
            is_torch_file(path)
            leading_strings(path)
            assert not isinstance(outcome, Malicious)
