"""Tests of cutting traces and writing streams: what is kept, and that all of it or nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.errors import InputError
from traces.readers import read_trace
from traces.source import MemorySource, TraceHeader, read_all
from traces.store import DatasetSource, read_dataset, write_dataset
from traces.store.copy import write_stream
from traces.store.cut import Cut
from traces.trace import Trace, joined


def numbered(num_tokens: int = 60, **changes: Any) -> Trace:
    """Return a trace whose positions number its tokens: three domains, sequences of five."""
    token_T = np.arange(num_tokens)
    fields: dict[str, Any] = {
        "experts_TLK": np.stack([token_T % 7, 7 + token_T % 3], axis=1)[:, None, :],
        "num_experts": 10,
        "position_T": token_T,
        "sequence_T": token_T // 5,
        "domain_T": token_T // 5 % 3,
        "domain_names": ("a", "b", "c"),
    }
    return Trace(**{**fields, **changes})


def kept(trace: Trace, **options: Any) -> list[int]:
    """Return the numbers of the tokens that a cut keeps."""
    blocks = list(Cut(**options).blocks(MemorySource(trace), max_tokens=7))
    return [] if not blocks else joined(blocks).position_T.tolist()  # type: ignore[union-attr]


def test_a_stretch_is_cut_out() -> None:
    """From one token to another, or to the end."""
    assert kept(numbered(), start=11, stop=40) == list(range(11, 40))
    assert kept(numbered(), start=58) == [58, 59]
    assert kept(numbered()) == list(range(60))


def test_folds_are_every_other_window() -> None:
    """Even and odd windows share nothing, drop the rest that fills no window, and agree with the trace."""
    even, odd = kept(numbered(), fold="even", window_tokens=8), kept(numbered(), fold="odd", window_tokens=8)
    fit, score = numbered().split_alternate(8)
    assert fit.position_T is not None
    assert score.position_T is not None
    assert even == fit.position_T.tolist()
    assert odd == score.position_T.tolist()


def test_every_nth_window_is_kept() -> None:
    """Counted from the start of the stretch."""
    assert kept(numbered(), every=3, window_tokens=4, start=2, stop=30) == [
        *range(2, 6), *range(14, 18), *range(26, 30)
    ]  # fmt: skip


def test_domains_are_kept_by_name() -> None:
    """One or several; tokens without a domain belong to none."""
    trace = numbered()
    assert kept(trace, domains=("b",)) == [t for t in range(60) if t // 5 % 3 == 1]
    assert kept(trace, domains=("c", "a")) == [t for t in range(60) if t // 5 % 3 != 1]
    assert kept(numbered(domain_T=None), domains=("b",)) == []


def test_sequences_are_kept_whole_and_by_chance() -> None:
    """A share of them, the same ones wherever the cut begins; other seeds keep others."""
    trace = numbered(5000, rank_T=np.zeros(5000, int))
    some = kept(trace, sequence_share=0.3, seed=1)
    assert all(set(range(t // 5 * 5, t // 5 * 5 + 5)) <= set(some) for t in some)
    assert 220 < len(some) / 5 < 380
    assert kept(trace, sequence_share=0.3, seed=1, start=2500) == [t for t in some if t >= 2500]
    assert kept(trace, sequence_share=0.3, seed=2) != some
    assert kept(trace, sequence_share=1.0) == list(range(5000))


def test_choices_add_up() -> None:
    """A fold of a stretch of a domain."""
    both = set(kept(numbered(), domains=("a",))) & set(kept(numbered(), fold="odd", window_tokens=10))
    assert kept(numbered(), domains=("a",), fold="odd", window_tokens=10) == sorted(both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": "even", "every": 2, "window_tokens": 3}, "choose one"),
        ({"fold": "first", "window_tokens": 3}, "fold 'first' is unknown"),
        ({"fold": "even"}, "windows of how many tokens"),
        ({"every": 2, "window_tokens": 0}, "windows of how many tokens"),
        ({"every": 0, "window_tokens": 5}, "every 0th window"),
        ({"sequence_share": 0.0}, "share of 0 of the sequences"),
        ({"sequence_share": 1.5}, r"share of 1\.5 of the sequences"),
        ({"start": 61}, "tokens 61 to 60"),
        ({"domains": ("x",)}, "no domain is called 'x'; there are 'a', 'b', 'c'"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    """Each with what would make sense."""
    with pytest.raises(InputError, match=message):
        kept(numbered(), **options)


def test_traces_without_sequences_or_domains_cannot_be_cut_by_them() -> None:
    """The message says what is missing."""
    with pytest.raises(InputError, match="does not say which tokens are one sequence"):
        kept(numbered(sequence_T=None), sequence_share=0.5)
    with pytest.raises(InputError, match="the trace has no domains"):
        kept(numbered(domain_T=None, domain_names=()), domains=("a",))


def test_a_stream_gives_every_rank_its_shard(tmp_path: Path) -> None:
    """Ranks are told apart while they are written, and interleaved when they are read."""
    trace = numbered(rank_T=np.arange(60) % 3)
    source = MemorySource(trace)
    assert write_stream(source.blocks(max_tokens=7), source.header, tmp_path / "out", fragment_tokens=9) == 60
    written = DatasetSource(tmp_path / "out")
    assert [manifest.rank for manifest in written.manifests] == [0, 1, 2]
    assert read_all(written).digest == trace.digest


def test_ranks_beyond_measure_share_a_shard(tmp_path: Path) -> None:
    """A rank whose number no file name has room for is kept all the same."""
    trace = numbered(rank_T=np.where(np.arange(60) % 2, 10**12, 1))
    source = MemorySource(trace)
    write_stream(source.blocks(), source.header, tmp_path / "out")
    assert read_all(DatasetSource(tmp_path / "out")).digest == source.trace.interleave_ranks().digest


@pytest.mark.parametrize("name", ["out", "out.npz", "memory"])
def test_streams_go_into_folders_archives_and_urls(tmp_path: Path, name: str) -> None:
    """And replace what is there only when told."""
    out = f"memory://{tmp_path.name}/set" if name == "memory" else str(tmp_path / name)
    source = MemorySource(numbered())
    write_stream(source.blocks(), source.header, out)
    assert read_trace(out).digest == numbered().digest
    shorter = MemorySource(numbered(10))
    with pytest.raises(InputError, match="already; choose another output or overwrite it"):
        write_stream(shorter.blocks(), shorter.header, out)
    write_stream(shorter.blocks(), shorter.header, out, overwrite=True)
    assert read_trace(out).num_tokens == 10


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("remote", [True, False])
def test_a_stream_that_breaks_off_leaves_nothing(tmp_path: Path, there: bool, remote: bool) -> None:
    """What was there before stays as long as it is local, and nothing half-written is left."""
    out = f"memory://{tmp_path.name}/{there}" if remote else str(tmp_path / "out")
    if there:
        write_dataset(numbered(), out)

    def breaks() -> Iterator[Trace]:
        yield numbered()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(breaks(), TraceHeader.of(numbered()), out, overwrite=True, fragment_tokens=10)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there and not remote else [])
    if there and not remote:
        assert read_dataset(out).digest == numbered().digest
    else:
        with pytest.raises(InputError, match=r"does not exist|without a manifest"):
            DatasetSource(out)


def test_keeping_no_token_writes_nothing(tmp_path: Path) -> None:
    """An empty data set is of no use."""
    header = TraceHeader.of(numbered())
    with pytest.raises(InputError, match="no token is kept, so nothing is written"):
        write_stream(iter(()), header, tmp_path / "out")
    with pytest.raises(InputError, match="the trace is empty"):
        write_stream(iter(()), header, tmp_path / "out.npz")
    assert list(tmp_path.iterdir()) == []


def test_folders_with_other_files_are_left_alone(tmp_path: Path) -> None:
    """Before anything is read."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes\.txt\)"):
        write_stream(iter(()), TraceHeader.of(numbered()), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
