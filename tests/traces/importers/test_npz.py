"""Tests of `traces.importers.npz`: archives too large for memory are mapped, and read as small ones are."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces.importers import npz, npz_source
from traces.importers.npz_source import NpzSource, RankOrder
from traces.readers import open_trace
from traces.source import MemorySource, TraceHeader, TraceSource, read_all
from traces.trace import Trace


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every archive for a large one, in pieces of a few tokens."""
    monkeypatch.setattr(npz, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(npz_source, "BLOCK_TOKENS", 7)


def random_trace(num_tokens: int, rank_T: Any = None, **fields: Any) -> Trace:
    """Return a trace of 2 layers, top-2 of 300 experts."""
    rng = np.random.default_rng(0)
    experts = np.stack([rng.integers(0, 300, (num_tokens, 2)), rng.integers(0, 300, (num_tokens, 2))], axis=2)
    experts[:, :, 1] = (experts[:, :, 0] + 1 + experts[:, :, 1] % 299) % 300
    return Trace(experts_TLK=experts, num_experts=300, rank_T=rank_T, **fields)


def save(trace: Trace, path: Path, *, compressed: bool) -> Path:
    arrays = {"topk": trace.experts_TLK, "num_experts": trace.num_experts, "sequence": trace.sequence_T}
    arrays |= {"position": trace.position_T, "rank": trace.rank_T, "domain": trace.domain_T}
    arrays |= {"domain_names": trace.domain_names or None, "moe_layer_ids": trace.moe_layer_ids}
    known: dict[str, Any] = {key: value for key, value in arrays.items() if value is not None}
    (np.savez_compressed if compressed else np.savez)(path, **known)
    return path


def opened(path: Path) -> TraceSource:
    source = open_trace(path)
    assert isinstance(source, NpzSource)
    return source


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    "ranks",
    [None, [0] * 40, [0] * 13 + [1] * 27, [2] * 20 + [0] * 13 + [5] * 7, [0, 1] * 20, [1, 1, 0, 3] * 10],
    ids=["none", "one", "two", "unsorted", "alternating", "uneven"],
)
def test_a_mapped_archive_reads_as_one_in_memory(tmp_path: Path, compressed: bool, ranks: Any) -> None:
    """Header, digest and tokens in the order of routing are the same, whatever lies where."""
    trace = random_trace(
        40,
        None if ranks is None else np.array(ranks),
        sequence_T=np.arange(40) // 9,
        position_T=np.arange(40) % 9,
        domain_T=np.array([-1, 0, 1, 1] * 10),
        domain_names=("a", "b"),
        moe_layer_ids=(1, 5),
    )
    source = opened(save(trace, tmp_path / "a.npz", compressed=compressed))
    assert source.header == TraceHeader.of(trace)
    assert source.digest == trace.digest
    expected = trace.interleave_ranks()
    assert read_all(source).digest == expected.digest
    parts = list(source.blocks(5, 33, max_tokens=10))
    assert [part.num_tokens for part in parts] == [10, 10, 8]
    assert (
        np.concatenate([part.experts_TLK for part in parts]).tolist() == expected.experts_TLK[5:33].tolist()
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    piece_tokens=st.integers(1, 50),
    shuffled=st.booleans(),
)
def test_pieces_follow_the_order_of_ranks(sizes: list[int], piece_tokens: int, shuffled: bool) -> None:
    """However many tokens the ranks have, the pieces in turn are `Trace.interleave_ranks`."""
    rank_T = np.repeat(np.arange(len(sizes)), sizes)
    if shuffled:
        rank_T = np.random.default_rng(1).permutation(rank_T)
    trace = random_trace(len(rank_T), rank_T, sequence_T=np.arange(len(rank_T)))
    order = RankOrder(rank_T, len(rank_T), piece_tokens)
    places = [np.arange(len(rank_T))[order.tokens(piece)] for piece in range(len(order.tokens_N))]
    assert [len(place) for place in places] == order.tokens_N.tolist()
    expected = trace.interleave_ranks().sequence_T
    assert expected is not None
    assert np.concatenate(places).tolist() == expected.tolist()


@pytest.mark.usefixtures("small_memory")
def test_experts_are_counted_where_the_archive_does_not_say(tmp_path: Path) -> None:
    """The largest id of all tokens counts, not that of the first piece."""
    topk = np.array([[[0, 1]]] * 30 + [[[2, 9]]])
    np.savez(tmp_path / "a.npz", topk=topk)
    assert opened(tmp_path / "a.npz").header.num_experts == 10


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"topk": np.ones((9, 1, 1)) / 2}, "topk holds float64 values"),
        ({"topk": np.ones((9, 2), int)}, "expert ids have shape"),
        ({"topk": np.ones((9, 1, 1), int), "rank": np.arange(8)}, "rank_T has shape"),
        ({"topk": np.array([[["x"]]], dtype=object)}, "array topk holds Python objects"),
    ],
)
def test_mapped_archives_that_are_no_trace_are_refused(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    """The same lines as for small archives."""
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_trace(tmp_path / "a.npz")


@pytest.mark.usefixtures("small_memory")
def test_ids_outside_are_found_when_read(tmp_path: Path) -> None:
    """The message names the archive and the stretch of tokens."""
    np.savez(tmp_path / "a.npz", topk=np.array([[[0, 1]]] * 30 + [[[2, 9]]]), num_experts=5)
    with pytest.raises(
        InputError, match=r"a\.npz: from token 25: token 5 layer 0 names expert 9, outside 0\.\.4"
    ):
        read_all(opened(tmp_path / "a.npz"))


@pytest.mark.usefixtures("small_memory")
def test_headers_that_lie_map_nothing(tmp_path: Path) -> None:
    """No room is made for what is not in the file."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 1, 2), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(
            "topk.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"123456"
        )
    with pytest.raises(InputError, match="says it is uint8"):
        open_trace(tmp_path / "a.npz")


@pytest.mark.usefixtures("small_memory")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking needs room where temporary files go."""

    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, content: bytes) -> int:
            raise OSError(28, "No space left on device")

    path = save(random_trace(40), tmp_path / "a.npz", compressed=True)
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(InputError, match="No space left on device"):
        open_trace(path)


def test_small_archives_are_read_whole(tmp_path: Path) -> None:
    """Reading them from memory is fastest."""
    trace = random_trace(40)
    source = open_trace(save(trace, tmp_path / "a.npz", compressed=True))
    assert isinstance(source, MemorySource)
    assert source.digest == trace.digest
