"""Tests of `traces.readers` and its importers: files are known by content, and bad ones are named."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import placement
from placement.errors import InputError
from traces import files
from traces.readers import READERS, read_trace
from traces.store import write_dataset, write_npz
from traces.synthesize import synthesize
from traces.trace import Trace

SAMPLE = Path(placement.__path__[0]) / "samples" / "traces" / "byte16.npz"
TOPK = np.array([[[0, 1]], [[2, 0]], [[1, 2]]])


def small_trace() -> Trace:
    return synthesize(num_tokens=60, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=0)


def write_archive(path: Path, **arrays: Any) -> Path:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def refusal(path: Path, **options: Any) -> str:
    """Read what must not be readable; return the one line that names the path."""
    with pytest.raises(InputError) as caught:
        read_trace(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_the_sample_trace_is_readable() -> None:
    """The committed trace of the sample model has the size and domains that it is said to have."""
    trace = read_trace(SAMPLE)
    assert (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k) == (599_040, 6, 16, 2)
    assert trace.domain_names[:3] == ("cpp", "fiction_en", "french")
    assert trace.sequence_T is not None
    assert int(trace.sequence_T[-1]) == 584


@pytest.mark.parametrize("name", ["trace.npz", "trace.json", "trace"])
def test_archives_are_known_by_content(tmp_path: Path, name: str) -> None:
    """The name of the file says nothing."""
    write_npz(small_trace(), tmp_path / name)
    assert read_trace(tmp_path / name).digest == small_trace().digest


def test_data_sets_are_known_by_content(tmp_path: Path) -> None:
    """A folder with a manifest is a data set, whatever it is called; a path may be a string."""
    write_dataset(small_trace(), tmp_path / "set.npz")
    assert read_trace(str(tmp_path / "set.npz")).digest == small_trace().digest


def test_only_topk_is_needed(tmp_path: Path) -> None:
    """Without `num_experts` the largest id counts; nothing else is made up."""
    trace = read_trace(write_archive(tmp_path / "a.npz", topk=TOPK))
    assert trace.num_experts == 3
    assert trace.experts_TLK.tolist() == TOPK.tolist()
    assert (trace.sequence_T, trace.rank_T, trace.domain_T, trace.model_name) == (None, None, None, None)


def test_domains_without_names_are_numbered(tmp_path: Path) -> None:
    """Archives may say which tokens belong together without saying to what."""
    trace = read_trace(write_archive(tmp_path / "a.npz", topk=TOPK, domain=np.array([0, 2, 2])))
    assert trace.domain_names == ("0", "1", "2")


def test_unknown_arrays_are_left_alone(tmp_path: Path) -> None:
    """An archive may hold more than a trace, even pickled objects: they are never looked at."""
    path = tmp_path / "a.npz"
    np.savez(path, topk=TOPK, notes=np.array([{"a": 1}], dtype=object))
    assert read_trace(path).num_tokens == 3


def test_what_is_not_there_is_said() -> None:
    """A missing path is named."""
    assert refusal(Path("no/such/trace.npz")) == "does not exist"


def test_folders_without_manifest_are_no_data_sets(tmp_path: Path) -> None:
    """The message says what is missing."""
    assert "no manifest.rankNNNNN.json" in refusal(tmp_path)


def test_pipes_are_not_read(tmp_path: Path) -> None:
    """A path that is neither file nor folder would block."""
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "is neither a file nor a folder"


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (b"", "it is empty"),
        (b"once upon a time there was a trace", "begins with b'once upon a time'"),
        (json.dumps({"logical": [1]}).encode(), "begins with"),
        (b"PK\x03\x04", "begins with"),
        (b"\x93NUMPY\x01\x00", "begins with"),
    ],
    ids=["empty", "text", "json", "zip head", "npy"],
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes, start: str) -> None:
    """The message names the known formats and how the file begins."""
    (tmp_path / "file").write_bytes(content)
    message = refusal(tmp_path / "file")
    assert "no trace of a known format (dataset, " in message
    assert start in message


def test_zip_archives_of_others_are_no_traces(tmp_path: Path) -> None:
    """A zip archive that begins with something else, as PyTorch's do, is not taken for ours."""
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    assert "no trace of a known format" in refusal(tmp_path / "model.pt")


def test_archives_without_topk_say_what_they_hold(tmp_path: Path) -> None:
    """The arrays found help to see which file this is."""
    path = write_archive(tmp_path / "a.npz", step=np.arange(3), load=np.zeros((3, 2, 4)))
    assert refusal(path) == "has no array topk [tokens, layers, k]; its arrays are: load, step"


def test_a_format_can_be_insisted_on(tmp_path: Path) -> None:
    """The reader asked for is used, or its complaint comes; unknown names list the known ones."""
    write_npz(small_trace(), tmp_path / "a.npz")
    (tmp_path / "text").write_text("no archive")
    assert read_trace(tmp_path / "a.npz", format="npz").num_tokens == 60
    assert "File is not a zip file" in refusal(tmp_path / "text", format="npz")
    assert refusal(tmp_path / "a.npz", format="dataset") == "is not a folder"
    assert "known formats: " + ", ".join(READERS) in refusal(tmp_path / "a.npz", format="csv")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"topk": TOPK - 1}, "token 0 layer 0 names expert -1"),
        ({"topk": TOPK, "num_experts": 2}, "token 1 layer 0 names expert 2, outside 0..1"),
        ({"topk": TOPK.astype(float)}, "topk holds float64 values, not integer expert ids"),
        ({"topk": np.full((3, 1, 2), np.nan)}, "topk holds float64 values, not integer expert ids"),
        ({"topk": TOPK.astype(bool)}, "topk holds bool values, not integer expert ids"),
        ({"topk": np.zeros((0, 1, 2), int)}, "the trace is empty"),
        ({"topk": TOPK[:, 0]}, "expert ids have shape (3, 2)"),
        ({"topk": np.zeros((3, 1, 2), int)}, "names expert 0 twice"),
        ({"topk": TOPK, "num_experts": 3.5}, "num_experts is float64 [], not one integer"),
        ({"topk": TOPK, "num_experts": [3, 3]}, "num_experts is int64 [2], not one integer"),
        ({"topk": TOPK, "sequence": np.arange(2)}, "sequence_T has shape (2,), the trace 3 tokens"),
        ({"topk": TOPK, "domain": [0, 1, 9], "domain_names": ["a", "b"]}, "token 2 has domain_T 9"),
        ({"topk": TOPK, "domain": [0, 10**15, 0]}, f"token 1 has domain_T {10**15}"),
        ({"topk": TOPK, "domain_names": [1, 2]}, "domain_names is int64 [2], not a list of names"),
        ({"topk": TOPK, "model_name": 3}, "model_name is int64 [], not one name"),
        ({"topk": TOPK, "moe_layer_ids": [[0]]}, "moe_layer_ids is int64 [1, 1], not a list of integers"),
        ({"topk": TOPK.astype([("a", "u1")])}, "array topk holds Python objects or records"),
    ],
)
def test_archives_that_are_no_valid_trace_are_refused(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    """Every inconsistency is named with the file."""
    assert message in refusal(write_archive(tmp_path / "a.npz", **arrays))


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    """An object array is not unpickled to look inside."""
    path = write_archive(tmp_path / "a.npz", topk=np.array([[["x"]]], dtype=object))
    assert "array topk holds Python objects" in refusal(path)


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    trace = small_trace()
    np.savez_compressed(buffer, topk=trace.experts_TLK, num_experts=8, sequence=np.arange(trace.num_tokens))
    return buffer.getvalue()


NPZ = npz_bytes()


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.9, 0.99])
def test_truncated_archives_are_named(tmp_path: Path, kept: float) -> None:
    """Wherever the copy stopped, the message says that the file is damaged."""
    (tmp_path / "a.npz").write_bytes(NPZ[: int(len(NPZ) * kept)])
    assert refusal(tmp_path / "a.npz").startswith("is damaged or incomplete")


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(NPZ) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.integers(0, len(NPZ)),
)
def test_damaged_archives_never_fail_otherwise(flips: list[tuple[int, int]], length: int) -> None:
    """Any bytes are a trace or an input error, never another exception."""
    content = bytearray(NPZ)
    for place, value in flips:
        content[place] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        for damaged in (content, content[:length]):
            path.write_bytes(damaged)
            try:
                outcome: object = read_trace(path, format="npz")
            except InputError as exc:
                outcome = exc
            assert isinstance(outcome, Trace | InputError)


def stored_header(shape: str, body: bytes = b"") -> bytes:
    """Bytes of a version-1 ``.npy`` file whose header claims a shape."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(99999999999, 1, 2)", "array topk says it is uint8 [99999999999, 1, 2], but is 6 bytes long"),
        ("(1, 1, 4)", "array topk says it is uint8 [1, 1, 4], but is 6 bytes long"),
        ("(-1, -1, 6)", "is damaged"),
    ],
)
def test_array_headers_that_lie_are_refused(tmp_path: Path, shape: str, message: str) -> None:
    """No room is made for what is not in the file."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("topk.npy", stored_header(shape, bytes(6)))
    assert message in refusal(tmp_path / "a.npz")


def test_array_formats_of_the_future_are_refused(tmp_path: Path) -> None:
    """NumPy's version 3 holds records with foreign names, no plain numbers."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("topk.npy", b"\x93NUMPY\x03\x00" + bytes(20))
    assert "NumPy format version (3, 0)" in refusal(tmp_path / "a.npz")


def test_bombs_are_refused_before_they_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that claims to unpack to gigabytes is not unpacked."""
    monkeypatch.setattr(files, "_RATIO_MATTERS_BYTES", 1 << 16)
    path = write_archive(tmp_path / "a.npz", topk=np.zeros((1 << 20, 1, 1), np.uint8))
    assert "over 100 times its size" in refusal(path)


@pytest.mark.parametrize(
    ("content_bytes", "stored_bytes", "message"),
    [
        (65 * 2**30, 60 * 2**30, "more than the limit"),
        (2 * 2**30, 2**20, "unpacks from 1048576 to 2147483648 bytes"),
    ],
)
def test_sizes_beyond_any_trace_are_refused(content_bytes: int, stored_bytes: int, message: str) -> None:
    """Too large is too large, and too well compressed is suspicious once it matters."""
    with pytest.raises(InputError, match=message):
        files.check_size(content_bytes, stored_bytes)


@pytest.mark.parametrize(
    ("content_bytes", "stored_bytes"), [(60 * 2**30, 10 * 2**30), (2**30, 2**10), (10, 0)]
)
def test_sizes_of_traces_pass(content_bytes: int, stored_bytes: int) -> None:
    """Long traces and short, repetitive ones are read."""
    files.check_size(content_bytes, stored_bytes)
    assert content_bytes > stored_bytes
