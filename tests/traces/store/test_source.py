"""Tests of `DatasetSource`: any stretch of any ranks in routed order, verified, read no more than asked."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces.source import MemorySource, read_all
from traces.store import (
    ColumnBlock,
    DatasetSource,
    DatasetWriter,
    FragmentError,
    columns_of,
    encode,
    read_dataset,
    write_dataset,
)
from traces.store.folder import LocalFolder
from traces.store.order import RankOrder
from traces.synthesize import synthesize
from traces.trace import Trace, joined

RECORDED = Path(__file__).parents[2] / "data" / "traces" / "recorded"


def random_trace(
    num_tokens: int, seed: int, *, num_experts: int = 16, layers: int = 2, **fields: Any
) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace(
        experts_TLK=rng.random((num_tokens, layers, num_experts)).argsort(axis=2)[:, :, :3],
        num_experts=num_experts,
        **fields,
    )


def record(
    folder: Path, tokens_of_rank: dict[int, int], *, fragment_tokens: int, num_experts: int = 16
) -> Path:
    """Record random tokens of several ranks, each with its own shard."""
    for rank, tokens in tokens_of_rank.items():
        with DatasetWriter(
            folder,
            num_layers=2,
            num_experts=num_experts,
            top_k=3,
            rank=rank,
            fragment_tokens=fragment_tokens,
            domain_names=("a", "b"),
            spool=False,
        ) as out:
            if tokens:
                out.append(
                    random_trace(tokens, rank, num_experts=num_experts).experts_TLK,
                    sequence_T=np.arange(tokens) // 5,
                    position_T=np.arange(tokens) % 5,
                    domain_T=np.arange(tokens) % 3 - 1,
                )
    return folder


@pytest.fixture
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fragments have several row groups without being large."""
    monkeypatch.setattr(encode, "row_group_tokens", lambda header: 4)


def same(one: Trace, other: Trace) -> bool:
    return one.digest == other.digest


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    fragment_tokens=st.integers(3, 21),
    max_tokens=st.integers(1, 30),
    num_experts=st.sampled_from([16, 300]),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_blocks_are_the_interleaved_whole(
    tokens: list[int], fragment_tokens: int, max_tokens: int, num_experts: int, cut: tuple[float, float]
) -> None:
    """Whatever the ranks, fragments and blocks, any stretch is what interleaving everything gives."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "row_group_tokens", lambda header: 4)
        path = record(
            Path(folder), dict(enumerate(tokens)), fragment_tokens=fragment_tokens, num_experts=num_experts
        )
        whole = read_dataset(path).interleave_ranks()
        start, stop = sorted(round(share * whole.num_tokens) for share in cut)
        blocks = list(DatasetSource(path).blocks(start, stop, max_tokens=max_tokens))
        assert [block.num_tokens for block in blocks[:-1]] == [max_tokens] * (len(blocks) - 1)
        assert sum(block.num_tokens for block in blocks) == stop - start
        if blocks:
            assert same(joined(blocks), whole.select_tokens(slice(start, stop)))


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    fragment_tokens=st.integers(7, 41),
    max_tokens=st.integers(1, 40),
)
def test_ranks_may_lie_mixed_in_fragments(ranks: list[int], fragment_tokens: int, max_tokens: int) -> None:
    """A trace of several ranks written as one shard is interleaved all the same."""
    trace = random_trace(len(ranks), 0, rank_T=np.array(ranks), position_T=np.arange(len(ranks)))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "row_group_tokens", lambda header: 4)
        write_dataset(trace, folder, fragment_tokens=fragment_tokens)
        blocks = list(DatasetSource(folder).blocks(max_tokens=max_tokens))
        assert same(joined(blocks), trace.interleave_ranks())


@settings(max_examples=40, deadline=None)
@given(tokens_R=st.lists(st.integers(1, 200), min_size=1, max_size=6), position=st.floats(0, 1))
def test_the_order_of_ranks_needs_no_look_at_everything(tokens_R: list[int], position: float) -> None:
    """How many tokens of each rank come before any position agrees with sorting all of them."""
    rank_T = np.repeat(np.arange(len(tokens_R)), tokens_R)
    place_T = np.concatenate([np.arange(tokens) for tokens in tokens_R])
    progress_T = (place_T + 0.5) / np.repeat(tokens_R, tokens_R)
    order_T = np.argsort(progress_T, kind="stable")
    first = round(position * len(rank_T))
    expected = np.bincount(rank_T[order_T[:first]], minlength=len(tokens_R))
    assert RankOrder(tokens_R).before(first).tolist() == expected.tolist()


def test_columns_are_the_blocks_layer_by_layer(tmp_path: Path) -> None:
    """Both ways to read give the same ids, fields and cuts, from a data set and from memory."""
    source = DatasetSource(record(tmp_path, {0: 9, 1: 14}, fragment_tokens=4))
    in_memory = MemorySource(read_dataset(tmp_path))
    for columns in (source.columns(2, 21, max_tokens=5), columns_of(in_memory, 2, 21, max_tokens=5)):
        for column, block in zip(columns, source.blocks(2, 21, max_tokens=5), strict=True):
            assert isinstance(column, ColumnBlock)
            np.testing.assert_array_equal(np.stack(column.ids_LTK, axis=1), block.experts_TLK)
            assert all(ids_TK.flags.c_contiguous and not ids_TK.flags.writeable for ids_TK in column.ids_LTK)
            for name in ("sequence_T", "position_T", "rank_T", "domain_T"):
                np.testing.assert_array_equal(getattr(column, name), getattr(block, name))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8, 9])
def test_ids_of_any_width_are_turned(top_k: int) -> None:
    """Tokens to layers and back, for every number of bytes that a record may have."""
    from traces.store.columns import turn_to_layers, turn_to_tokens

    for dtype in (np.uint8, np.uint16):
        experts_TLK = np.random.default_rng(0).integers(0, 200, (700, 3, top_k)).astype(dtype)
        turned = turn_to_layers(experts_TLK)
        np.testing.assert_array_equal(np.stack(turned, axis=1), experts_TLK)
        np.testing.assert_array_equal(turn_to_tokens(turned), experts_TLK)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the name of every file read is added."""
    seen: list[str] = []

    def spy(name: str) -> None:
        original = getattr(LocalFolder, name)

        def read(self: LocalFolder, file: str, *args: Any) -> Any:
            seen.append(file)
            return original(self, file, *args)

        monkeypatch.setattr(LocalFolder, name, read)

    spy("read")
    spy("read_into")
    return seen


def test_opening_reads_manifests_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header, size and digest are known without a look into a fragment."""
    record(tmp_path, {0: 20, 1: 20}, fragment_tokens=8)
    seen = reads(monkeypatch)
    source = DatasetSource(tmp_path)
    assert (source.num_tokens, source.header.num_experts, source.digest[:7]) == (40, 16, "sha256:")
    assert source.recorded == {"sequence", "position", "rank", "domain"}
    assert set(seen) == {"manifest.rank00000.json", "manifest.rank00001.json"}


def test_a_stretch_reads_its_own_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random access touches no fragment outside the stretch, of either rank."""
    record(tmp_path, {0: 40, 1: 40}, fragment_tokens=8)
    source = DatasetSource(tmp_path)
    seen = reads(monkeypatch)
    assert sum(block.num_tokens for block in source.blocks(34, 46)) == 12
    assert set(seen) == {"rank00000-00002.parquet", "rank00001-00002.parquet"}


@pytest.mark.usefixtures("small_row_groups")
def test_a_stretch_reads_its_own_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a fragment the row groups outside the stretch are left alone, and none is fetched twice."""
    record(tmp_path, {0: 40}, fragment_tokens=40)
    source = DatasetSource(tmp_path)
    seen = reads(monkeypatch)
    assert [block.num_tokens for block in source.blocks(10, 22, max_tokens=3)] == [3, 3, 3, 3]
    assert seen.count("rank00000-00000.parquet") == 1 + len({10 // 4, 13 // 4, 16 // 4, 19 // 4, 21 // 4})


def test_digest_is_of_what_is_stored(tmp_path: Path) -> None:
    """The same tokens written the same way have the same digest; other tokens, cuts or names another."""
    trace = random_trace(20, 0)
    write_dataset(trace, tmp_path / "a")
    write_dataset(trace, tmp_path / "b")
    write_dataset(trace, tmp_path / "c", fragment_tokens=7)
    write_dataset(random_trace(20, 1), tmp_path / "d")
    write_dataset(random_trace(20, 0, model_name="x"), tmp_path / "e")
    digest = {name: DatasetSource(tmp_path / name).digest for name in "abcde"}
    assert digest["a"] == digest["b"]
    assert len(set(digest.values())) == 4


def test_a_damaged_fragment_is_named_and_the_others_stay_readable(tmp_path: Path) -> None:
    """The error carries the file, so that a caller can go on without it."""
    source = DatasetSource(record(tmp_path, {0: 40}, fragment_tokens=8))
    (tmp_path / "rank00000-00002.parquet").unlink()
    assert joined(list(source.blocks(0, 16))).num_tokens == 16
    with pytest.raises(FragmentError, match=r"rank00000-00002\.parquet: is named by the manifest") as caught:
        list(source.blocks())
    assert caught.value.fragment == "rank00000-00002.parquet"
    assert joined(list(source.blocks(24))).num_tokens == 16


@pytest.mark.usefixtures("small_row_groups")
def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    """No byte of a fragment can change without an error that names it, wherever it lies."""
    record(tmp_path, {0: 20}, fragment_tokens=20)
    path = tmp_path / "rank00000-00000.parquet"
    content = path.read_bytes()
    unnoticed = []
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        try:
            read_all(DatasetSource(tmp_path))
        except FragmentError:
            continue
        unnoticed.append(at)
    assert unnoticed == []


@pytest.mark.parametrize("length", [0, 3, 100, -1])
def test_a_truncated_fragment_is_noticed(tmp_path: Path, length: int) -> None:
    """Wherever it was cut off."""
    record(tmp_path, {0: 20}, fragment_tokens=20)
    path = tmp_path / "rank00000-00000.parquet"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FragmentError, match="is truncated or altered"):
        read_all(DatasetSource(tmp_path))


def test_what_a_manifest_says_of_ids_is_checked(tmp_path: Path) -> None:
    """Sound rows under a manifest that lies are refused: fewer experts, other ranks, other domains."""
    record(tmp_path, {0: 20}, fragment_tokens=20)
    path = tmp_path / "manifest.rank00000.json"
    content = json.loads(path.read_text())
    (entry,) = content["fragments"]
    lies: list[tuple[dict[str, Any], str]] = [
        ({"num_experts": 5}, r"lacks the record of its rows|names expert 15, outside 0\.\.4"),
        ({"domain_names": ["a"]}, r"has a domain of -1\.\.1, outside -1\.\.0"),
        ({"top_k": 2}, "which is not what the manifest says"),
        ({"num_layers": 3}, "which is not what the manifest says"),
        ({"fragments": [{**entry, "domain_of": [0]}]}, "has a domain 1 that the manifest does not name"),
        (
            {"fragments": [{**entry, "ranks": [[0, 10], [1, 10]]}]},
            "holds 20 tokens of rank 0, the manifest says 10",
        ),
        ({"fragments": [{**entry, "ranks": [[0, 19]]}]}, "20 tokens and its ranks others"),
        ({"fragments": [{**entry, "tokens": 21, "ranks": None}]}, "which is not what the manifest says"),
        ({"fragments": [entry, entry]}, "names a fragment twice"),
        ({"fragments": [{**entry, "columns": ["age"]}]}, "unknown column 'age'"),
        ({"fragments": [{**entry, "footer_bytes": 10**9}]}, "footer longer than the file"),
        ({"fragments": [{**entry, "sequence_offset": -1}]}, "gives -1 where a number belongs"),
    ]
    for lie, message in lies:
        path.write_text(json.dumps({**content, **lie}))
        with pytest.raises(InputError, match=message):
            read_all(DatasetSource(tmp_path))


def test_data_sets_of_format_1_are_streamed() -> None:
    """An old data set of two ranks is interleaved, known by its manifests, and verified."""
    source = DatasetSource(RECORDED)
    assert source.num_tokens == 24
    assert same(joined(list(source.blocks(max_tokens=5))), read_dataset(RECORDED).interleave_ranks())


def test_data_sets_of_format_1_are_appended_to(tmp_path: Path) -> None:
    """Old and new fragments of one rank live side by side."""
    for file in RECORDED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    header = DatasetSource(tmp_path).header
    more = random_trace(6, 0, num_experts=8).experts_TLK[:, :, :2]
    with DatasetWriter(
        tmp_path,
        num_layers=2,
        num_experts=8,
        top_k=2,
        rank=1,
        append=True,
        model_name=header.model_name,
        moe_layer_ids=header.moe_layer_ids,
        domain_names=header.domain_names,
    ) as out:
        out.append(more, sequence_T=np.zeros(6, int), position_T=np.arange(6))
    back = read_dataset(tmp_path)
    assert back.rank_T is not None
    assert back.rank_T.tolist() == [0] * 14 + [1] * 16
    np.testing.assert_array_equal(back.experts_TLK[24:], more)
    assert same(read_all(DatasetSource(tmp_path)), back.interleave_ranks())


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (3, 2), (0, 41)])
def test_stretches_outside_the_trace_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    """The message gives the length."""
    source = DatasetSource(record(tmp_path, {0: 40}, fragment_tokens=8))
    with pytest.raises(InputError, match="of a trace of 40"):
        list(source.blocks(start, stop))


def test_blocks_of_nothing_are_refused(tmp_path: Path) -> None:
    """A block has a token."""
    source = DatasetSource(record(tmp_path, {0: 4}, fragment_tokens=8))
    with pytest.raises(InputError, match="blocks of 0 tokens"):
        list(source.blocks(max_tokens=0))


def test_a_data_set_fits_its_synthetic_origin(tmp_path: Path) -> None:
    """A larger trace, with row groups and fragments of their usual kind, comes back as it was."""
    trace = synthesize(num_tokens=2000, num_layers=40, num_experts=32, top_k=8, seed=1)
    write_dataset(trace, tmp_path, fragment_tokens=1900)
    assert same(read_all(DatasetSource(tmp_path)), trace)
