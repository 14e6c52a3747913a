"""Tests of summaries from manifests and footers: the same figures as from reading everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from traces.source import MemorySource
from traces.statistics import describe
from traces.store import DatasetSource, DatasetWriter, FragmentError, read_dataset
from traces.store import summary as summaries
from traces.store.folder import LocalFolder
from traces.store.summary import summarise
from traces.synthesize import synthesize

RECORDED = Path(__file__).parents[2] / "data" / "traces" / "recorded"


def record(folder: Path, *, fragment_tokens: int = 500) -> Path:
    """Record two ranks of 2,000 tokens of skewed traffic in two domains."""
    for rank in range(2):
        trace = synthesize(
            num_tokens=2000, num_layers=3, num_experts=16, top_k=4, sequence_tokens=100, seed=rank
        )
        with DatasetWriter(
            folder,
            num_layers=3,
            num_experts=16,
            top_k=4,
            rank=rank,
            domain_names=("a", "b"),
            fragment_tokens=fragment_tokens,
        ) as out:
            out.append(
                trace.experts_TLK,
                sequence_T=np.arange(2000) // 100,
                domain_T=np.arange(2000) // 100 % 2,
            )
    return folder


@pytest.fixture
def always_footers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summaries, "_READ_WHOLE_RECORDS", 0)


@pytest.mark.usefixtures("always_footers")
def test_footers_tell_what_reading_tells(tmp_path: Path) -> None:
    """Loads, sizes, sequences and domains are exact; drift follows whole fragments, which here fit halves."""
    source = DatasetSource(record(tmp_path))
    found, read = summarise(source), describe(MemorySource(read_dataset(tmp_path)))
    for name in ("num_tokens", "num_sequences", "num_ranks", "num_experts", "top_k", "size_bytes"):
        assert getattr(found.summary, name) == getattr(read, name)
    assert dict(found.summary.domain_tokens) == dict(read.domain_tokens) == {"a": 2000, "b": 2000}
    for layer, expected in zip(found.summary.layers, read.layers, strict=True):
        assert layer.busiest_over_mean == expected.busiest_over_mean
        assert layer.coefficient_of_variation == pytest.approx(expected.coefficient_of_variation)
        assert layer.active_experts == expected.active_experts
        assert layer.drift == pytest.approx(expected.drift)
        assert layer.coactivation == pytest.approx(expected.coactivation)
    assert dict(found.found) == {
        "loads": "exact",
        "drift": "whole fragments of either half",
        "coactivation": "4000 tokens, evenly spread",
        "sequences": "exact",
    }
    assert found.stored is not None
    assert (found.stored["fragments"], found.stored["shards"]) == (8, 2)


@pytest.mark.usefixtures("always_footers")
def test_one_fragment_a_rank_tells_no_drift_by_itself(tmp_path: Path) -> None:
    """Then drift is that of the tokens that were sampled, and said to be."""
    found = summarise(DatasetSource(record(tmp_path, fragment_tokens=5000)))
    assert found.found["drift"] == "4000 tokens, evenly spread"


@pytest.mark.usefixtures("always_footers")
def test_sequences_that_run_side_by_side_are_counted_at_most(tmp_path: Path) -> None:
    """A sequence in many fragments cannot be told from many; the figure is a bound and says so."""
    with DatasetWriter(tmp_path, num_layers=1, num_experts=4, top_k=1, fragment_tokens=4) as out:
        out.append(np.zeros((8, 1, 1), int), sequence_T=[0, 1, 2, 3] * 2)
    found = summarise(DatasetSource(tmp_path))
    assert (found.summary.num_sequences, found.found["sequences"]) == (8, "at most")


@pytest.mark.usefixtures("always_footers")
def test_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside footers, row groups are fetched for the sample alone."""
    path = record(tmp_path, fragment_tokens=100)
    monkeypatch.setattr(summaries, "_SAMPLED_TOKENS", 80)
    fetched = []
    original = LocalFolder.read_into

    def read_into(self: LocalFolder, name: str, start: int, buffer: memoryview) -> int:
        fetched.append(name)
        return original(self, name, start, buffer)

    monkeypatch.setattr(LocalFolder, "read_into", read_into)
    found = summarise(DatasetSource(path))
    assert found.found["coactivation"] == "80 tokens, evenly spread"
    assert len(set(fetched)) <= 8 * 2 * 2
    assert len(fetched) < 40


def test_small_data_sets_are_read_whole(tmp_path: Path) -> None:
    """What takes no time is exact."""
    found = summarise(DatasetSource(record(tmp_path)))
    assert set(found.found.values()) == {"exact"}


def test_format_1_is_read_whole() -> None:
    """It has no footers that tell anything."""
    found = summarise(DatasetSource(RECORDED))
    assert (found.summary.num_tokens, found.summary.num_ranks) == (24, 2)
    assert set(found.found.values()) == {"exact"}


@pytest.mark.usefixtures("always_footers")
def test_a_missing_fragment_is_named(tmp_path: Path) -> None:
    """Loads would not be exact without it."""
    record(tmp_path)
    (tmp_path / "rank00001-00002.parquet").unlink()
    with pytest.raises(
        FragmentError, match=r"rank00001-00002\.parquet: is named by the manifest and not there"
    ):
        summarise(DatasetSource(tmp_path))
