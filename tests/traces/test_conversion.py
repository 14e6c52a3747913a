"""Tests of `traces.conversion`: sources joined as one, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from placement.errors import InputError
from traces.conversion import JoinedSource, write_counts, write_source
from traces.counts import ExpertCounts
from traces.readers import read_trace
from traces.source import MemorySource, read_all
from traces.synthesize import synthesize
from traces.trace import Trace


def source(num_tokens: int, *, num_domains: int = 2, seed: int = 0) -> MemorySource:
    """A small source."""
    return MemorySource(
        synthesize(
            num_tokens=num_tokens,
            num_layers=2,
            num_experts=8,
            top_k=2,
            num_domains=num_domains,
            sequence_tokens=4,
            seed=seed,
        )
    )


@pytest.mark.parametrize("max_tokens", [1, 7, 100])
def test_joined_sources_read_as_one(max_tokens: int) -> None:
    """From anywhere, in blocks as long as asked for, domains by their names."""
    joined = JoinedSource([("a", source(10)), ("b", source(23, num_domains=3, seed=1)), ("c", source(5))])
    assert joined.header.domain_names == ("domain0", "domain1", "domain2")
    whole = read_all(joined)
    assert whole.num_tokens == joined.num_tokens == 38
    assert joined.digest == whole.digest
    assert whole.sequence_T is not None
    assert len(np.unique(whole.sequence_T)) == 3 + 6 + 2
    for start, stop in ((0, 38), (8, 12), (10, 33), (37, 38), (5, 5)):
        blocks = list(joined.blocks(start, stop, max_tokens=max_tokens))
        sizes = [min(max_tokens, stop - first) for first in range(start, stop, max_tokens)]
        assert [block.num_tokens for block in blocks] == sizes
        for name in ("experts_TLK", "domain_T"):
            expected = getattr(whole, name)[start:stop]
            parts = [getattr(block, name) for block in blocks]
            np.testing.assert_array_equal(np.concatenate([expected[:0], *parts]), expected)


def test_unknown_domains_stay_unknown() -> None:
    """A source without domains among some that have them; a name given replaces all."""
    trace = source(4).trace
    bare = Trace(
        experts_TLK=trace.experts_TLK,
        num_experts=8,
        sequence_T=trace.sequence_T,
        position_T=trace.position_T,
        model_name="synthetic",
        moe_layer_ids=(0, 1),
    )
    pair = [("a", source(4)), ("b", MemorySource(bare))]
    domain_T = read_all(JoinedSource(pair)).domain_T
    assert domain_T is not None
    assert domain_T[4:].tolist() == [-1] * 4
    named = read_all(JoinedSource(pair, domains=["law", "law"]))
    assert named.domain_names == ("law",)
    assert named.domain_T is not None
    assert not named.domain_T.any()


def test_nothing_to_join_is_refused() -> None:
    """One source at least."""
    with pytest.raises(InputError, match="no trace is given"):
        JoinedSource([])


def test_a_written_source_comes_back(tmp_path: Path) -> None:
    """With progress told, as a data set and as an archive."""
    done: list[int] = []
    for name in ("set", "file.npz"):
        report = write_source(source(50), tmp_path / name, progress=done.append)
        assert (report.num_tokens, report.interrupted, report.path) == (50, False, str(tmp_path / name))
        assert read_trace(tmp_path / name).digest == source(50).trace.digest
    assert done == [50]
    with pytest.raises(InputError, match="nothing can be appended to an archive"):
        write_source(source(50), tmp_path / "file.npz", append=True)


def test_counts_that_differ_are_not_joined(tmp_path: Path) -> None:
    """With what differs, and no file."""
    first = ExpertCounts(load_WLE=np.ones((1, 2, 4), dtype=np.int64), top_k=2)
    other = ExpertCounts(load_WLE=np.ones((1, 2, 4), dtype=np.int64), top_k=1)
    with pytest.raises(InputError, match="counts differ in top_k: 2 and 1"):
        write_counts([first, other], tmp_path / "counts.json")
    assert not (tmp_path / "counts.json").exists()
