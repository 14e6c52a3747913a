"""Tests of calibrations: curves, the three kinds, and what calibration files get wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instances import MEASURED_CURVES, cluster, device_kind_of, measured, model_for, random_profile

from placement.calibration import (
    DataSheetCalibration,
    LinearCalibration,
    MeasuredCalibration,
    PiecewiseLinear,
    calibration_from_dict,
    read_calibration,
)
from placement.errors import InputError

PROFILE = random_profile(np.random.default_rng(0))
# 3 x 1024 x 512 weights: 3145728 FLOPs per token and 3145728 bytes in bf16.
MODEL = model_for(PROFILE)
# 100 TFLOP/s and 1 TB/s.
KIND = device_kind_of("kind")
TIERS = cluster([0, 0, 1, 1]).tiers


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0.0], [1.0], "needs two points or more"),
        ([0.0, 1.0], [1.0], "needs two points or more"),
        ([1.0, 2.0], [1.0, 2.0], "must ascend from 0"),
        ([0.0, 0.0], [1.0, 2.0], "must ascend from 0"),
        ([0.0, 1.0], [2.0, 1.0], "must not fall"),
        ([0.0, 1.0], [-1.0, 1.0], "not start below 0"),
        ([0.0, np.inf], [0.0, 1.0], "not finite"),
    ],
)
def test_broken_curves(x: list[float], y: list[float], message: str) -> None:
    """A curve starts at 0, ascends in x and does not fall in y."""
    with pytest.raises(InputError, match=message):
        PiecewiseLinear(x=np.array(x), y=np.array(y))


def test_a_curve_continues_with_its_last_slope() -> None:
    """Between points it interpolates, beyond the last it goes on."""
    curve = PiecewiseLinear(x=np.array([0.0, 2.0, 4.0]), y=np.array([1.0, 1.0, 5.0]))
    np.testing.assert_allclose(curve([0, 1, 2, 3, 4, 10]), [1, 1, 1, 3, 5, 17])
    assert PiecewiseLinear.line(intercept=2.0, slope=3.0)(1000.0) == pytest.approx(3002.0)


@given(
    value=st.floats(0, 1e6),
    x=st.floats(1e-3, 1e3),
    y=st.floats(1e-3, 1e3),
    steps=st.lists(st.floats(0, 9), min_size=1, max_size=5),
)
def test_scaling_is_a_change_of_units(value: float, x: float, y: float, steps: list[float]) -> None:
    """The scaled curve is ``y * f(value / x)``."""
    curve = PiecewiseLinear(x=np.arange(len(steps) + 1.0), y=np.cumsum([0.5, *steps]))
    assert curve.scaled(x=x, y=y)(value) == pytest.approx(float(y * curve(value / x)), rel=1e-9)


def test_linear_costs() -> None:
    """Pairs cost the experts, tokens the dispatch, and the combine is free."""
    linear = LinearCalibration(pair_cost=2.0, token_cost=3.0)
    assert (linear.unit, linear.flat) == ("cost", True)
    assert linear.expert_curve(KIND, None)(5.0) == 10.0
    assert linear.exchange_curve(TIERS[0], None, phase="dispatch")(5.0) == 15.0
    assert linear.exchange_curve(TIERS[0], None, phase="combine")(5.0) == 0.0


def test_data_sheet_by_hand() -> None:
    """A whole read of the weights up to the knee, FLOPs beyond; latency and bytes over bandwidth."""
    sheet = DataSheetCalibration(dispatch_dtype="fp8", overlap=0.5)
    read_s = 3145728 / (1e12 * 0.8)
    token_s = 3145728 / 1e14
    curve = sheet.expert_curve(KIND, MODEL)
    np.testing.assert_allclose(curve([0, 1, 50, 1000]), [0, read_s, read_s, 1000 * token_s], rtol=1e-12)
    # Half is hidden. Inside the node 5 us and 100 GB/s, across 20 us and 10 GB/s; 1024 bytes out, 2048 back.
    inside, across = (sheet.exchange_curve(tier, MODEL, phase="dispatch") for tier in TIERS)
    assert inside(1e6) == pytest.approx(0.5 * (5e-6 + 1.024e9 / 1e11))
    assert across(1e6) == pytest.approx(0.5 * (2e-5 + 1.024e9 / 1e10))
    assert sheet.exchange_curve(TIERS[0], MODEL, phase="combine")(1e6) == pytest.approx(
        0.5 * (5e-6 + 2.048e-2)
    )


def test_measured_curves() -> None:
    """Per expert and token from what was measured, the nearest model's scaled to the size asked for."""
    made = measured()
    assert isinstance(made, MeasuredCalibration)
    assert (made.unit, made.flat, made.gpu) == ("s", False, "test GPU")
    # Nearest in size is OLMoE with 3 x 2048 x 1024 weights, four times as many; 0.22 ms for 32 experts.
    curve = made.expert_curve(KIND, MODEL)
    assert curve(1.0) == pytest.approx(0.22e-3 / 32 / 4)
    assert curve(1024.0) == pytest.approx(0.84e-3 / 32 / 4)
    assert curve(0.0) == 0.0
    # Half of 64 MiB leaves its GPU: 2^25 bytes are 16384 tokens of 2 KiB.
    node = made.exchange_curve(TIERS[0], MODEL, phase="dispatch")
    assert node(2**25 / 2048) == pytest.approx(0.38e-3)
    # The noise at 0.25 MiB is flattened by the larger size that was faster.
    assert node(0.0) == node(2**17 / 2048) == pytest.approx(0.05e-3)
    assert made.exchange_curve(TIERS[1], MODEL, phase="dispatch")(0.0) == pytest.approx(2e-5)


def test_costs_in_seconds_need_a_model() -> None:
    """Without sizes there are no bytes and no FLOPs."""
    for calibration in (DataSheetCalibration(), measured()):
        with pytest.raises(InputError, match="name it with --model"):
            calibration.expert_curve(KIND, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "linear", "pair_cost": -1}, "pair_cost is -1"),
        ({"kind": "linear", "pair_cost": True}, "pair_cost is True"),
        ({"kind": "linear", "pair_cost": "1"}, "pair_cost is '1'"),
        ({"kind": "linear", "token_cost": float("inf")}, "token_cost is inf"),
        ({"kind": "linear", "pair_cost": 0}, "every placement would cost the same"),
        ({"kind": "linear", "price": 1}, "a linear calibration cannot be read from it: .*price"),
        ({"kind": "data-sheet", "overlap": 1.0}, "overlap is 1.0"),
        ({"kind": "data-sheet", "overlap": "all"}, "a data-sheet calibration cannot be read"),
        ({"kind": "data-sheet", "dispatch_dtype": "fp9"}, "unknown weight type 'fp9'; did you mean 'fp8'"),
        ({"kind": "quadratic"}, "neither \"kind\" .*found kind='quadratic'"),
        ({}, 'neither "kind"'),
    ],
)
def test_what_calibrations_get_wrong(values: dict[str, Any], message: str) -> None:
    """Values out of range, unknown keys and unknown kinds are named."""
    with pytest.raises(InputError, match=message):
        calibration_from_dict(values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("world_size",), 1, "world_size is 1"),
        (("world_size",), "two", "a measured calibration cannot be read"),
        (("world_size",), None, "a measured calibration cannot be read"),
        (("all_to_all_ms_by_MiB_sent_per_rank",), [], "a measured calibration cannot be read"),
        (("all_to_all_ms_by_MiB_sent_per_rank",), [[1, 2], [1, 2]], "must ascend from 0"),
        (("expert_ffn_ms",), {}, "expert_ffn_ms names no model"),
        (("expert_ffn_ms",), {"no-such-model": MEASURED_CURVES["expert_ffn_ms"]["olmoe"]}, "no-such-model"),
        (("expert_ffn_ms", "olmoe"), [{"tokens_per_expert": 1, "ms": 1}], "key 'local_experts' is missing"),
        (
            ("expert_ffn_ms", "olmoe"),
            [{"tokens_per_expert": 1, "ms": 1, "local_experts": 0}],
            "cannot be read",
        ),
    ],
)
def test_what_measured_curves_get_wrong(path: tuple[str, ...], value: Any, message: str) -> None:
    """Broken measurements are input errors, whatever is broken."""
    values = copy.deepcopy(MEASURED_CURVES)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InputError, match=message):
        calibration_from_dict(values)


def test_calibration_files(tmp_path: Path) -> None:
    """A file is read by its content, and every error begins with its name."""
    file = tmp_path / "curves.json"
    file.write_text(json.dumps(MEASURED_CURVES))
    assert isinstance(read_calibration(file), MeasuredCalibration)
    file.write_text('{"kind": "linear", "pair_cost": 1, "token_cost": 4}')
    assert read_calibration(file) == LinearCalibration(pair_cost=1, token_cost=4)
    file.write_text('{"kind": "data-sheet", "overlap": 0.5}')
    assert read_calibration(file) == DataSheetCalibration(overlap=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "lin', "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "holds a list, not an object"),
        ('{"kind": "linear", "pair_cost": -1}', "calibration .*broken.json: pair_cost is -1"),
    ],
)
def test_broken_calibration_files(tmp_path: Path, text: str, message: str) -> None:
    """Truncated, foreign and hostile files are told apart."""
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_calibration(file)


def test_a_missing_calibration_file(tmp_path: Path) -> None:
    """The operating system's reason is passed on."""
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_calibration(tmp_path / "none.json")
