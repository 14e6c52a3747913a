"""Tests of `traces.importers.vllm_ascend`: tables of counts, with and without steps and redundant experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.errors import InputError
from tests.traces.importers.samples import small_model
from tests.traces.importers.samples_passes import Recording, write_heat
from traces.counts import ExpertCounts
from traces.readers import ReadOptions, open_trace

LOAD = Recording(num_tokens=30).load_ILE()


def read(path: Path, **options: Any) -> ExpertCounts:
    """Read heat of the small model."""
    counts = open_trace(path, options=ReadOptions(**{"model": small_model(), **options}))
    assert isinstance(counts, ExpertCounts)
    return counts


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("key", [None, "moe_load"])
def test_steps_are_windows(tmp_path: Path, dtype: type, key: str | None) -> None:
    """A table is a window, several are several; whole floats are counts."""
    several = read(write_heat(tmp_path / "steps.pt", LOAD.astype(dtype), key=key))
    np.testing.assert_array_equal(several.load_WLE, LOAD)
    one = read(write_heat(tmp_path / "one.pt", LOAD[0].astype(dtype), key=key))
    np.testing.assert_array_equal(one.load_WLE, LOAD[:1])
    assert (one.top_k, one.model_name, one.moe_layer_ids) == (2, "small", (1, 2, 3))


@pytest.mark.parametrize("steps", [False, True])
def test_slots_become_experts(tmp_path: Path, steps: bool) -> None:
    """With redundant experts heat is by layer, rank and slot; the expert map says what the slots held."""
    rng = np.random.default_rng(0)
    held = [[[0, 1, 2, 3], [4, 5, 0, 1]], [[5, 4, 3, 2], [1, 0, 5, 4]], [[0, 2, 4, 1], [3, 5, 1, 0]]]
    heat = rng.integers(0, 50, (2, 3, 2, 4))
    expected = np.zeros((2, 3, 6), dtype=np.int64)
    for step, layer, rank, slot in np.ndindex(heat.shape):
        expected[step, layer, held[layer][rank][slot]] += heat[step, layer, rank, slot]
    layers = [
        {
            "layer_id": layer,
            "device_count": 2,
            "device_list": [{"device_id": d, "device_expert": experts} for d, experts in enumerate(row)],
        }
        for layer, row in enumerate(held)
    ]
    expert_map = tmp_path / "map.json"
    expert_map.write_text(json.dumps({"moe_layer_count": 3, "layer_list": layers}))
    path = write_heat(tmp_path / "heat.pt", heat if steps else heat[0])
    with pytest.raises(
        InputError, match="counts 8 slots per layer, small has 6 experts; give the expert map"
    ):
        read(path)
    counts = read(path, physical_map=expert_map)
    np.testing.assert_array_equal(counts.load_WLE, expected if steps else expected[:1])
    expert_map.write_text(json.dumps({"moe_layer_count": 3, "layer_list": layers[:2]}))
    with pytest.raises(InputError, match="does not list 8 slots in each of 3 layers"):
        read(path, physical_map=expert_map)


@pytest.mark.parametrize(
    ("heat", "message"),
    [
        (np.ones((4, 6), dtype=np.int64), r"holds a table \[4, 6\]; small has 3 MoE layers of 6 experts"),
        (np.ones((3, 5), dtype=np.int64), "counts 5 slots per layer, small has 6"),
        (np.ones(6, dtype=np.int64), r"holds int64 \[6\], no table"),
        (np.ones((3, 6), dtype=bool), "holds bool"),
        (np.full((3, 6), 0.5), "holds fractions where counts belong"),
        (np.full((3, 6), np.nan), "no finite numbers"),
        (np.full((3, 6), 1e300), "no finite numbers"),
        (LOAD - 100, "counts are not negative"),
        (LOAD * 0, "every count is zero"),
        (np.zeros((0, 6), dtype=np.int64), "no table"),
    ],
)
def test_what_is_no_heat_is_refused(tmp_path: Path, heat: Any, message: str) -> None:
    """Each with what is wrong."""
    path = write_heat(tmp_path / "heat.pt", heat)
    with pytest.raises(InputError, match=f"{path}: .*{message}"):
        read(path)


def test_the_model_must_be_named(tmp_path: Path) -> None:
    """Heat does not say how many experts a token selects."""
    path = write_heat(tmp_path / "heat.pt", LOAD)
    with pytest.raises(InputError, match="name the model with --model"):
        read(path, model=None)


def test_another_dictionary_is_refused(tmp_path: Path) -> None:
    """Insisting on the format names the keys that are there."""
    path = write_heat(tmp_path / "heat.pt", LOAD, key="weights")
    with pytest.raises(InputError, match="holds no moe_load or expert_heat but: weights"):
        open_trace(path, format="vllm-ascend", options=ReadOptions(model=small_model()))
    (tmp_path / "text.pt").write_text("heat")
    with pytest.raises(InputError, match="is no PyTorch file"):
        open_trace(tmp_path / "text.pt", format="vllm-ascend")
