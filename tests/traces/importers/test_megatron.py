"""Tests of `traces.importers.megatron`: passes put together from lines, stages joined, gaps named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from tests.traces.importers.samples import small_model
from tests.traces.importers.samples_passes import Recording, megatron_lines, write_megatron
from traces.counts import ExpertCounts
from traces.importers import megatron
from traces.importers.kernels import parse_ids
from traces.readers import ReadOptions, open_trace
from traces.source import TraceSource, read_all
from traces.trace import Trace

MODEL = small_model()


def opened(path: Path, **options: Any) -> TraceSource:
    """Open a router trace of the small model."""
    source = open_trace(path, options=ReadOptions(**{"model": MODEL, **options}))
    assert not isinstance(source, ExpertCounts)
    return source


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Write records of one rank."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def dense(recording: Recording) -> Trace:
    """The trace that the recording is."""
    return recording.trace(model_name="small")


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.integers(1, 3),
    steps=st.integers(1, 3),
    passes=st.integers(1, 3),
    tokens=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_any_recording_comes_back(
    tmp_path_factory: pytest.TempPathFactory, ranks: int, steps: int, passes: int, tokens: int, seed: int
) -> None:
    """Whatever ranks, steps and micro-batches there were, passes with no token included."""
    recording = Recording(
        num_ranks=ranks,
        num_steps=steps,
        num_passes=passes,
        num_tokens=max(tokens, ranks == steps == 1),
        seed=seed,
    )
    folder = write_megatron(tmp_path_factory.mktemp("megatron"), recording)
    recording.ids = {key: ids for key, ids in recording.ids.items() if len(ids)}
    total = sum(map(len, recording.ids.values()))
    source = opened(folder)
    assert source.num_tokens == total
    trace = read_all(source)
    assert source.digest == trace.digest
    assert np.bincount(trace.rank_T, minlength=ranks).tolist() == [
        sum(len(ids) for (_, _, owner), ids in recording.ids.items() if owner == rank)
        for rank in range(ranks)
    ]
    for rank in range(ranks):
        mine = [ids for (_, _, owner), ids in recording.ids.items() if owner == rank]
        if mine:
            np.testing.assert_array_equal(trace.experts_TLK[trace.rank_T == rank], np.concatenate(mine))


def test_without_a_model_the_largest_id_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the user is told."""
    folder = write_megatron(tmp_path, Recording())
    with caplog.at_level(logging.WARNING):
        assert opened(folder, model=None).header.num_experts == 6
    assert "6 are taken, up to the largest id" in caplog.text


def test_blocks_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    """Their layers share numbers with the decoder's."""
    recording = Recording(num_ranks=1)
    lines = []
    for line in megatron_lines(recording, 0):
        lines += [line, {**line, "block": "mtp", "mtp_idx": 0}]
    path = write_lines(tmp_path / "router_trace_rank0.jsonl", lines)
    assert read_all(opened(path)).digest == dense(recording).digest


def test_tokens_labelled_as_padding_are_left_out(tmp_path: Path) -> None:
    """A token without a semantic id is none."""
    recording = Recording(num_ranks=1)
    lines = megatron_lines(recording, 0)
    for line in lines:
        line["semantic_token_ids"] = [*range(line["num_tokens"]), None]
        line["top_indices"] = [*line["top_indices"], [0, 1]]
        line["num_tokens"] += 1
    path = write_lines(tmp_path / "router_trace_rank0.jsonl", lines)
    assert read_all(opened(path)).digest == dense(recording).digest


def test_recomputed_passes_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Activation checkpointing runs every layer again in the backward pass."""
    recording = Recording(num_passes=2, num_tokens=9)
    folder = tmp_path / "traces"
    folder.mkdir()
    for rank in range(2):
        lines = megatron_lines(recording, rank)
        again = []
        for step in range(3):
            now = [line for line in lines if line["step"] == step]
            again += [*now[:3], *reversed(now[:3]), *now[3:], *reversed(now[3:])]
        write_lines(folder / f"router_trace_rank{rank}.jsonl", again)
    with caplog.at_level(logging.WARNING):
        assert read_all(opened(folder)).digest == dense(recording).digest
    assert "every pass is there twice" in caplog.text


def test_ranks_that_routed_the_same_tokens_are_read_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensor-parallel ranks without sequence parallelism hold copies."""
    recording = Recording(num_ranks=1, num_tokens=20)
    lines = megatron_lines(recording, 0)
    write_lines(tmp_path / "router_trace_rank0.jsonl", lines)
    write_lines(tmp_path / "router_trace_rank1.jsonl", [{**line, "rank": 1} for line in lines])
    with caplog.at_level(logging.WARNING):
        assert read_all(opened(tmp_path)).digest == dense(recording).digest
    assert "2 ranks routed the tokens of 1" in caplog.text


def test_stages_that_number_layers_from_0_are_joined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two stages of two layers and two ranks are a model of four layers; the model says so."""
    model = small_model(num_layers=4, moe_layer_ids=())
    recording = Recording(layers=(0, 1, 2, 3), num_passes=2)
    for rank in range(2):
        lines = megatron_lines(recording, rank)
        write_lines(
            tmp_path / f"router_trace_rank{rank}.jsonl", [line for line in lines if line["layer"] < 2]
        )
        later = [
            {**line, "layer": line["layer"] - 2, "rank": rank + 2} for line in lines if line["layer"] > 1
        ]
        write_lines(tmp_path / f"router_trace_rank{rank + 2}.jsonl", later)
    with caplog.at_level(logging.WARNING):
        trace = read_all(opened(tmp_path, model=model))
    assert "read as 2 pipeline stages of 2 ranks" in caplog.text
    assert trace.digest == recording.trace(model_name="small").digest
    with pytest.raises(InputError, match="cannot be told apart"):
        opened(
            tmp_path, model=small_model(num_layers=6, num_decoder_layers=7, moe_layer_ids=tuple(range(1, 7)))
        )
    (tmp_path / "router_trace_rank3.jsonl").unlink()
    with pytest.raises(InputError, match="cannot be told apart"):
        opened(tmp_path, model=model)


def test_stages_that_routed_other_tokens_are_not_joined(tmp_path: Path) -> None:
    """Layers 1 and 2 of one rank, layer 3 of another with one token more."""
    recording = Recording()
    for rank, layers in ((0, (1, 2)), (1, (3,))):
        lines = [line for line in megatron_lines(recording, rank) if line["layer"] in layers]
        write_lines(tmp_path / f"router_trace_rank{rank}.jsonl", lines)
    with pytest.raises(InputError, match=r"ranks 0 and 1 are two stages .* \[5\] and \[6\] tokens"):
        opened(tmp_path)


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    """Files of rank 0, 1 and 3 lack that of rank 2."""
    write_megatron(tmp_path, Recording(num_ranks=4))
    (tmp_path / "router_trace_rank2.jsonl").unlink()
    with pytest.raises(InputError, match=r"lacks router_trace_rank2.jsonl \(missing: rank 2\)"):
        opened(tmp_path)


def cut(path: Path, keep: float) -> None:
    """Cut a file's last line, keeping a part of it."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[-1] = lines[-1][: int(keep * len(lines[-1]))]
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_the_step_in_which_a_run_stopped_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: float
) -> None:
    """A killed writer leaves part of a line; the steps before it are whole."""
    write_megatron(tmp_path, Recording())
    cut(tmp_path / "router_trace_rank1.jsonl", keep)
    with caplog.at_level(logging.WARNING):
        trace = read_all(opened(tmp_path))
    if keep == 0.999:
        # Only the line's end is missing, as editors leave it: all is there.
        assert trace.digest == dense(Recording()).digest
        return
    expected = dense(Recording()).select_tokens(slice(0, 11 + 13))
    np.testing.assert_array_equal(trace.experts_TLK, expected.experts_TLK)
    assert "was stopped within step 2" in caplog.text


def test_a_rank_that_stopped_steps_earlier_is_refused(tmp_path: Path) -> None:
    """That is no run that was stopped but a file that was cut."""
    write_megatron(tmp_path, Recording(num_steps=5))
    path = tmp_path / "router_trace_rank1.jsonl"
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(InputError, match="rank 1 ends with step 1, others with step 4"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (1, {"layer": 3}, "has layer 2 0 times in step 0"),
        (3, {"step": 7}, "line 5 is of step 1, after step 7"),
        (1, {"num_tokens": 6}, "routes 5 tokens in one layer and other numbers in others"),
        (1, {"rank": 1}, "line 2 is of rank 1, not 0"),
        (1, {"topk": 3}, "line 2 has top-3, lines before it top-2"),
        (1, {"step": -1}, "line 2 is damaged .*step is '-1'"),
        (1, {"layer": 10**30}, "line 2 is damaged"),
        (1, {"num_tokens": True}, "line 2 is damaged .*num_tokens is 'True'"),
    ],
)
def test_lines_that_do_not_fit_are_named(
    tmp_path: Path, line: int, changes: dict[str, Any], message: str
) -> None:
    """File, line and what is wrong with it, when the trace is opened."""
    lines = megatron_lines(Recording(), 0)
    lines[line].update(changes)
    write_megatron(tmp_path, Recording())
    write_lines(tmp_path / "router_trace_rank0.jsonl", lines)
    with pytest.raises(InputError, match=f"{tmp_path}: router_trace_rank0.jsonl:? {message}"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1], [2]], "router_trace_rank0.jsonl: line 2 is damaged"),
        ([[0, 1]] * 4, "5 tokens are announced, 4 are there"),
        ([[0, 1.5]] * 5, "the ids are float64"),
        ([[0, 1, 2]] * 5, r"not integers \[tokens, 2\]"),
        ([[0, 10**30]] * 5, "line 2 is damaged"),
        ([[0, 6]] * 5, r"names expert 6, outside 0\.\.5; name the right model"),
        ([[0, -1]] * 5, r"names expert -1, outside 0\.\.5"),
        ([[3, 3]] * 5, "expert 3 twice"),
    ],
)
def test_ids_that_are_none_are_found_when_read(tmp_path: Path, ids: Any, message: str) -> None:
    """With the model known, ids are looked at when they are wanted, and then in full."""
    lines = megatron_lines(Recording(), 0)
    lines[1]["top_indices"] = ids
    write_megatron(tmp_path, Recording())
    write_lines(tmp_path / "router_trace_rank0.jsonl", lines)
    with pytest.raises(InputError, match=message):
        read_all(opened(tmp_path))


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.tuples(st.integers(0, 70_000), st.integers(0, 9)), min_size=1, max_size=5),
    space=st.sampled_from(["", " ", "\n\t"]),
    damage=st.none() | st.tuples(st.integers(0, 200), st.sampled_from(list(b'[],{}0 9-.e"x'))),
)
def test_the_compiled_parser_reads_what_json_reads(
    ids: list[tuple[int, int]], space: str, damage: tuple[int, int] | None
) -> None:
    """Where it answers at all; what it does not take is left to JSON."""
    text = bytearray(json.dumps(ids).replace(" ", space).encode())
    if damage is not None:
        text[damage[0] % len(text)] = damage[1]
    out = np.full((len(ids), 2), -1)
    end = parse_ids(np.frombuffer(bytes(text), dtype=np.uint8), out)
    if damage is None:
        assert end == len(text)
        assert out.tolist() == [list(row) for row in ids]
    elif end >= 0:
        assert out.tolist() == json.loads(text[:end])


def test_long_lines_are_read_by_the_compiled_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same trace, and with the same complaints."""
    folder = write_megatron(tmp_path / "whole", Recording(num_passes=2))
    whole = read_all(opened(folder))
    monkeypatch.setattr(megatron, "_COMPILED_BYTES", 0)
    monkeypatch.setattr(megatron, "_ids", None)
    assert read_all(opened(folder)).digest == whole.digest
    monkeypatch.undo()
    monkeypatch.setattr(megatron, "_COMPILED_BYTES", 0)
    lines = megatron_lines(Recording(), 0)
    lines[1]["top_indices"] = [[0, -1]] * 5
    write_lines(folder / "router_trace_rank0.jsonl", lines)
    write_lines(folder / "router_trace_rank1.jsonl", megatron_lines(Recording(), 1))
    with pytest.raises(InputError, match=r"names expert -1, outside 0\.\.5"):
        read_all(opened(folder))


def test_lines_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is read up to a limit."""
    monkeypatch.setattr(megatron, "LINE_LIMIT_BYTES", 1000)
    path = write_lines(tmp_path / "router_trace_rank0.jsonl", megatron_lines(Recording(num_ranks=1), 0))
    assert opened(path).num_tokens == 18
    path.write_bytes(path.read_bytes() + b" " * 2000)
    with pytest.raises(InputError, match="line 10 is longer than 1000 bytes"):
        opened(path)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    """Brackets without end do not exhaust the interpreter's stack."""
    lines = megatron_lines(Recording(num_ranks=1), 0)
    path = write_lines(tmp_path / "router_trace_rank0.jsonl", lines)
    head = json.dumps(lines[0]).partition("[")[0]
    path.write_text(head + "[" * 100_000 + "\n" + path.read_text())
    with pytest.raises(InputError, match="line 1 is damaged"):
        opened(path, model=None)


def test_another_model_is_refused(tmp_path: Path) -> None:
    """Top-k and layers must be the model's."""
    write_megatron(tmp_path, Recording())
    with pytest.raises(InputError, match="has top-2, small has top-3"):
        opened(tmp_path, model=small_model(top_k=3))
    with pytest.raises(InputError, match="routes in dense layer 3 of small"):
        opened(tmp_path, model=small_model(num_layers=2, moe_layer_ids=(1, 2)))
