"""Tests of `traces.importers.tensorrt_llm`: ranks summed, stages joined, slots mapped back, gaps named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from placement.errors import InputError
from placement.model import preset_model
from tests.traces.importers.samples import small_model
from tests.traces.importers.samples_passes import (
    Recording,
    write_tensorrt_counts,
    write_tensorrt_meta,
    write_tensorrt_raw,
)
from traces.counts import ExpertCounts
from traces.readers import ReadOptions, open_trace
from traces.source import TraceSource, read_all


def counts_of(path: Path, **options: Any) -> ExpertCounts:
    """Open a folder of counts."""
    counts = open_trace(path, options=ReadOptions(**options))
    assert isinstance(counts, ExpertCounts)
    return counts


def tokens_of(path: Path, **options: Any) -> TraceSource:
    """Open a folder of raw ids."""
    source = open_trace(path, options=ReadOptions(**options))
    assert not isinstance(source, ExpertCounts)
    return source


def change(file: Path, **tensors: Any) -> None:
    """Replace tensors of a file, or remove those that are None."""
    content = {**load_file(file), **tensors}
    save_file({key: value for key, value in content.items() if value is not None}, file)


def test_windows_are_iterations_summed_over_ranks(tmp_path: Path) -> None:
    """Loads, tokens, top-k and decoder layers come from files and names."""
    recording = Recording(num_ranks=4, layers=(3, 4))
    counts = counts_of(write_tensorrt_counts(tmp_path, recording, first=98))
    np.testing.assert_array_equal(counts.load_WLE, recording.load_ILE())
    assert counts.moe_layer_ids == (3, 4)
    assert counts.top_k == 2
    assert counts.num_tokens == sum(len(ids) for ids in recording.ids.values())


def test_raw_ids_have_homes_and_the_model_names_them(tmp_path: Path) -> None:
    """Every token knows its rank; with a model and a domain the header says so."""
    recording = Recording()
    source = tokens_of(write_tensorrt_raw(tmp_path, recording, padding=4), model=small_model(), domain="law")
    trace = read_all(source)
    assert trace.digest == source.digest
    assert (trace.model_name, trace.moe_layer_ids, trace.domain_names) == ("small", (1, 2, 3), ("law",))
    expected = recording.trace()
    np.testing.assert_array_equal(trace.experts_TLK, expected.experts_TLK)
    np.testing.assert_array_equal(trace.rank_T, expected.rank_T)


def test_raw_ids_go_before_counts(tmp_path: Path) -> None:
    """A folder with both is read token by token."""
    recording = Recording()
    write_tensorrt_counts(tmp_path, recording)
    source = tokens_of(write_tensorrt_raw(tmp_path, recording))
    assert read_all(source).digest == recording.trace().digest


def test_older_names_of_raw_files_are_known(tmp_path: Path) -> None:
    """``token_selected_experts_rankR`` is the same thing."""
    write_tensorrt_raw(tmp_path, Recording())
    for rank in range(2):
        (tmp_path / f"rank{rank}_raw.safetensors").rename(
            tmp_path / f"token_selected_experts_rank{rank}.safetensors"
        )
    assert read_all(tokens_of(tmp_path)).digest == Recording().trace().digest


def test_raw_ids_that_lost_chunks_are_refused(tmp_path: Path) -> None:
    """The engine adds up the counts of chunks but keeps the last chunk's ids: that is noticed."""
    recording = Recording()
    write_tensorrt_counts(tmp_path, recording)
    write_tensorrt_raw(tmp_path, recording)
    file = tmp_path / "rank1.safetensors"
    change(file, **{key: 2 * value for key, value in load_file(file).items()})
    with pytest.raises(
        InputError, match=r"rank1_raw.safetensors: holds 12 ids .* of 24 counted.*remove the raw"
    ):
        open_trace(tmp_path)


@pytest.mark.parametrize("raw", [False, True])
def test_missing_ranks_are_named(tmp_path: Path, raw: bool) -> None:
    """Files of rank 0, 1 and 3 lack that of rank 2."""
    write = write_tensorrt_raw if raw else write_tensorrt_counts
    write(tmp_path, Recording(num_ranks=4))
    next(tmp_path.glob("rank2*")).unlink()
    with pytest.raises(InputError, match=r"lacks the files of rank 2 \(it has those of rank 0-1, 3\)"):
        open_trace(tmp_path)


def test_layers_of_pipeline_stages_come_together(tmp_path: Path) -> None:
    """Ranks 0 and 1 ran layers 1 and 2, ranks 2 and 3 layer 3: counts are summed, tokens joined."""
    recording = Recording(num_ranks=2)
    for name, write in (("counts", write_tensorrt_counts), ("raw", write_tensorrt_raw)):
        folder = write(tmp_path / name, recording)
        for rank in range(2):
            file = next(folder.glob(f"rank{rank}*"))
            content = load_file(file)
            last = {key: value for key, value in content.items() if key.endswith("_3")}
            save_file(last, folder / file.name.replace(str(rank), str(rank + 2)))
            save_file({key: value for key, value in content.items() if key not in last}, file)
    np.testing.assert_array_equal(counts_of(tmp_path / "counts").load_WLE, recording.load_ILE())
    assert read_all(tokens_of(tmp_path / "raw")).digest == recording.trace().digest
    (tmp_path / "raw" / "rank3_raw.safetensors").unlink()
    with pytest.raises(InputError, match="pipeline stages of 2, 1 ranks"):
        open_trace(tmp_path / "raw")


def test_ranks_whose_layers_overlap_in_part_are_refused(tmp_path: Path) -> None:
    """Neither one stage nor two: a file is incomplete."""
    write_tensorrt_counts(tmp_path, Recording())
    change(tmp_path / "rank1.safetensors", **{f"{50 + step}_3": None for step in range(3)})
    with pytest.raises(InputError, match="ranks 0 and 1 both ran layer 1"):
        open_trace(tmp_path)


def test_an_iteration_without_a_layer_is_named(tmp_path: Path) -> None:
    """Counts of all ranks lack layer 2 in iteration 51."""
    write_tensorrt_counts(tmp_path, Recording())
    for rank in range(2):
        change(tmp_path / f"rank{rank}.safetensors", **{"51_2": None})
    with pytest.raises(InputError, match="lacks layer 2 in iteration 51"):
        open_trace(tmp_path)


def test_iterations_on_some_ranks_are_summed_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the engine does; the user is told which."""
    recording = Recording()
    write_tensorrt_counts(tmp_path, recording)
    change(tmp_path / "rank1.safetensors", **{f"52_{layer}": None for layer in recording.layers})
    del recording.ids[2, 0, 1]
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(counts_of(tmp_path).load_WLE, recording.load_ILE())
    assert "iteration 52 is not on all ranks" in caplog.text


@pytest.mark.parametrize("raw", [False, True])
def test_ranks_that_routed_the_same_tokens_count_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, raw: bool
) -> None:
    """With tensor-parallel attention every rank routes every token."""
    recording = Recording(num_ranks=1, num_tokens=40)
    write = write_tensorrt_raw if raw else write_tensorrt_counts
    write(tmp_path, recording)
    first = next(tmp_path.glob("rank0*"))
    (tmp_path / first.name.replace("rank0", "rank1")).write_bytes(first.read_bytes())
    with caplog.at_level(logging.WARNING):
        if raw:
            assert read_all(tokens_of(tmp_path)).digest == recording.trace().digest
        else:
            np.testing.assert_array_equal(counts_of(tmp_path).load_WLE, recording.load_ILE())
    assert "the same tokens" in caplog.text


SLOTS = {1: [0, 1, 2, 3, 4, 5, 0, 1], 2: [5, 4, 3, 2, 1, 0, 5, 4], 3: [0, 0, 1, 2, 3, 4, 5, 2]}


def write_slots(path: Path, **changes: Any) -> Path:
    """Write a load balancer's configuration."""
    content = {"num_slots": 8, "initial_global_assignments": SLOTS, "layer_updates_per_iter": 0}
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def test_slots_become_experts(tmp_path: Path) -> None:
    """A load balancer makes the engine record slots: its configuration maps them back."""
    recording = Recording(num_experts=8)
    counts_folder = write_tensorrt_counts(tmp_path / "counts", recording)
    raw_folder = write_tensorrt_raw(tmp_path / "raw", Recording(num_experts=8, top_k=1))
    with pytest.raises(InputError, match="counts 8 ids per layer, small has 6 experts: a load balancer ran"):
        counts_of(counts_folder, model=small_model())
    slots = write_slots(tmp_path / "balancer.yaml")
    load = recording.load_ILE()
    expected = np.zeros((3, 3, 6), dtype=np.int64)
    for at, layer in enumerate((1, 2, 3)):
        for slot, expert in enumerate(SLOTS[layer]):
            expected[:, at, expert] += load[:, at, slot]
    counts = counts_of(counts_folder, model=small_model(), physical_map=slots)
    np.testing.assert_array_equal(counts.load_WLE, expected)
    np.testing.assert_array_equal(counts_of(counts_folder, physical_map=slots).load_WLE, expected)
    trace = read_all(tokens_of(raw_folder, model=small_model(top_k=1), physical_map=slots))
    recorded = Recording(num_experts=8, top_k=1).trace().experts_TLK
    for at, layer in enumerate((1, 2, 3)):
        np.testing.assert_array_equal(trace.experts_TLK[:, at], np.array(SLOTS[layer])[recorded[:, at]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_updates_per_iter": 2}, "the engine moved experts while it recorded"),
        ({"initial_global_assignments": {1: [0] * 8}}, "layer 2-3, of which the physical map says nothing"),
        ({"initial_global_assignments": {1: [0] * 7}}, "lists 7 slots in layer 1; 8 were recorded"),
        ({"initial_global_assignments": {1: [9] * 8}}, "puts expert 9 in layer 1, of 6"),
        ({"initial_global_assignments": {"a": [0] * 8}}, "'a' where a layer belongs"),
        ({"initial_global_assignments": {1: "all"}}, "does not list the experts of layer 1"),
        ({"initial_global_assignments": None}, "has no initial_global_assignments"),
    ],
)
def test_maps_of_slots_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A map that cannot be right is refused with what is wrong."""
    folder = write_tensorrt_counts(tmp_path / "counts", Recording(num_experts=8))
    slots = write_slots(tmp_path / "balancer.yaml", **changes)
    with pytest.raises(InputError, match=message):
        counts_of(folder, model=small_model(), physical_map=slots)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("50_1", np.arange(7), "counts 7 experts in layer 1 of iteration 50; meta_info.json says 6"),
        ("50_1", np.arange(6) - 1, "counts -1 pairs in layer 1 of iteration 50"),
        ("50_1", np.ones((2, 3), dtype=np.int64), r"holds I64 \[2, 3\] under 50_1"),
        ("50_1", np.ones(6, dtype=np.float32), r"holds F32 \[6\] under 50_1"),
        ("50_None", np.ones(6, dtype=np.int64), "'50_None' where an iteration and a layer belong"),
        ("050_1", np.ones(6, dtype=np.int64), "'050_1' where an iteration"),
    ],
)
def test_odd_tensors_are_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    """File, key and what is wrong with it."""
    write_tensorrt_counts(tmp_path, Recording())
    change(tmp_path / "rank1.safetensors", **{key: value})
    with pytest.raises(InputError, match=f"{tmp_path}: rank1.safetensors: .*{message}"):
        open_trace(tmp_path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"num_experts": 0}, "gives num_experts as 0"),
        ({"ep_size": 3}, "says that 3 ranks ran; files of 2 are there"),
        ({"num_experts_per_token": "2"}, "gives num_experts_per_token as '2'"),
        ({"num_experts_per_token": 3}, "is of a model with top-3; small has top-2"),
    ],
)
def test_meta_info_is_checked(tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    """Numbers must be numbers, and the model's."""
    write_tensorrt_counts(tmp_path, Recording())
    write_tensorrt_meta(tmp_path, Recording(), **meta)
    with pytest.raises(InputError, match=f"meta_info.json: {message}"):
        open_trace(tmp_path, options=ReadOptions(model=small_model()))


def test_padding_of_one_layer_alone_is_refused(tmp_path: Path) -> None:
    """A token is padding in all layers or in none."""
    write_tensorrt_raw(tmp_path, Recording())
    ids = load_file(tmp_path / "rank0_raw.safetensors")["50_2"].copy()
    ids[0] = -1
    change(tmp_path / "rank0_raw.safetensors", **{"50_2": ids})
    with pytest.raises(InputError, match=r"rank0_raw.safetensors: pads other tokens in layer 2"):
        read_all(tokens_of(tmp_path))


def test_another_models_layers_are_refused(tmp_path: Path) -> None:
    """DeepSeek-V3 routes in layers 3 to 60; a dump without layer 60 is none of it."""
    recording = Recording(num_ranks=1, num_steps=1, layers=tuple(range(3, 60)), num_experts=256, top_k=8)
    write_tensorrt_counts(tmp_path, recording)
    with pytest.raises(InputError, match="lacks layer 60 of deepseek-v3"):
        counts_of(tmp_path, model=preset_model("deepseek-v3"))


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    """They follow the decoder layers; a dense layer that routes is an error."""
    recording = Recording(layers=(1, 2, 3, 4))
    write_tensorrt_counts(tmp_path / "mtp", recording)
    counts = counts_of(tmp_path / "mtp", model=small_model())
    np.testing.assert_array_equal(counts.load_WLE, recording.load_ILE()[:, :3])
    write_tensorrt_counts(tmp_path / "dense", Recording(layers=(0, 1, 2, 3)))
    with pytest.raises(InputError, match="routes in dense layer 0 of small"):
        counts_of(tmp_path / "dense", model=small_model())


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """Insisting on the format names what is not there."""
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts_per_token": 2}))
    with pytest.raises(InputError, match=r"has no rankR.safetensors"):
        open_trace(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        open_trace(tmp_path / "meta_info.json", format="tensorrt-llm")
