"""Recorded windows are saved in a form that every reader of counts, and so every solver, takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from placement import read_placement
from placement.cli.app import run
from placement.errors import InputError
from placement.runtime.tiny import tiny_model
from traces.counts import ExpertCounts
from traces.readers import open_trace
from traces.record import LoadCounter, LoadWindow, save_windows


def _window(number: int, load_LE: Any) -> LoadWindow:
    load_LE = np.asarray(load_LE)
    return LoadWindow(window=number, load_LE=load_LE, tokens=int(load_LE[0].sum()) // 2, steps=1)


def _counts(path: Path) -> ExpertCounts:
    counts = open_trace(path)
    assert isinstance(counts, ExpertCounts)
    return counts


def test_counted_windows_are_read_back(tmp_path: Path) -> None:
    """A model with a dense layer: loads, top-k and name are those that were counted."""
    model: Any = tiny_model("qwen3_moe", num_layers=4, decoder_sparse_step=2)
    with LoadCounter(model, step_per_pass=True, window_steps=2) as counter, torch.no_grad():
        for length in (3, 5, 2):
            model(torch.arange(length).view(1, -1))
    windows = counter.windows()
    path = tmp_path / "windows.json"
    known: dict[str, Any] = {"top_k": counter.top_k, "moe_layer_ids": counter.moe_layer_ids}
    save_windows(path, windows, model_name="tiny", **known)
    counts = _counts(path)
    assert counter.moe_layer_ids == (1, 3)
    assert np.array_equal(counts.load_WLE, np.stack([one.load_LE for one in windows]))
    assert (counts.top_k, counts.model_name, counts.num_tokens) == (2, "tiny", 10)


@settings(max_examples=30, deadline=None)
@given(loads=arrays(np.int64, (4, 2, 5), elements=st.integers(3, 2**50)), ranks=st.integers(1, 3))
def test_windows_of_ranks_add_up(tmp_path_factory: Any, loads: Any, ranks: int) -> None:
    """Windows of one number are summed, whatever their order, and come back in the order of numbers."""
    path = tmp_path_factory.mktemp("windows") / "windows.json"
    windows = [_window(number, loads[number] // ranks) for _ in range(ranks) for number in (3, 1, 0, 2)]
    save_windows(path, windows, top_k=2)
    assert np.array_equal(_counts(path).load_WLE, loads // ranks * ranks)


def test_the_layers_come_back(tmp_path: Path) -> None:
    """Which decoder layers were counted is kept; anything else under that name is refused."""
    path = tmp_path / "windows.json"
    save_windows(path, [_window(0, np.ones((2, 4), dtype=np.int64))], top_k=1, moe_layer_ids=(1, 3))
    assert _counts(path).moe_layer_ids == (1, 3)
    path.write_text(path.read_text().replace("[1, 3]", '"1, 3"').replace("[1,3]", '"1, 3"'))
    with pytest.raises(InputError, match="moe_layer_ids is 1, 3, not a list of decoder layers"):
        _counts(path)


def test_a_recorded_file_is_solved(tmp_path: Path) -> None:
    """The command line places the experts of what was counted."""
    windows = [_window(number, np.arange(8).reshape(1, 8) + number) for number in range(40)]
    path = tmp_path / "windows.json"
    save_windows(path, windows, top_k=2)
    out = tmp_path / "placement.json"
    options = ["-t", "h100:1x2", "--objective", "balance", "--solver", "greedy"]
    assert run(["solve", str(path), *options, "-o", str(out)]) == 0
    assert read_placement(out).num_experts == 8


def test_many_windows_are_still_told_by_their_head(tmp_path: Path) -> None:
    """A file of thousands of windows is known by its beginning."""
    windows = [_window(number, np.ones((2, 4), dtype=np.int64)) for number in range(20_000)]
    path = tmp_path / "windows.json"
    save_windows(path, windows, top_k=1)
    assert _counts(path).num_windows == 20_000


def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    """Nothing counted, other shapes, a file that is there; what is there stays unless overwritten."""
    path = tmp_path / "windows.json"
    with pytest.raises(InputError, match="no window routed a token"):
        save_windows(path, [_window(0, np.zeros((1, 4), dtype=np.int64))], top_k=2)
    with pytest.raises(InputError, match="no window routed a token"):
        save_windows(path, [], top_k=2)
    one, other = _window(0, [[1, 1]]), _window(1, [[1, 1, 1]])
    with pytest.raises(InputError, match=r"window 1 counts \(1, 3\).*others \(1, 2\)"):
        save_windows(path, [one, other], top_k=2)
    assert not path.exists()
    save_windows(path, [one], top_k=1)
    with pytest.raises(InputError, match="is there already"):
        save_windows(path, [one], top_k=1)
    save_windows(path, [one, one], top_k=1, overwrite=True)
    assert _counts(path).load_WLE.tolist() == [[[2, 2]]]
