"""Tests of saved statistics: a round trip, known by content, and no stranger's number is believed."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.errors import InputError
from traces import files
from traces.readers import READERS, open_trace, read_trace
from traces.statistics import RoutingStatistics, collect, load, save
from traces.store import write_npz
from traces.synthesize import synthesize
from traces.trace import Trace


def counted(num_tokens: int = 200, **options: Any) -> RoutingStatistics:
    trace = synthesize(
        num_tokens=num_tokens, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=0
    )
    trace = Trace(
        experts_TLK=trace.experts_TLK,
        num_experts=8,
        sequence_T=trace.sequence_T,
        position_T=trace.position_T,
        rank_T=np.arange(num_tokens) % 3,
        domain_T=trace.domain_T,
        domain_names=trace.domain_names,
        model_name="tiny",
        moe_layer_ids=(1, 3),
    )
    return collect(trace, window_tokens=16, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a file of statistics."""
    save(counted(), tmp_path / "day.stats")
    return tmp_path / "day.stats"


def changed(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Write the archive anew with its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def with_head(path: Path, **values: Any) -> Path:
    """Change some values of the head."""

    def change(entries: dict[str, bytes]) -> None:
        head = json.loads(entries["moe-statistics.json"])
        entries["moe-statistics.json"] = json.dumps(head | values).encode()

    return changed(path, change)


def with_array(path: Path, name: str, array: Any) -> Path:
    """Change one array."""
    content = io.BytesIO()
    np.lib.format.write_array(content, np.asarray(array), allow_pickle=True)
    return changed(path, lambda entries: entries.update({f"{name}.npy": content.getvalue()}))


def refusal(path: Path) -> str:
    """Load what must not be loadable; return the one line that names the path."""
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "options", [{}, {"max_sampled_tokens": 0}, {"max_sampled_tokens": 40}, {"parts": ()}]
)
def test_statistics_survive_a_file(tmp_path: Path, options: dict[str, Any]) -> None:
    """Everything comes back, in types that are ready to be added up."""
    statistics = counted(**options)
    save(statistics, tmp_path / "day.stats")
    read = load(tmp_path / "day.stats")
    assert read.digest == statistics.digest
    assert read.header == statistics.header
    assert read.arrays().keys() == statistics.arrays().keys()
    for name, array in statistics.arrays().items():
        np.testing.assert_array_equal(read.arrays()[name], array)


def test_a_short_range_survives_a_file(tmp_path: Path) -> None:
    """Statistics without a whole window are statistics too."""
    save(counted(10), tmp_path / "short.stats")
    read = load(tmp_path / "short.stats")
    assert (read.num_windows, read.num_tokens) == (0, 10)
    with pytest.raises(InputError, match="10 tokens, less than one window of 16"):
        read.profile()


def test_statistics_are_known_by_content(path: Path, tmp_path: Path) -> None:
    """A file of any name is opened as what it is, and archives of tokens are still those."""
    renamed = path.rename(tmp_path / "trace.npz")
    found = open_trace(renamed)
    assert isinstance(found, RoutingStatistics)
    assert found.digest == counted().digest
    write_npz(synthesize(num_tokens=20, num_layers=1, num_experts=4, top_k=1, seed=0), tmp_path / "a.npz")
    assert not isinstance(open_trace(tmp_path / "a.npz"), RoutingStatistics)
    assert not READERS["statistics"].sniff(tmp_path)
    with pytest.raises(InputError, match="name the trace itself"):
        read_trace(renamed)


def test_samples_can_be_left_out(tmp_path: Path) -> None:
    """What single tokens selected is not in the file, the counts are."""
    save(counted(), tmp_path / "day.stats", with_sample=False)
    read = load(tmp_path / "day.stats")
    assert read.sample is None
    np.testing.assert_array_equal(read.transitions(0), counted().transitions(0))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(path: Path, share: float) -> None:
    """Wherever the file ends too early, it is named as statistics and as damaged."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert READERS["statistics"].sniff(path)
    assert "is damaged or incomplete" in refusal(path)


def test_a_flipped_bit_is_noticed(path: Path) -> None:
    """Somewhere in the compressed counts."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    assert "is damaged or incomplete" in refusal(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "moe-statistics/2"}, "has the format 'moe-statistics/2', not 'moe-statistics/1'"),
        ({"window_stride": 3}, "window_stride is 3, not a power of two"),
        ({"window_tokens": -1}, "window_tokens is -1, not a number of at least 1"),
        ({"window_tokens": 17}, "does not add up to 2 experts a token"),
        ({"window_stride": 2}, r"load_WLE has shape \(12, 2, 8\), not \(6, 2, 8\)"),
        ({"arrays": ["load_LE"]}, "has no array load_WLE"),
        ({"arrays": None}, "is damaged or incomplete"),
        (
            {"segments": [{"digest": "", "first_window": 0, "num_windows": 1 << 60, "tail_tokens": 0}]},
            "shape",
        ),
        ({"header": {"num_layers": 2, "num_experts": 8, "top_k": 9}}, "gives top-9 of 8 experts"),
        ({"header": {"num_layers": 2, "num_experts": 7, "top_k": 2}}, "the sample names expert 7 of 7"),
        ({"header": {"num_layers": 2, "num_experts": 1 << 40, "top_k": 2}}, "up to 65536 are possible"),
    ],
)
def test_heads_that_lie_are_refused(path: Path, values: dict[str, Any], message: str) -> None:
    """No number of the head is believed where the counts say otherwise."""
    with pytest.raises(InputError, match=message):
        load(with_head(path, **values))
    refusal(path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("load_LE", np.full((2, 8), -5), "array load_LE holds -5; counts are not negative"),
        ("load_LE", np.full((2, 8), -1), "holds int64 values, not counts"),
        ("load_LE", np.full((2, 8), 50, np.uint8), ""),
        ("load_LE", np.full((2, 8), 51, np.uint8), "load_LE does not add up to 2 experts a token"),
        ("load_LE", np.full((3, 8), 50, np.uint8), "load_LE has shape"),
        ("load_LE", np.full((2, 8), 50.0), "holds float64 values, not counts"),
        ("load_LE", np.array([[None]]), "holds object values, not counts"),
        (
            "transitions_LEE",
            np.ones((1, 8, 8), np.uint8),
            "transitions_LEE does not add up to the pairs of 200",
        ),
        ("sample.experts_TLK", np.full((200, 2, 2), 8, np.uint8), "the sample names expert 8 of 8"),
        ("sample.experts_TLK", np.zeros((2, 2, 2), np.uint8), "token_T has shape"),
        ("sample.stratum_T", np.full(200, 99), "strata of the sample must ascend within 0..12"),
        ("rank_R", np.zeros((1, 3), np.uint8), "rank_R has shape"),
    ],
)
def test_arrays_that_lie_are_refused(path: Path, name: str, array: Any, message: str) -> None:
    """Counts that no trace has, types that are no counts, and Python objects, which are never unpickled."""
    with_array(path, name, array)
    if not message:
        assert load(path).load_LE.tolist() == np.asarray(array).tolist()
        return
    assert message in refusal(path)


def test_an_array_longer_than_it_says_is_refused(path: Path) -> None:
    """Memory is made for what is there, not for what an array's head promises."""

    def change(entries: dict[str, bytes]) -> None:
        content = entries["load_LE.npy"]
        entries["load_LE.npy"] = content.replace(b"(2, 8)", b"(2, 9)")

    assert "load_LE is not as long as it says" in refusal(changed(path, change))


def test_a_later_version_may_add_arrays(path: Path) -> None:
    """What is not known is not read."""

    def change(entries: dict[str, bytes]) -> None:
        head = json.loads(entries["moe-statistics.json"])
        head["arrays"].append("colour_C")
        entries["moe-statistics.json"] = json.dumps(head).encode()
        entries["colour_C.npy"] = b"?"

    assert load(changed(path, change)).digest == counted().digest


def test_bombs_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would unpack to too much is not unpacked."""
    monkeypatch.setattr(files, "_LIMIT_BYTES", 1000)
    assert "more than the limit of 1000" in refusal(path)


def test_a_head_without_end_is_refused(path: Path) -> None:
    """The head is read whole, so it is bounded."""
    huge = b"[" * ((1 << 24) + 1)
    assert "has a head of 16777217 bytes" in refusal(
        changed(path, lambda entries: entries.update({"moe-statistics.json": huge}))
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip archive at all"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """By name of the path, in one line."""
    path = tmp_path / "other"
    path.write_bytes(content)
    assert not READERS["statistics"].sniff(path)
    refusal(path)


def test_files_are_written_whole_or_not_at_all(path: Path) -> None:
    """A folder that does not exist is named, and a failure leaves what was there."""
    with pytest.raises(InputError, match="cannot be written"):
        save(counted(), path / "missing" / "day.stats")
    assert load(path).digest == counted().digest
    assert [entry.name for entry in path.parent.iterdir()] == ["day.stats"]
