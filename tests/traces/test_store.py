"""Tests of `traces.store`: data sets survive ranks, crashes and round trips, and damage is named."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces.readers import read_trace
from traces.store import DatasetWriter, clear_dataset, read_dataset, write_dataset, write_npz
from traces.synthesize import synthesize
from traces.trace import Trace

RECORDED = Path(__file__).parents[1] / "data" / "traces" / "recorded"


def small_trace(num_tokens: int = 40, seed: int = 0) -> Trace:
    return synthesize(
        num_tokens=num_tokens, num_layers=3, num_experts=8, top_k=2, sequence_tokens=16, seed=seed
    )


def writer(path: Path, **changes: Any) -> DatasetWriter:
    return DatasetWriter(path, **{"num_layers": 3, "num_experts": 8, "top_k": 2, **changes})


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Any small trace, every optional part there or not, one or two bytes per id."""
    num_experts = draw(st.sampled_from([1, 2, 16, 256, 257, 400]))
    num_tokens, num_layers = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    top_k = draw(st.integers(1, min(4, num_experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = draw(st.lists(st.text("abé中 [/]", max_size=5), unique=True, max_size=3))
    numbers = st.lists(st.integers(0, 2**63 - 1), min_size=num_tokens, max_size=num_tokens).map(np.array)
    domains = st.lists(st.integers(-1, len(names) - 1), min_size=num_tokens, max_size=num_tokens).map(
        np.array
    )
    return Trace(
        experts_TLK=rng.random((num_tokens, num_layers, num_experts))
        .argsort(axis=2)[:, :, :top_k]
        .astype(np.uint16),
        num_experts=num_experts,
        sequence_T=draw(st.none() | numbers),
        position_T=draw(st.none() | numbers),
        rank_T=draw(st.none() | numbers),
        domain_T=draw(st.none() | domains),
        domain_names=tuple(names),
        model_name=draw(st.none() | st.text("ab/-é", max_size=5)),
        moe_layer_ids=draw(st.none() | st.just(tuple(range(1, 1 + num_layers)))),
    )


@settings(max_examples=40, deadline=None)
@given(trace=traces(), fragment_tokens=st.integers(1, 13))
def test_data_set_round_trip_is_identical(trace: Trace, fragment_tokens: int) -> None:
    """Whatever a trace holds, its data set holds the same, in any number of fragments."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(trace, Path(folder) / "set", fragment_tokens=fragment_tokens)
        assert read_dataset(Path(folder) / "set").digest == trace.digest


@settings(max_examples=40, deadline=None)
@given(trace=traces())
def test_npz_round_trip_is_identical(trace: Trace) -> None:
    """Whatever a trace holds, its archive holds the same."""
    with tempfile.TemporaryDirectory() as folder:
        write_npz(trace, Path(folder) / "a.npz")
        assert read_trace(Path(folder) / "a.npz").digest == trace.digest


def test_npz_is_what_others_read(tmp_path: Path) -> None:
    """Plain NumPy finds the documented keys."""
    trace = small_trace()
    write_npz(trace, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["topk"], trace.experts_TLK)
        np.testing.assert_array_equal(archive["sequence"], trace.sequence_T)
        assert archive["topk"].dtype == np.uint8
        assert archive["num_experts"] == 8
        assert archive["domain_names"].tolist() == list(trace.domain_names)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def test_data_sets_written_by_version_1_stay_readable() -> None:
    """A committed data set of two ranks has the content that it had when it was made."""
    trace = read_dataset(RECORDED)
    assert trace.digest == "sha256:fc19b328f17c2e59f1120fb9b67233c96e2746c8450930cbacc56d0116114208"
    assert (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k) == (24, 2, 8, 2)
    assert trace.rank_T is not None
    assert trace.rank_T.tolist() == [0] * 14 + [1] * 10


def test_appended_batches_come_back_in_order(tmp_path: Path) -> None:
    """Batches larger and smaller than a fragment are joined without loss, with the rank that wrote them."""
    trace = small_trace(50)
    with writer(tmp_path / "set", rank=3, fragment_tokens=7, domain_names=trace.domain_names) as out:
        for batch in (slice(0, 3), slice(3, 30), slice(30, 50)):
            part = trace.select_tokens(batch)
            out.append(
                part.experts_TLK,
                sequence_T=part.sequence_T,
                position_T=part.position_T,
                domain_T=part.domain_T,
            )
    back = read_dataset(tmp_path / "set")
    np.testing.assert_array_equal(back.experts_TLK, trace.experts_TLK)
    np.testing.assert_array_equal(back.sequence_T, trace.sequence_T)
    np.testing.assert_array_equal(back.domain_T, trace.domain_T)
    assert back.rank_T is not None
    assert set(back.rank_T.tolist()) == {3}
    assert len(list((tmp_path / "set").glob("*.parquet"))) == 8


def test_what_was_flushed_is_valid_while_recording_goes_on(tmp_path: Path) -> None:
    """Full fragments are readable before the writer closes; buffered tokens come with the next flush."""
    experts_TLK = small_trace(25).experts_TLK
    out = writer(tmp_path, fragment_tokens=10)
    out.append(experts_TLK)
    assert read_dataset(tmp_path).num_tokens == 20
    out.flush()
    assert read_dataset(tmp_path).num_tokens == 25
    out.close()
    out.close()
    assert read_dataset(tmp_path).num_tokens == 25


def test_appended_arrays_may_be_reused(tmp_path: Path) -> None:
    """What the caller does with its buffers after `append` changes nothing."""
    experts_TLK = np.array(small_trace(5).experts_TLK)
    position_T = np.arange(5)
    with writer(tmp_path) as out:
        out.append(experts_TLK, position_T=position_T)
        experts_TLK[:], position_T[:] = experts_TLK[::-1].copy(), 0
    back = read_dataset(tmp_path)
    np.testing.assert_array_equal(back.experts_TLK, small_trace(5).experts_TLK)
    np.testing.assert_array_equal(back.position_T, np.arange(5))


def test_a_flush_that_failed_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens whose fragment met a full disk are written once there is room again."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with writer(tmp_path, fragment_tokens=5) as out:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(InputError, match="No space left on device"):
                out.append(small_trace(5).experts_TLK)
        out.append(small_trace(3).experts_TLK)
    assert read_dataset(tmp_path).num_tokens == 8


def test_a_failure_keeps_what_was_appended(tmp_path: Path) -> None:
    """An interrupted recording is closed like any other."""

    def record() -> None:
        with writer(tmp_path) as out:
            out.append(small_trace(5).experts_TLK)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record()
    assert read_dataset(tmp_path).num_tokens == 5


def test_parallel_ranks_share_a_folder(tmp_path: Path) -> None:
    """Eight writers at once lose nothing; the ranks come back in order."""

    def record(rank: int) -> None:
        with writer(tmp_path / "set", rank=rank, fragment_tokens=4) as out:
            for start in range(0, 30, 5):
                out.append(
                    small_trace(30, seed=rank).experts_TLK[start : start + 5],
                    position_T=np.arange(start, start + 5),
                )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(record, range(8)))
    back = read_dataset(tmp_path / "set")
    assert back.rank_T is not None
    assert back.position_T is not None
    assert back.rank_T.tolist() == np.repeat(np.arange(8), 30).tolist()
    assert back.position_T.tolist() == list(range(30)) * 8
    np.testing.assert_array_equal(back.experts_TLK[210:], small_trace(30, seed=7).experts_TLK)


def test_an_existing_data_set_is_kept_unless_told(tmp_path: Path) -> None:
    """Writing twice is refused and changes nothing; with `overwrite` the old one is gone entirely."""
    first, second = small_trace(40, seed=1), small_trace(10, seed=2)
    write_dataset(first, tmp_path, fragment_tokens=8)
    with pytest.raises(InputError, match="already; choose another output or overwrite"):
        write_dataset(second, tmp_path)
    with pytest.raises(InputError, match="already"):
        writer(tmp_path)
    assert read_dataset(tmp_path).digest == first.digest
    write_dataset(second, tmp_path, overwrite=True)
    assert read_dataset(tmp_path).digest == second.digest
    assert len(list(tmp_path.iterdir())) == 2


def test_a_writer_overwrites_all_ranks_of_an_old_data_set(tmp_path: Path) -> None:
    """Ranks of a larger, older run do not slip into the new data set."""
    for rank in range(3):
        with writer(tmp_path, rank=rank) as out:
            out.append(small_trace(5).experts_TLK)
    with writer(tmp_path, overwrite=True) as out:
        out.append(small_trace(7).experts_TLK)
    assert read_dataset(tmp_path).num_tokens == 7


def test_only_one_rank_may_clear_a_folder(tmp_path: Path) -> None:
    """Rank 1 would delete what rank 0 has begun to write."""
    with pytest.raises(InputError, match="rank 1 cannot overwrite"):
        writer(tmp_path, rank=1, overwrite=True)


def test_clear_dataset_leaves_an_empty_folder(tmp_path: Path) -> None:
    """Clearing removes all ranks' files, and a folder that is not there stays so."""
    write_dataset(small_trace(), tmp_path / "set", fragment_tokens=8)
    clear_dataset(tmp_path / "set")
    clear_dataset(tmp_path / "nowhere")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["set"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_with_other_files_are_refused(tmp_path: Path, overwrite: bool) -> None:
    """Nothing of somebody else's is deleted or mixed with a data set."""
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"holds other files \(thesis\.tex\)"):
        write_dataset(small_trace(), tmp_path, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_fragments_left_by_a_crash_do_not_get_in_the_way(tmp_path: Path) -> None:
    """A fragment that no manifest names is removed by the rank that left it."""
    write_dataset(small_trace(40), tmp_path, fragment_tokens=8)
    (tmp_path / "manifest.rank00000.json").unlink()
    write_dataset(small_trace(5), tmp_path)
    assert read_dataset(tmp_path).digest == small_trace(5).digest
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("write", [write_dataset, write_npz])
def test_an_output_that_cannot_be_written_is_an_input_error(tmp_path: Path, write: Any) -> None:
    """A file in place of the folder is named in the message."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out.*: cannot be written \(Not a directory\)"):
        write(small_trace(), tmp_path / "file" / "out")


def test_an_archive_cannot_replace_a_folder(tmp_path: Path) -> None:
    """The message says what the output is."""
    with pytest.raises(InputError, match="is a folder"):
        write_npz(small_trace(), tmp_path)


@pytest.mark.parametrize("write", [write_dataset, write_npz])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    """No half-written file remains, under any name."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write(small_trace(), tmp_path / "out")
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top-9 of 8 experts"),
        ({"num_layers": 0}, "0 layers"),
        ({"rank": -1}, "rank -1"),
        ({"fragment_tokens": 0}, "fragment of 0 tokens"),
    ],
)
def test_impossible_data_sets_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Bad arguments leave no folder."""
    with pytest.raises(InputError, match=message):
        writer(tmp_path / "set", **changes)
    assert not (tmp_path / "set").exists()


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Other shapes, repeated experts, changing columns and closed writers are input errors."""
    out = writer(tmp_path)
    with pytest.raises(InputError, match="num_layers 3 against 2"):
        out.append(np.zeros((1, 2, 2), np.uint8) + np.array([0, 1], np.uint8))
    with pytest.raises(InputError, match="twice"):
        out.append(np.zeros((1, 3, 2), np.uint8))
    out.append(small_trace(2).experts_TLK, sequence_T=[0, 0])
    with pytest.raises(InputError, match="came with sequence, rank, these with rank"):
        out.append(small_trace(2).experts_TLK)
    out.close()
    with pytest.raises(InputError, match="is closed"):
        out.append(small_trace(2).experts_TLK)
    assert read_dataset(tmp_path).num_tokens == 2


def test_ranks_of_another_model_are_refused(tmp_path: Path) -> None:
    """A second rank must record the same routing."""
    writer(tmp_path, rank=0, model_name="a").close()
    with pytest.raises(InputError, match="another recording \\(model_name 'a' against 'b'\\)"):
        writer(tmp_path, rank=1, model_name="b")


def edit_manifest(folder: Path, of_rank: int = 0, **changes: Any) -> None:
    path = folder / f"manifest.rank{of_rank:05}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_mixed_recordings_are_not_read(tmp_path: Path) -> None:
    """Manifests that disagree are an input error, not a longer trace."""
    for rank in range(2):
        with writer(tmp_path, rank=rank) as out:
            out.append(small_trace(4).experts_TLK)
    edit_manifest(tmp_path, of_rank=1, num_experts=16)
    with pytest.raises(InputError, match=r"ranks 0 and 1 .* \(num_experts 16 against 8\)"):
        read_dataset(tmp_path)


def test_ranks_must_record_the_same_columns(tmp_path: Path) -> None:
    """A column that one rank lacks is named with the files."""
    for rank, sequence_T in enumerate(([0, 0], None)):
        with writer(tmp_path, rank=rank) as out:
            out.append(small_trace(2).experts_TLK, sequence_T=sequence_T)
    with pytest.raises(InputError, match=r"tokens of rank00001-00000\.parquet have no sequence"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "is truncated or altered"),
        (
            lambda f: f.write_bytes(f.read_bytes()[:50] + b"x" + f.read_bytes()[51:]),
            "is truncated or altered",
        ),
        (lambda f: f.write_bytes(b""), "is truncated or altered: its 0 bytes"),
        (lambda f: f.unlink(), "is named by the manifest and not there"),
    ],
    ids=["truncated", "altered", "empty", "missing"],
)
def test_damaged_fragments_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    """The one bad fragment of five is in the message."""
    write_dataset(small_trace(40), tmp_path, fragment_tokens=8)
    damage(tmp_path / "rank00000-00003.parquet")
    with pytest.raises(InputError, match=rf"rank00000-00003\.parquet: {message}"):
        read_dataset(tmp_path)


def forge(folder: Path, content: bytes, footer_bytes: int = 40) -> None:
    """Replace the only fragment and its checksum."""
    (folder / "rank00000-00000.parquet").write_bytes(content)
    (entry,) = json.loads((folder / "manifest.rank00000.json").read_text())["fragments"]
    entry |= {
        "footer_sha256": hashlib.sha256(content[-footer_bytes:]).hexdigest(),
        "footer_bytes": footer_bytes,
        "bytes": len(content),
    }
    edit_manifest(folder, fragments=[entry])


def test_fragments_that_are_no_parquet_are_refused(tmp_path: Path) -> None:
    """A right checksum does not make a text a fragment."""
    write_dataset(small_trace(), tmp_path)
    forge(tmp_path, b"no parquet at all, but long enough to look at")
    with pytest.raises(InputError, match=r"rank00000-00000\.parquet: is damaged"):
        read_dataset(tmp_path)


def test_fragments_of_another_shape_are_refused(tmp_path: Path) -> None:
    """Parquet of other columns is not what the manifest says."""
    write_dataset(small_trace(), tmp_path)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1, 2]}), sink)
    forge(tmp_path, sink.getvalue().to_pybytes(), footer_bytes=len(sink.getvalue()) - 4)
    with pytest.raises(InputError, match=r"holds 2 tokens of \['x'\]"):
        read_dataset(tmp_path)


def test_ids_beyond_the_experts_are_refused(tmp_path: Path) -> None:
    """The content of fragments is checked like any other trace."""
    write_dataset(small_trace(), tmp_path)
    edit_manifest(tmp_path, num_experts=3)
    with pytest.raises(InputError, match=r"outside 0\.\.2"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "moe-trace/9"}, "'moe-trace/9', not 'moe-trace/2'"),
        ({"num_layers": 0}, "0 where a positive number belongs"),
        ({"num_layers": 10**9}, "1000000000 layers"),
        ({"top_k": "2"}, "'2' where a positive number belongs"),
        ({"model": {"name": 5, "moe_layer_ids": None}}, "5 where a name belongs"),
        ({"model": {"name": None, "moe_layer_ids": ["x"]}}, "wrong type"),
        ({"model": None}, "wrong type"),
        ({"model": {}}, "lacks the entry"),
        ({"rank": 7, "fragments": []}, "manifest of rank 7"),
        ({"fragments": []}, "holds no tokens"),
        ({"fragments": [{"file": "../../etc/passwd"}]}, "no fragment of rank 0"),
        ({"fragments": [{"file": "rank00001-00000.parquet"}]}, "no fragment of rank 0"),
        ({"fragments": [{"file": "rank00000-00000.parquet"}]}, "lacks the entry 'tokens'"),
    ],
)
def test_manifests_that_make_no_sense_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Every wrong entry is an input error on one line."""
    write_dataset(small_trace(), tmp_path)
    edit_manifest(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_dataset(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    """Room is made only for what the fragments can hold."""
    write_dataset(small_trace(), tmp_path)
    (entry,) = json.loads((tmp_path / "manifest.rank00000.json").read_text())["fragments"]
    edit_manifest(tmp_path, fragments=[{**entry, "tokens": 10**14, "ranks": None}])
    with pytest.raises(InputError, match="more than the limit"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"moe-trace/1"', "[" * 100_000])
def test_manifests_that_are_no_manifests_are_refused(tmp_path: Path, text: str) -> None:
    """Broken and foreign JSON are named."""
    (tmp_path / "manifest.rank00000.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.rank00000\.json: is "):
        read_dataset(tmp_path)


def test_a_folder_without_manifest_is_no_data_set(tmp_path: Path) -> None:
    """Folders, files and nothing at all are told apart."""
    with pytest.raises(InputError, match="without a manifest"):
        read_dataset(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_dataset(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        read_dataset(tmp_path / "file")
