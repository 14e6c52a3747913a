"""Tests of `traces.importers.sglang_tokens`: passes of all ranks become one trace of logical experts."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from tests.traces.importers.samples import SglangRecording, small_model, write_sglang_ranks
from traces.counts import ExpertCounts
from traces.readers import ReadOptions, open_trace
from traces.source import TraceHeader, TraceSource, read_all


def opened(path: Path, **options: Any) -> TraceSource:
    source = open_trace(path, options=ReadOptions(**options))
    assert not isinstance(source, ExpertCounts)
    return source


def refusal(path: Path, **options: Any) -> str:
    """Read what must not be readable; return the one line without the path."""
    with pytest.raises(InputError) as caught:
        read_all(opened(path, **options))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.count(str(path)) == 1
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.fixture
def recording() -> SglangRecording:
    return SglangRecording()


@pytest.fixture
def dump(recording: SglangRecording, tmp_path: Path) -> Path:
    return write_sglang_ranks(recording, tmp_path / "dump")


def change(path: Path, edit: Any) -> None:
    """Load a dump, edit it in place, save it."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def ranks_of(dump: Path) -> list[Path]:
    return sorted(dump.glob("*.pt"))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_recordings_of_any_shape_round_trip(data: st.DataObject) -> None:
    """Ranks, replicas, dense layers, padding: ids, homes, positions, requests and order come back."""
    num_layers = data.draw(st.integers(1, 5))
    num_experts = data.draw(st.sampled_from([3, 6, 300]))
    top_k = data.draw(st.integers(1, 3))
    recording = SglangRecording(
        num_ranks=data.draw(st.integers(1, 4)),
        num_passes=data.draw(st.integers(1, 6)),
        num_layers=num_layers,
        dense=tuple(sorted(data.draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers - 1)))),
        num_experts=num_experts,
        top_k=top_k,
        num_slots=num_experts + data.draw(st.integers(0, 3)),
        padding=data.draw(st.integers(0, 3)),
        width=data.draw(st.integers(top_k, 8)),
        seed=data.draw(st.integers(0, 1000)),
    )
    with tempfile.TemporaryDirectory() as folder:
        source = opened(write_sglang_ranks(recording, Path(folder)))
        trace = read_all(source)
        assert source.header == TraceHeader.of(recording.expected)
        for name in ("experts_TLK", "rank_T", "position_T", "sequence_T"):
            np.testing.assert_array_equal(
                getattr(trace, name), getattr(recording.expected, name), err_msg=name
            )
        middle = source.num_tokens // 2
        part = list(source.blocks(middle, max_tokens=3))
        assert sum(block.num_tokens for block in part) == source.num_tokens - middle
        assert part[0].experts_TLK[0].tolist() == trace.experts_TLK[middle].tolist()


def test_recordings_in_several_dumps_are_one(recording: SglangRecording, tmp_path: Path) -> None:
    """Passes dumped later go on where the earlier ones ended, requests too."""
    whole = recording.records
    for number, passes in enumerate((slice(0, 2), slice(2, 3), slice(3, None))):
        recording.records = [records[passes] for records in whole]
        part = write_sglang_ranks(recording, tmp_path / "part")
        for rank, file in enumerate(ranks_of(part)):
            (tmp_path / "dump").mkdir(exist_ok=True)
            file.rename(tmp_path / "dump" / f"expert_distribution_recorder_{number}.5_{rank}.pt")
    source = opened(tmp_path / "dump")
    assert source.digest == recording.expected.digest
    # Nothing but the file that holds the end is needed for the end.
    for file in ranks_of(tmp_path / "dump")[:2]:
        file.unlink()
    tail = next(source.blocks(source.num_tokens - 2))
    assert tail.sequence_T is not None
    assert recording.expected.sequence_T is not None
    assert tail.sequence_T.tolist() == recording.expected.sequence_T[-2:].tolist()


def test_one_file_is_the_share_of_its_rank(recording: SglangRecording, dump: Path) -> None:
    """A file that is named itself needs no others; its tokens' home is its rank."""
    trace = read_all(opened(ranks_of(dump)[1]))
    assert recording.expected.rank_T is not None
    own = recording.expected.select_tokens(recording.expected.rank_T == 1)
    assert trace.digest == own.digest


def test_the_model_names_layers_and_is_held_to_them(recording: SglangRecording, dump: Path) -> None:
    """A model that fits gives its name; one that does not is refused."""
    assert opened(dump, model=small_model()).header.model_name == "small"
    moe_first = small_model(moe_layer_ids=(0, 1, 2))
    assert "layer 0 carries no expert ids, though it is an MoE layer of small" in refusal(
        dump, model=moe_first
    )
    fewer = small_model(num_layers=2, moe_layer_ids=(1, 2))
    assert "layer 3 carries expert ids, though it is not an MoE layer" in refusal(dump, model=fewer)
    assert "routes to top-2 of 6 experts, small to top-3 of 6" in refusal(dump, model=small_model(top_k=3))
    more = small_model(num_decoder_layers=9)
    assert "has 4 layers, small 3 MoE layers and 9 decoder layers" in refusal(dump, model=more)


def test_every_token_gets_the_domain_asked_for(dump: Path) -> None:
    """What kind of traffic it was is for the user to say."""
    source = opened(dump, domain="chat")
    trace = read_all(source)
    assert trace.domain_names == ("chat",)
    assert trace.domain_T is not None
    assert set(trace.domain_T.tolist()) == {0}
    assert source.digest == trace.digest


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    """Ranks are numbered from 0 without gaps."""
    dump = write_sglang_ranks(SglangRecording(num_ranks=4), tmp_path / "dump")
    ranks_of(dump)[2].unlink()
    assert "holds dumps of ranks 0, 1, 3, but none of rank 2" in refusal(dump)


def test_without_a_table_of_slots_the_option_is_named(dump: Path) -> None:
    """Physical slots say nothing of experts."""
    change(ranks_of(dump)[0], lambda content: content.pop("last_physical_to_logical_map"))
    assert "does not say which expert each physical slot held" in refusal(dump)
    assert "--physical-map" in refusal(dump)


@pytest.mark.parametrize("form", ["engine", "rows", "placement"])
def test_a_table_of_slots_can_be_named(
    recording: SglangRecording, dump: Path, tmp_path: Path, form: str
) -> None:
    """An engine's file, plain rows, or a placement of the MoE layers alone."""
    for file in ranks_of(dump):
        change(file, lambda content: content.pop("last_physical_to_logical_map"))
    rows = recording.map_LR.tolist()
    forms: dict[str, Any] = {
        "engine": {"physical_to_logical_map": rows},
        "rows": rows,
        "placement": {"format": "moe-placement/1", "physical_to_logical_map": rows[1:]},
    }
    table = tmp_path / "table.json"
    table.write_text(json.dumps(forms[form]))
    assert opened(dump, physical_map=table).digest == recording.expected.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no physical_to_logical_map"),
        ("[[0, 1], [0]]", "gives layers of different numbers of slots"),
        ("[[0, 1.5]]", "gives slots that are no whole numbers"),
        ("[[0, 70000]]", "outside 0 to 65535"),
        ("[[0, -2]]", "outside 0 to 65535"),
        ("[[0, 1e400]]", "gives slots that are no whole numbers"),
        (f"[[{10**30}]]", "beyond any model"),
        ("[]", "holds no list of slots"),
        ("nonsense", "is not valid JSON"),
    ],
)
def test_bad_tables_of_slots_are_named(dump: Path, tmp_path: Path, content: str, message: str) -> None:
    """The message names the table's file."""
    table = tmp_path / "table.json"
    table.write_text(content)
    with pytest.raises(InputError, match=f"{table}: .*{message}"):
        open_trace(dump, options=ReadOptions(physical_map=table))


def test_a_table_of_other_layers_is_refused(dump: Path, tmp_path: Path) -> None:
    """The message gives both numbers."""
    (tmp_path / "table.json").write_text(json.dumps([[0, 1, 2, 3, 4, 5]] * 2))
    assert "has 2 layers; 4 or its 3 MoE layers are dumped" in refusal(
        dump, physical_map=tmp_path / "table.json"
    )


def test_slots_outside_the_table_are_named(dump: Path) -> None:
    """The record, the layer and the slot are said."""

    def edit(content: Any) -> None:
        content["records"][2]["topk_ids_of_layer"][1, 0, 0] = 8

    change(ranks_of(dump)[1], edit)
    assert "_1.pt: record 2 layer 1 names physical slot 8 of 8" in refusal(dump)


def test_slots_below_none_are_named(dump: Path) -> None:
    """-1 is no slot, less is damage."""

    def edit(content: Any) -> None:
        content["records"][2]["topk_ids_of_layer"][1, 0, 0] = -7

    change(ranks_of(dump)[1], edit)
    assert "record 2 names physical slot -7" in refusal(dump)


def test_a_table_that_changed_is_noticed(dump: Path) -> None:
    """Two slots of a token that hold the same expert by the last table: it was another then."""

    def edit(content: Any) -> None:
        content["last_physical_to_logical_map"] = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0]] * 4)

    for file in ranks_of(dump):
        change(file, edit)
    assert re.search(r"forward pass \d: token \d+ layer \d names expert 0 twice", refusal(dump))
    assert "the dump's table of physical slots is the last one" in refusal(dump)


def test_padding_is_left_out_and_told(dump: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows without ids are no tokens; so are rows that lack those of a layer."""
    before = opened(dump).num_tokens

    def edit(content: Any) -> None:
        content["records"][0]["topk_ids_of_layer"][2, 0] = -1

    change(ranks_of(dump)[0], edit)
    with caplog.at_level(logging.WARNING, "traces"):
        source = opened(dump)
    assert source.num_tokens == before - 1
    assert sum(block.num_tokens for block in source.blocks()) == before - 1
    assert f"13 of {before + 12} rows are padding and left out" in caplog.text


def test_ranks_of_one_tensor_parallel_group_count_once(
    recording: SglangRecording, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They record the same tokens; where those live is not known then."""
    recording = SglangRecording(num_ranks=1)
    recording.records.append([{**record, "rank": 1} for record in recording.records[0]])
    trace = read_all(opened(write_sglang_ranks(recording, tmp_path / "dump")))
    assert trace.num_tokens == recording.expected.num_tokens
    assert trace.rank_T is None
    assert "several ranks recorded the same tokens" in caplog.text


def test_ranks_that_route_alike_by_chance_all_count(tmp_path: Path) -> None:
    """Short texts of a few experts may be routed alike; ranks that read other texts are other ranks."""
    recording = SglangRecording(num_ranks=1)
    others = [
        {**record, "rank": 1, "input_ids": [token + 1 for token in record["input_ids"]]}
        for record in recording.records[0]
    ]
    recording.records.append(others)
    trace = read_all(opened(write_sglang_ranks(recording, tmp_path / "dump")))
    assert trace.num_tokens == 2 * recording.expected.num_tokens
    assert trace.rank_T is not None
    assert sorted(set(trace.rank_T.tolist())) == [0, 1]


def test_ranks_that_split_a_batch_do_not_know_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With attention in tensor parallel each rank lists the whole batch and routes a part of it."""
    recording = SglangRecording(num_ranks=1, padding=0, seed=5)
    halves: list[list[dict[str, Any]]] = [[], []]
    for record in recording.records[0]:
        topk = record["topk_ids_of_layer"]
        middle = topk.shape[1] // 2
        for rank, part in enumerate((topk[:, :middle], topk[:, middle:])):
            routed = torch.full_like(topk, -1)
            routed[:, : part.shape[1]] = part
            halves[rank].append({**record, "rank": rank, "topk_ids_of_layer": routed})
    recording.records = halves
    trace = read_all(opened(write_sglang_ranks(recording, tmp_path / "dump")))
    assert trace.num_tokens == recording.expected.num_tokens
    assert trace.rank_T is not None
    assert (trace.sequence_T, trace.position_T) == (None, None)
    assert "ranks split the tokens of one batch" in caplog.text


def test_requests_of_mixed_passes_are_not_known(dump: Path) -> None:
    """Nothing is made up; positions are as recorded."""
    change(ranks_of(dump)[0], lambda content: content["records"][1].update(forward_mode=3))
    trace = read_all(opened(dump))
    assert trace.sequence_T is None
    assert trace.position_T is not None


def test_positions_may_be_missing(dump: Path) -> None:
    """Then requests are not known either."""
    change(ranks_of(dump)[0], lambda content: content["records"][1].pop("positions"))
    trace = read_all(opened(dump))
    assert (trace.sequence_T, trace.position_T) == (None, None)


def edit_records(**fields: Any) -> Any:
    return lambda content: content["records"][1].update(**fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            edit_records(topk_ids_of_layer=torch.zeros(4, 2, dtype=torch.int32)),
            "is int32 [4, 2], not integers",
        ),
        (edit_records(topk_ids_of_layer=torch.zeros(4, 2, 8)), "is float32 [4, 2, 8], not integers"),
        (edit_records(topk_ids_of_layer=[[1]]), "topk_ids_of_layer of record 1 is list, not a tensor"),
        (edit_records(topk_ids_of_layer=torch.zeros(5, 2, 8, dtype=torch.int32)), "has 5 layers of 8 ids"),
        (edit_records(topk_ids_of_layer=torch.ones(4, 2, 8, dtype=torch.int32)), "more than the top-2"),
        (edit_records(forward_pass_id=-1), "forward_pass_id of record 1 is -1"),
        (edit_records(forward_pass_id="a"), "forward_pass_id of record 1 is 'a'"),
        (edit_records(rank=1), "mixes records of ranks 0 and 1"),
        (edit_records(positions=["a"]), "positions of record 1 is no list of whole numbers"),
        (lambda content: content["records"].append(3), "record 6 is int, not a dictionary"),
        (lambda content: content.update(records=3), "holds no list of records"),
        (
            lambda content: content["records"][1].pop("topk_ids_of_layer"),
            "mixes records with and without",
        ),
        (
            lambda content: content.update(last_physical_to_logical_map=torch.zeros(3)),
            "the table of physical slots is float32 [3]",
        ),
        (
            lambda content: content.update(last_physical_to_logical_map=torch.full((4, 8), 3)),
            "has no slot for expert 0",
        ),
        (
            lambda content: content.update(last_physical_to_logical_map=torch.arange(8).repeat(4, 1)),
            "keep models apart",
        ),
    ],
)
def test_damaged_records_are_named(dump: Path, edit: Any, message: str) -> None:
    """The file and the record are said."""
    change(ranks_of(dump)[0], edit)
    assert message in refusal(dump)


def test_two_recordings_in_a_folder_are_refused(dump: Path) -> None:
    """Passes are numbered anew by every server, so they cannot be told apart."""
    first = ranks_of(dump)[0]
    first.with_name("z.pt").write_bytes(first.read_bytes())
    assert "holds forward pass 3 of rank 0 in " in refusal(dump)


def test_other_files_of_the_folder_are_named(dump: Path) -> None:
    """Foreign PyTorch files and empty ones; notes may lie beside."""
    (dump / "notes.txt").write_text("prefill only")
    assert opened(dump).num_tokens > 0
    (dump / "zz.pt").write_bytes(b"")
    assert "holds zz.pt, which is no PyTorch file, or an empty one" in refusal(dump)
    torch.save(torch.zeros(3), dump / "zz.pt")
    assert "holds zz.pt, which is another kind of PyTorch file" in refusal(dump)


def test_recordings_of_nothing_are_refused(recording: SglangRecording, tmp_path: Path) -> None:
    """Without records, or with padding alone."""
    recording.records = [[], []]
    assert "holds no record" in refusal(write_sglang_ranks(recording, tmp_path / "empty"))
    recording = SglangRecording(num_ranks=1)
    for record in recording.records[0]:
        record["topk_ids_of_layer"][:] = -1
    assert "holds no token" in refusal(write_sglang_ranks(recording, tmp_path / "idle"))


def test_passes_without_tokens_count_experts(dump: Path, recording: SglangRecording, tmp_path: Path) -> None:
    """Both recorders in one folder are a mistake; equal counts of all ranks count once."""
    mixed = write_sglang_ranks(recording, tmp_path / "mixed", per_token=False)
    ranks_of(mixed)[0].write_bytes(ranks_of(dump)[0].read_bytes())
    assert "mixes dumps of the per_token and the per_pass recorder" in refusal(mixed)
    recording = SglangRecording(num_ranks=1, num_slots=6)
    recording.records.append([{**record, "rank": 1} for record in recording.records[0]])
    path = write_sglang_ranks(recording, tmp_path / "same", per_token=False)
    counts = open_trace(path, options=ReadOptions(model=small_model()))
    assert isinstance(counts, ExpertCounts)
    assert counts.num_tokens == recording.expected.num_tokens


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_records(global_physical_count=torch.full((4, 8), -1)), "counts -1 pairs"),
        (edit_records(global_physical_count=torch.ones(4, 7, dtype=torch.int32)), "counts 7 physical slots"),
        (edit_records(global_physical_count=torch.ones(5, 8, dtype=torch.int32)), "has 4 layers"),
        (edit_records(global_physical_count=torch.ones(4)), "not integers [layers, physical slots]"),
        (lambda content: content["records"][1].pop("global_physical_count"), "has neither"),
    ],
)
def test_damaged_counts_of_passes_are_named(
    recording: SglangRecording, tmp_path: Path, edit: Any, message: str
) -> None:
    """The file and the record are said."""
    dump = write_sglang_ranks(recording, tmp_path / "dump", per_token=False)
    change(ranks_of(dump)[0], edit)
    assert message in refusal(dump, model=small_model())


def test_long_recordings_sum_neighbouring_passes(
    recording: SglangRecording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over passes stays, in fewer windows."""
    from traces.importers import sglang_pass_counts

    path = write_sglang_ranks(recording, tmp_path / "dump", per_token=False)
    options = ReadOptions(model=small_model())
    whole = open_trace(path, options=options)
    monkeypatch.setattr(sglang_pass_counts, "LIMIT_COUNTS", 3 * 4 * 6)
    few = open_trace(path, options=options)
    assert isinstance(whole, ExpertCounts)
    assert isinstance(few, ExpertCounts)
    assert (whole.num_windows, few.num_windows) == (6, 3)
    assert few.load_WLE.sum(axis=0).tolist() == whole.load_WLE.sum(axis=0).tolist()


def test_a_malicious_rank_is_refused(dump: Path, tmp_path: Path) -> None:
    """One rank's file that holds code refuses the folder; nothing of it runs."""
    import os

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    torch.save({"records": [Malicious()]}, ranks_of(dump)[1])
    assert "holds code or objects that are not tensors" in refusal(dump)
    assert not (tmp_path / "mark").exists()


def test_files_that_change_are_noticed(dump: Path, recording: SglangRecording) -> None:
    """A dump that was replaced after it was opened is not read as the old one."""
    source = opened(dump)
    change(ranks_of(dump)[0], lambda content: content["records"].pop())
    with pytest.raises(InputError, match="has changed since it was opened"):
        read_all(source)
