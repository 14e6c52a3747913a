"""Tests of merging: fragments are linked, not rewritten; ranks, sequences and domains stay apart or meet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.errors import InputError
from traces.source import read_all
from traces.store import DatasetSource, DatasetWriter, merge_datasets, read_dataset
from traces.store.folder import LocalFolder
from traces.store.summary import summarise

RECORDED = Path(__file__).parents[2] / "data" / "traces" / "recorded"


def record(
    folder: Path, tokens: int, *, seed: int = 0, ranks: int = 1, domain: str | None = None, **changes: Any
) -> Path:
    """Record random tokens in sequences of four on some ranks."""
    shape = {"num_layers": 2, "num_experts": 8, "top_k": 2, **changes}
    names = () if domain is None else ("common", domain)
    for rank in range(ranks):
        rng = np.random.default_rng((seed, rank))
        with DatasetWriter(folder, rank=rank, fragment_tokens=10, domain_names=names, **shape) as out:
            experts = rng.random((tokens, shape["num_layers"], shape["num_experts"])).argsort(axis=2)
            out.append(
                experts[:, :, : shape["top_k"]],
                sequence_T=np.arange(tokens) // 4,
                domain_T=None if domain is None else np.arange(tokens) % 2,
            )
    return folder


def test_ranks_that_went_on_recording_are_joined_in_time(tmp_path: Path) -> None:
    """By default each rank's tokens of the second data set follow those of the first, linked as they are."""
    a, b = record(tmp_path / "a", 12, ranks=2), record(tmp_path / "b", 8, seed=1, ranks=2)
    report = merge_datasets([a, b], tmp_path / "out")
    assert (report.num_tokens, report.num_ranks, report.num_fragments) == (40, 2, 6)
    back, parts = read_dataset(tmp_path / "out"), (read_dataset(a), read_dataset(b))
    assert back.rank_T is not None
    assert back.rank_T.tolist() == [0] * 20 + [1] * 20
    for rank, of_rank in ((0, slice(0, 20)), (1, slice(20, 40))):
        expected = np.concatenate([part.experts_TLK[part.rank_T == rank] for part in parts])
        np.testing.assert_array_equal(back.experts_TLK[of_rank], expected)
    linked = (tmp_path / "out" / "rank00000-00002.parquet").stat()
    assert linked.st_ino == (b / "rank00000-00000.parquet").stat().st_ino
    assert read_all(DatasetSource(tmp_path / "out")).digest == back.interleave_ranks().digest


def test_ranks_that_ran_side_by_side_are_numbered_anew(tmp_path: Path) -> None:
    """Data sets of separate processes become ranks of one, without a byte of them being rewritten."""
    paths = [record(tmp_path / name, 10, seed=seed, ranks=2) for seed, name in enumerate("abc")]
    assert merge_datasets(paths, tmp_path / "out", ranks="renumber").num_ranks == 6
    back = read_dataset(tmp_path / "out")
    assert back.rank_T is not None
    assert back.rank_T.tolist() == np.repeat(np.arange(6), 10).tolist()
    np.testing.assert_array_equal(
        back.experts_TLK, np.concatenate([read_dataset(path).experts_TLK for path in paths])
    )
    assert read_all(DatasetSource(tmp_path / "out")).digest == back.interleave_ranks().digest


def test_a_data_set_without_ranks_becomes_one(tmp_path: Path) -> None:
    """Dumps that do not say which rank they are of are told apart by where they came from."""
    from traces.store import write_dataset
    from traces.synthesize import synthesize

    for name in "ab":
        trace = synthesize(num_tokens=9, num_layers=2, num_experts=8, top_k=2, seed=ord(name))
        write_dataset(trace, tmp_path / name)
    merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out", ranks="renumber")
    back = read_dataset(tmp_path / "out")
    assert back.rank_T is not None
    assert back.rank_T.tolist() == [0] * 9 + [1] * 9
    again = merge_datasets([tmp_path / "out", tmp_path / "a"], tmp_path / "more", ranks="renumber")
    assert again.num_ranks == 3


def test_sequences_and_domains_of_data_sets_stay_what_they_are(tmp_path: Path) -> None:
    """Sequences never become one by having the same number; domains do by having the same name."""
    a = record(tmp_path / "a", 12, domain="code")
    b = record(tmp_path / "b", 10, seed=1, domain="prose")
    report = merge_datasets([a, b, a], tmp_path / "out")
    assert report.header.domain_names == ("common", "code", "prose")
    back = read_dataset(tmp_path / "out")
    assert back.sequence_T is not None
    assert back.domain_T is not None
    assert back.sequence_T.tolist() == [t // 4 for t in range(12)] + [3 + t // 4 for t in range(10)] + [
        6 + t // 4 for t in range(12)
    ]
    assert back.domain_T.tolist() == [0, 1] * 6 + [0, 2] * 5 + [0, 1] * 6
    found = summarise(DatasetSource(tmp_path / "out")).summary
    assert dict(found.domain_tokens) == {"common": 17, "code": 12, "prose": 5}
    assert found.num_sequences == 9
    # Merged once more, the changes add up.
    merge_datasets([b, tmp_path / "out"], tmp_path / "twice")
    twice = read_dataset(tmp_path / "twice")
    assert twice.domain_names == ("common", "prose", "code")
    assert twice.domain_T is not None
    assert twice.domain_T.tolist() == [0, 1] * 5 + [0, 2] * 6 + [0, 1] * 5 + [0, 2] * 6
    assert twice.sequence_T is not None
    assert twice.sequence_T[10:].tolist() == (3 + back.sequence_T).tolist()


def test_a_merged_data_set_can_be_appended_to(tmp_path: Path) -> None:
    """Recording goes on where the merge ended."""
    merge_datasets([record(tmp_path / "a", 12), record(tmp_path / "b", 8)], tmp_path / "out")
    with DatasetWriter(tmp_path / "out", num_layers=2, num_experts=8, top_k=2, append=True) as out:
        assert out.next_sequence == 5
        out.append(np.tile([[[0, 1], [2, 3]]], (4, 1, 1)), sequence_T=np.full(4, 5))
    assert read_dataset(tmp_path / "out").num_tokens == 24
    assert read_dataset(tmp_path / "a").num_tokens == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 16}, "num_experts 16 against 8"),
        ({"num_layers": 3}, "num_layers 3 against 2"),
        ({"top_k": 1}, "top_k 1 against 2"),
        ({"model_name": "x"}, "model_name 'x' against None"),
    ],
)
def test_other_shapes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Both values are named, and nothing is written."""
    a, b = record(tmp_path / "a", 5), record(tmp_path / "b", 5, **changes)
    with pytest.raises(InputError, match=rf"b: cannot be merged with .*a: {message}"):
        merge_datasets([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_columns_are_refused(tmp_path: Path) -> None:
    """What only some tokens would have cannot be read back."""
    a = record(tmp_path / "a", 5)
    with DatasetWriter(tmp_path / "b", num_layers=2, num_experts=8, top_k=2) as out:
        out.append(read_dataset(a).experts_TLK)
    with pytest.raises(InputError, match="it knows rank of each token, the other rank, sequence"):
        merge_datasets([a, tmp_path / "b"], tmp_path / "out")


def test_format_1_has_to_be_rewritten_first(tmp_path: Path) -> None:
    """Its fragments do not say enough; the message says what to do."""
    with pytest.raises(InputError, match=r"was recorded in format 1.*trace window"):
        merge_datasets([RECORDED, RECORDED], tmp_path / "out")


def test_outputs_are_not_overwritten_by_accident(tmp_path: Path) -> None:
    """Not a data set that is there, and never one of the inputs."""
    a = record(tmp_path / "a", 5)
    record(tmp_path / "out", 5)
    with pytest.raises(InputError, match="holds a data set already"):
        merge_datasets([a], tmp_path / "out")
    with pytest.raises(InputError, match="is one of the data sets to merge"):
        merge_datasets([a], tmp_path / "a", overwrite=True)
    assert merge_datasets([a, a], tmp_path / "out", overwrite=True).num_tokens == 10


@pytest.mark.parametrize("way", ["keep", "renumber"])
def test_no_data_set_or_way_is_guessed(tmp_path: Path, way: Any) -> None:
    """Nothing to merge, or an unknown way, is an input error."""
    with pytest.raises(InputError, match="no data set to merge"):
        merge_datasets([], tmp_path / "out", ranks=way)
    with pytest.raises(InputError, match=f"ranks '{way}s' is unknown"):
        merge_datasets([record(tmp_path / "a", 5)], tmp_path / "out", ranks=f"{way}s")  # type: ignore[arg-type]


def test_fragments_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another disk takes copies."""

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    a = record(tmp_path / "a", 12)
    merge_datasets([a, a], tmp_path / "out")
    np.testing.assert_array_equal(
        read_dataset(tmp_path / "out").experts_TLK, np.tile(read_dataset(a).experts_TLK, (2, 1, 1))
    )


def test_a_merge_that_fails_leaves_no_fragment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up on the third fragment: one line, and an empty folder."""
    copy, done = LocalFolder.copy, []

    def full(self: LocalFolder, *args: Any) -> None:
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        done.append(args)
        copy(self, *args)

    monkeypatch.setattr(LocalFolder, "copy", full)
    a = record(tmp_path / "a", 25)
    with pytest.raises(InputError, match="No space left on device"):
        merge_datasets([a, a], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
