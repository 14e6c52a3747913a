"""Tests of calibrations: curves, the three kinds, and what calibration files get wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instances import MEASURED_CURVES, cluster, device_kind_of, measured, model_for, random_profile

from placement.calibration import (
    Calibration,
    DataSheetCalibration,
    LinearCalibration,
    Machine,
    MeasuredCalibration,
    PiecewiseLinear,
    calibration_from_dict,
    read_calibration,
)
from placement.calibration.machine import kind_of_gpu
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
    # Steps that are lost beside the curve's 0.5 make a last slope of rounding errors.
    steps=st.lists(st.floats(1e-3, 9) | st.just(0.0), min_size=1, max_size=5),
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


OLMOE = MEASURED_CURVES["expert_ffn_ms"]["olmoe"]
ALL_TO_ALL = "all_to_all_ms_by_MiB_sent_per_rank"
EXPERTS = ("expert_ffn_ms", "olmoe")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("world_size",), 1, "world_size is 1; an all-to-all is measured on 2 GPUs"),
        (("world_size",), "two", "world_size is 'two'; it must be a whole number"),
        (("world_size",), None, "world_size is missing; it must be a whole number"),
        (("world_size",), 2.5, "world_size is 2.5; it must be a whole number"),
        (("format",), "moe-placement/1", "this version reads 'moe-placement-calibration/1'"),
        (("dtype",), 2, "dtype is 2; it must be the name of a type"),
        (("dtype",), "int3", "unknown weight type 'int3'"),
        ((ALL_TO_ALL,), [], "must be a list of measured points"),
        ((ALL_TO_ALL,), None, "all_to_all.* must be a list of measured points, not None"),
        ((ALL_TO_ALL,), [[1, 2], [1, 2]], "gives a size twice; its sizes must ascend from 0"),
        ((ALL_TO_ALL,), [[1, 2], 3], r"rank\[1\] must be \[MiB, ms\], not 3"),
        ((ALL_TO_ALL,), [[1, 2], [2, float("nan")]], r"rank\[1\]\[1\] is nan; it must be a finite number"),
        ((ALL_TO_ALL,), [[1, 2], [1e300, 3]], "check its unit"),
        ((ALL_TO_ALL,), [[0, 2]], "all_to_all.*: a curve needs two points or more"),
        (("all_to_all_ms_by_tier",), {"cluster": 3}, r"by_tier\['cluster'\] must be a list"),
        (("all_to_all_ms_by_tier",), [1], "all_to_all_ms_by_tier must be an object"),
        (("expert_ffn_ms",), {}, "expert_ffn_ms names no model"),
        (("expert_ffn_ms",), [OLMOE], "expert_ffn_ms must be an object"),
        (("expert_ffn_ms",), {"no-such-model": OLMOE}, "no-such-model.* or give its sizes in expert_shapes"),
        (("expert_shapes",), {"olmoe": [2048, 1024]}, r"expert_shapes\['olmoe'\] must be an object"),
        (("expert_shapes",), {"olmoe": {"hidden": 2048}}, r"\['olmoe'\].expert_hidden is missing"),
        (EXPERTS, [7], r"olmoe'\]\[0\] must be an object"),
        (EXPERTS, [{"tokens_per_expert": 1, "ms": 1}], r"\[0\].local_experts is missing"),
        (EXPERTS, [{"tokens_per_expert": 1, "ms": 1, "local_experts": 0}], "local_experts is 0"),
        (EXPERTS, [{**OLMOE[0], "active_experts": 33}], "active_experts is 33 of 32 local_experts"),
        (EXPERTS, [OLMOE[0], OLMOE[0]], "gives 1 tokens per expert twice"),
        (EXPERTS, [{**OLMOE[0], "ms": -1}], "ms is -1; it must be a finite number above 0"),
        (("hbm_gb_s",), "fast", "hbm_gb_s is 'fast'"),
        (("launch_ms",), 0, "launch_ms is 0"),
        (("migration_gb_s",), {"node": None}, r"migration_gb_s\['node'\] is missing"),
        (("migration_gb_s",), 3, "migration_gb_s must be an object"),
        (("prepare_ms",), {"rows": 1}, "prepare_ms must be a list"),
        (("prepare_ms",), [1], r"prepare_ms\[0\] must be an object with rows, hidden and ms"),
        (("expand_ms",), [{"rows": 1, "hidden": 0, "ms": 1}], r"expand_ms\[0\].hidden is 0"),
    ],
)
def test_what_measured_curves_get_wrong(path: tuple[str, ...], value: Any, message: str) -> None:
    """Broken measurements are input errors that name the key."""
    with pytest.raises(InputError, match=message):
        calibration_from_dict(changed(MEASURED_CURVES, path, value))


def changed(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return a copy with one entry replaced."""
    copied = copy.deepcopy(values)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copied


FULL: dict[str, Any] = {
    **MEASURED_CURVES,
    "format": "moe-placement-calibration/1",
    "gpu": "NVIDIA H200",
    "dtype": "bfloat16",
    "measured_at": "2026-01-01T00:00:00Z",
    "world_size": 4,
    "devices_per_node": 2,
    "all_to_all_ms_by_tier": {"node": [[0, 0.04], [64, 0.3]], "cluster": [[1, 0.2], [64, 6.4]]},
    "hbm_gb_s": 4000,
    "expert_shapes": {"olmoe": {"hidden": 2048, "expert_hidden": 1024, "matrices": 3}},
    "prepare_ms": [
        {"rows": 1000, "hidden": 2048, "ms": 0.1},
        {"rows": 3000, "hidden": 2048, "ms": 0.3},
    ],
    "launch_ms": 0.006,
    "counts_exchange_ms": 0.09,
    "migration_gb_s": {"node": 300, "cluster": 40},
}


def full(**entries: Any) -> MeasuredCalibration:
    """Return the calibration of a file with every key, some replaced."""
    made = calibration_from_dict({**FULL, **entries})
    assert isinstance(made, MeasuredCalibration)
    return made


def test_what_a_whole_file_tells() -> None:
    """Every optional key arrives, in seconds and bytes; others are ignored."""
    made = full(spread={"anything": "at all"}, notes=["none"])
    machine = made.machine
    assert (made.gpu, made.world_size, machine.dtype) == ("NVIDIA H200", 4, "bf16")
    assert machine.row_bytes_per_s == pytest.approx(0.9 * 4e12)
    assert machine.launch_s == pytest.approx(6e-6)
    assert machine.counts_exchange_s == pytest.approx(9e-5)
    assert machine.migration_bytes_per_s == {"node": 300e9, "cluster": 40e9}
    assert machine.row_step_s("prepare", rows=2000, hidden=2048) == pytest.approx(2e-4)
    # Half as wide: as many bytes as 1000 rows of 2048.
    assert machine.row_step_s("prepare", rows=2000, hidden=1024) == pytest.approx(1e-4)
    assert machine.row_step_s("reduce", rows=2000, hidden=1024) is None


def test_tiers_have_their_own_curves() -> None:
    """Each tier's own curve, the node's rather than that of all ranks, which cross nodes."""
    made = full()
    # Two nodes: one rank of each, so half of 64 MiB arrives from the other: 2^25 bytes.
    across = made.exchange_curve(TIERS[1], MODEL, phase="combine")
    assert across(2**25 / 2048) == pytest.approx(6.4e-3)
    node = made.exchange_curve(TIERS[0], MODEL, phase="dispatch")
    assert node(2**25 / 2048) == pytest.approx(0.3e-3)
    ranks = full(tier_ranks={"cluster": 4}).exchange_curve(TIERS[1], MODEL, phase="combine")
    assert ranks(0.75 * 2**26 / 2048) == pytest.approx(6.4e-3)


def test_the_nodes_curve_serves_alone() -> None:
    """A file without the curve of all ranks takes that of the node."""
    values = {key: value for key, value in FULL.items() if key != ALL_TO_ALL}
    node = calibration_from_dict(values).exchange_curve(TIERS[0], MODEL, phase="dispatch")
    assert node(2**25 / 2048) == pytest.approx(0.3e-3)


def test_fewer_active_experts_are_a_curve_of_their_own() -> None:
    """The objective sees busy experts; between shares the time of one active expert is interpolated."""
    idle = [{**point, "active_experts": 8, "ms": point["ms"] / 2} for point in OLMOE]
    made = full(expert_ffn_ms={"olmoe": [*OLMOE, *idle]})
    assert made.expert_curve(KIND, MODEL)(512.0) == pytest.approx(0.48e-3 / 32 / 4)
    times = made.experts["olmoe"]
    assert times.seconds(512.0, share=1.0) == pytest.approx(0.48e-3 / 32)
    assert times.seconds(512.0, share=0.25) == pytest.approx(0.24e-3 / 8)
    assert times.seconds(512.0, share=0.625) == pytest.approx((0.48e-3 / 32 + 0.24e-3 / 8) / 2)


def test_labels_need_sizes(caplog: pytest.LogCaptureFixture) -> None:
    """They come from the file, from the caller or from a preset; a model without any is left out aloud."""
    curves = {"olmoe": OLMOE, "ours": [{**point, "ms": 9 * point["ms"]} for point in OLMOE]}
    assert full(expert_ffn_ms=curves).experts["ours"].params_per_expert is None
    assert "'ours' is left out" in caplog.text
    shapes = {"ours": {"hidden_size": 1024, "expert_hidden_size": 512, "matrices_per_expert": 3}}
    known = full(expert_ffn_ms=curves, expert_shapes=shapes)
    assert known.expert_curve(KIND, MODEL)(512.0) == pytest.approx(9 * 0.48e-3 / 32)
    told = calibration_from_dict({**FULL, "expert_ffn_ms": curves}, shapes={"ours": MODEL})
    assert told.expert_curve(KIND, MODEL)(512.0) == pytest.approx(9 * 0.48e-3 / 32)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA H100 PCIe", None),
        ("test GPU", None),
    ],
)
def test_names_of_gpus(name: str, kind: str | None) -> None:
    """Drivers' names lead to data sheets, those of cards with another memory do not."""
    found = kind_of_gpu(name)
    assert (None if found is None else found.name) == kind


def test_how_fast_rows_move() -> None:
    """From the copy that was measured, else the data sheet, else the fastest reading of weights."""
    assert Machine(gpu="NVIDIA H100 80GB HBM3").row_bytes_per_s == pytest.approx(0.8 * 3.35e12)
    fast = Machine(gpu="NVIDIA H100 80GB HBM3", weights_bytes_per_s=3e12)
    assert fast.row_bytes_per_s == pytest.approx(3e12)
    # Mixtral: 4 x 3 x 4096 x 14336 weights of two bytes in 0.6 ms.
    unknown = measured()
    assert isinstance(unknown, MeasuredCalibration)
    assert unknown.machine.row_bytes_per_s == pytest.approx(4 * 3 * 4096 * 14336 * 2 / 0.6e-3)
    with pytest.raises(InputError, match="give hbm_gb_s"):
        _ = Machine(gpu="mystery").row_bytes_per_s


JUNK = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3) | st.just([[1]])


def damaged(value: Any, draw: st.DataObject, depth: int = 0) -> Any:
    """Return a value with one part of it replaced, dropped or doubled somewhere below."""
    if depth and draw.draw(st.integers(0, 3)) == 0:
        return draw.draw(JUNK)
    if isinstance(value, dict) and value:
        key = draw.draw(st.sampled_from(sorted(value)))
        if draw.draw(st.integers(0, 4)) == 0:
            return {name: entry for name, entry in value.items() if name != key}
        return {**value, key: damaged(value[key], draw, depth + 1)}
    if isinstance(value, list) and value:
        index = draw.draw(st.integers(0, len(value) - 1))
        if draw.draw(st.integers(0, 4)) == 0:
            return [*value, value[index]]
        return [*value[:index], damaged(value[index], draw, depth + 1), *value[index + 1 :]]
    return draw.draw(JUNK)


@settings(max_examples=300, deadline=None)
@given(draw=st.data())
def test_damaged_files_are_read_or_refused_in_a_line(draw: st.DataObject) -> None:
    """Whatever is broken, it is an input error of one line, or the curves are sound."""
    made, refused = attempt(json.loads(json.dumps(damaged(FULL, draw))))
    assert (made is None) == (0 < len(refused) < 1000)
    assert "\n" not in refused
    if isinstance(made, MeasuredCalibration):
        assert np.isfinite(made.expert_curve(KIND, MODEL)([0.0, 1e4])).all()
        assert np.isfinite(made.node_exchange([0.0, 1e9])).all()


def attempt(values: dict[str, Any]) -> tuple[Calibration | None, str]:
    """Return a calibration, or why there is none."""
    try:
        return calibration_from_dict(values), ""
    except InputError as exc:
        return None, str(exc)


def test_calibration_files(tmp_path: Path) -> None:
    """A file is read by its content, and every error begins with its name."""
    file = tmp_path / "curves.json"
    file.write_text(json.dumps(MEASURED_CURVES))
    assert isinstance(read_calibration(file), MeasuredCalibration)
    file.write_text('{"kind": "linear", "pair_cost": 1, "token_cost": 4}')
    assert read_calibration(file) == LinearCalibration(pair_cost=1, token_cost=4)
    file.write_text('{"kind": "data-sheet", "overlap": 0.5}')
    assert read_calibration(file) == DataSheetCalibration(overlap=0.5)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1200), text=st.text(max_size=3))
def test_damaged_bytes(tmp_path: Path, at: int, text: str) -> None:
    """Whatever stands somewhere in a file, errors begin with its name."""
    file = tmp_path / "curves.json"
    whole = json.dumps(FULL).encode()
    file.write_bytes(whole[:at] + text.encode("utf-8", "surrogatepass") + whole[at + 1 :])
    try:
        made = read_calibration(file)
    except InputError as exc:
        made, refused = None, str(exc)
    else:
        refused = ""
    assert refused.startswith(f"calibration {file}") if made is None else made.unit in ("s", "cost")


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
