"""Tests of what goes into a fragment: row groups, loads, and the record of both in the footer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from placement.errors import InputError
from traces.source import TraceHeader
from traces.store import DatasetSource, DatasetWriter, encode, write_dataset
from traces.store.kernels import count_ids, count_layers
from traces.synthesize import synthesize
from traces.trace import Trace


@pytest.mark.parametrize(("dtype", "num_experts"), [(np.uint8, 5), (np.uint8, 256), (np.uint16, 700)])
def test_ids_are_counted(dtype: type, num_experts: int) -> None:
    """Like NumPy counts, for lengths that are no multiple of what is counted at once."""
    ids = np.random.default_rng(0).integers(0, num_experts, 1003).astype(dtype)
    assert count_ids(ids, num_experts).tolist() == np.bincount(ids, minlength=num_experts).tolist()


def test_ids_beyond_the_experts_are_not_counted() -> None:
    """The greatest one is named; nothing is written beside the table."""
    with pytest.raises(InputError, match=r"names expert 9, outside 0\.\.4"):
        count_ids(np.array([1, 7, 9], np.uint8), 5)
    with pytest.raises(InputError, match=r"names expert 9, outside 0\.\.4"):
        count_layers(np.array([[[1, 2]], [[9, 7]]], np.uint8), 5)


def test_footers_hold_the_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact, over all row groups, and whichever way they were counted."""
    trace = synthesize(num_tokens=600, num_layers=3, num_experts=300, top_k=4, seed=0)
    expected = [np.bincount(trace.experts_TLK[:, layer].ravel(), minlength=300) for layer in range(3)]
    for few in (0, 1 << 19):
        monkeypatch.setattr(encode, "_FEW_IDS", few)
        write_dataset(trace, tmp_path, overwrite=True)
        source = DatasetSource(tmp_path)
        content = source.content_of(source.fragments[0])
        assert content is not None
        np.testing.assert_array_equal(content.load_LE, expected)
        assert sum(tokens for tokens, _, _ in content.row_groups) == 600


def test_batches_of_any_size_become_even_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However tokens were appended, rows lie as one write would have laid them."""
    monkeypatch.setattr(encode, "row_group_tokens", lambda header: 8)
    trace = synthesize(num_tokens=45, num_layers=2, num_experts=8, top_k=2, seed=0)
    digests = set()
    for name, sizes in (("a", [45]), ("b", [1, 2, 30, 12]), ("c", [8, 8, 8, 8, 13])):
        with DatasetWriter(tmp_path / name, num_layers=2, num_experts=8, top_k=2) as out:
            start = 0
            for size in sizes:
                out.append(trace.experts_TLK[start : start + size], position_T=np.arange(start, start + size))
                start += size
        source = DatasetSource(tmp_path / name)
        content = source.content_of(source.fragments[0])
        assert content is not None
        assert [tokens for tokens, _, _ in content.row_groups] == [8, 8, 8, 8, 8, 5]
        digests.add(source.digest)
    assert len(digests) == 1


def test_row_groups_are_some_megabytes() -> None:
    """A power of two of tokens, whatever the shape."""
    tokens = [
        encode.row_group_tokens(TraceHeader(num_layers=layers, num_experts=experts, top_k=top_k))
        for layers, experts, top_k in ((58, 256, 8), (1, 2, 1), (16384, 60000, 64))
    ]
    assert tokens == [8192, 1 << 17, 256]


def test_a_fragment_is_plain_parquet(tmp_path: Path) -> None:
    """Other tools read it: zstd, one binary of k bytes per layer, two per id above 256 experts."""
    for num_experts, width in ((256, 3), (257, 6)):
        experts_TLK = np.tile([[[0, 1, num_experts - 1]]], (4, 2, 1))
        trace = Trace(
            experts_TLK=experts_TLK, num_experts=num_experts, domain_T=[0, -1, 0, 0], domain_names=("a",)
        )
        write_dataset(trace, tmp_path, overwrite=True)
        table = pq.read_table(tmp_path / "rank00000-00000.parquet")
        assert table.schema.field("layer_001").type.byte_width == width
        assert table["domain"].to_pylist() == [0, None, 0, 0]
        assert table["sequence"].null_count == 4
        metadata = pq.read_metadata(tmp_path / "rank00000-00000.parquet")
        assert metadata.row_group(0).column(4).compression == "ZSTD"
