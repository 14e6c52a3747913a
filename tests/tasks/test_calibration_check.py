"""Tests of predictions held against measured layers: scores by hand, and what CSVs get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_files import CURVES, SHAPE, counts, curves, layer_row, write_layers

from placement.errors import InputError
from placement.tasks.calibration_check import check_calibration, score_layers
from placement.tasks.measured_layers import read_measured_layers

PAIRS = counts([[2000, 1500], [1800, 2700]])
TOKENS = counts([[1000, 2500], [2000, 2500]], tokens_RR=[[700, 900], [800, 1000]])


@pytest.fixture
def curves_file(tmp_path: Path) -> Path:
    """Return a calibration file of round numbers."""
    path = tmp_path / "curves.json"
    path.write_text(json.dumps(CURVES))
    return path


def test_predicted_layers_have_no_error(tmp_path: Path, curves_file: Path) -> None:
    """Layers that took what is predicted: nothing is off, in any group or phase."""
    rows = [layer_row(PAIRS, dedup=False), layer_row(TOKENS, dedup=True)]
    report = check_calibration(write_layers(tmp_path / "layers.csv", rows), curves_file)
    assert (report["layers"], report["median_error"], report["p95_error"]) == (2, 0.0, 0.0)
    assert [(group["shape"], group["dedup"], group["layers"]) for group in report["groups"]] == [
        ("small", 0, 1),
        ("small", 1, 1),
    ]
    assert list(report["phases"]) == ["prepare", "dispatch", "experts", "combine", "unpermute"]
    assert max(phase["p95_error"] for phase in report["phases"].values()) == 0.0
    assert report["world_size"] == {"calibration": 2, "measured": 2}


def test_errors_by_hand(tmp_path: Path, curves_file: Path) -> None:
    """Measured 1, 1.25 and 2 times the prediction: 0, 20 and 50 % of what was measured."""
    rows = [layer_row(PAIRS, dedup=False, slower=slower) for slower in (1.0, 1.25, 2.0)]
    report = check_calibration(write_layers(tmp_path / "layers.csv", rows), curves_file)
    assert report["median_error"] == pytest.approx(0.2, abs=1e-5)
    # Between the second and the third of three, nine tenths of the way.
    assert report["p95_error"] == pytest.approx(0.2 + 0.9 * 0.3, abs=1e-5)
    assert report["median_bias"] == pytest.approx(-0.2, abs=1e-5)
    assert report["phases"]["experts"]["median_error"] == pytest.approx(0.2, abs=1e-5)
    group = report["groups"][0]
    assert group["measured_ms"] == pytest.approx(1.25 * group["predicted_ms"])


def test_more_ranks_and_separated_names(tmp_path: Path) -> None:
    """Four ranks, with columns named either way."""
    layer = counts(np.arange(16.0).reshape(4, 4).tolist(), tokens=10)
    row = layer_row(layer, dedup=False)
    separated = {
        f"{name[:7]}_{name[7:]}" if name.startswith("pairs_") else name: value
        for name, value in row.items()
        if not name.startswith("tokens_") or name == "tokens_per_rank"
    }
    for number, columns in enumerate((row, separated)):
        found = read_measured_layers(write_layers(tmp_path / f"{number}.csv", [columns]))
        np.testing.assert_array_equal(found[0].counts.pairs_RR, layer.pairs_RR)
        np.testing.assert_array_equal(found[0].counts.active_R, np.full(4, 4.0))
        assert score_layers(found, curves())["median_error"] == 0.0


def test_only_what_is_needed_must_be_there(tmp_path: Path) -> None:
    """Without phases, names, active experts; with a byte-order mark, other columns and blank lines."""
    row = layer_row(PAIRS, dedup=False)
    kept = {
        name: value
        for name, value in row.items()
        if name.startswith(("total", "pairs")) or name in ("hidden", "expert_hidden", "experts", "top_k")
    }
    path = write_layers(tmp_path / "layers.csv", [{"note": "x", **kept, "dedup": 0, "tokens_per_rank": 1000}])
    path.write_text("\ufeff" + path.read_text().replace("\n", "\n\n"), encoding="utf-8")
    found = read_measured_layers(path)
    assert (found[0].label, found[0].transport, found[0].phase_ms_R) == ("", "", {})
    report = score_layers(found, curves())
    assert (report["median_error"], report["phases"]) == (0.0, {})


def test_a_label_that_only_the_csv_describes(tmp_path: Path) -> None:
    """Curves of a model that no preset has: the CSV tells its sizes."""
    path = tmp_path / "curves.json"
    path.write_text(json.dumps({key: value for key, value in CURVES.items() if key != "expert_shapes"}))
    layers = write_layers(tmp_path / "layers.csv", [layer_row(PAIRS, dedup=False)])
    assert check_calibration(layers, path)["median_error"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dedup": 2}, "line 2: dedup is 2; it must be 0 or 1"),
        ({"hidden": "wide"}, "line 2: hidden is 'wide'; it must be a number, 0 or more"),
        ({"hidden": 0}, "line 2: hidden is 0; it must be above 0"),
        ({"experts": 1.5}, "line 2: experts is 1.5; it must be a whole number"),
        ({"top_k": 99}, "line 2: model 'small': top-99 of 16 experts is impossible"),
        ({"pairs_01": -1}, "line 2: pairs_01 is '-1'"),
        ({"pairs_10": "nan"}, "line 2: pairs_10 is 'nan'"),
        ({"total_ms_rank0": 0}, "line 2: total_ms_rank0 is 0; it must be above 0"),
        ({"total_ms_rank1": "inf"}, "line 2: total_ms_rank1 is 'inf'"),
        ({"experts_ms_rank1": ""}, "line 2: experts_ms_rank1 is ''"),
        ({"dedup": 1, "tokens_11": "x"}, "line 2: tokens_11 is 'x'"),
    ],
)
def test_wrong_values(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A wrong value is named with its line and column."""
    path = write_layers(tmp_path / "layers.csv", [{**layer_row(PAIRS, dedup=False), **change}])
    with pytest.raises(InputError, match=message):
        read_measured_layers(path)


@pytest.mark.parametrize("column", ["hidden", "dedup", "tokens_per_rank", "pairs_01", "total_ms_rank1"])
def test_missing_columns(tmp_path: Path, column: str) -> None:
    """Every column that is needed is named when it is not there."""
    row = {name: value for name, value in layer_row(PAIRS, dedup=False).items() if name != column}
    with pytest.raises(InputError, match=r"column (\w+) is missing") as caught:
        read_measured_layers(write_layers(tmp_path / "layers.csv", [row]))
    # Without one pair of ranks' plain name all of them are looked for by the separated one.
    assert column.replace("pairs_01", "pairs") in str(caught.value)


def test_tokens_are_needed_where_rows_are_deduplicated(tmp_path: Path) -> None:
    """A missing column shows only in the row that needs it."""
    row = {
        name: value for name, value in layer_row(TOKENS, dedup=True).items() if not name.startswith("tokens_")
    }
    with pytest.raises(InputError, match="line 2: column tokens_0_0 is missing"):
        read_measured_layers(write_layers(tmp_path / "layers.csv", [{**row, "tokens_per_rank": 1000}]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "column total_ms_rank0 is missing"),
        (b"total_ms_rank0\n1\n", "total_ms_rank1 is missing; every rank's time is needed, of 2 ranks"),
        (b"hidden,hidden\n", "column 'hidden' is there twice"),
        (b'"a\n', "is no CSV of UTF-8 text"),
        (b"\xff\xfe", "is no CSV of UTF-8 text"),
    ],
)
def test_files_that_are_no_measured_layers(tmp_path: Path, text: bytes, message: str) -> None:
    """Foreign, truncated and empty files."""
    path = tmp_path / "layers.csv"
    path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        read_measured_layers(path)


def test_rows_of_another_length_and_none(tmp_path: Path) -> None:
    """A cut last row is noticed, and so is a header alone."""
    path = write_layers(tmp_path / "layers.csv", [layer_row(PAIRS, dedup=False)] * 2)
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(",")])
    with pytest.raises(InputError, match=r"line 3: \d+ values under \d+ columns"):
        read_measured_layers(path)
    path.write_text(whole.splitlines()[0])
    with pytest.raises(InputError, match="has no row below its header"):
        read_measured_layers(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_measured_layers(tmp_path / "none.csv")


def test_only_measured_curves_predict(tmp_path: Path) -> None:
    """Linear costs have no seconds; a file without any bandwidth says what it lacks."""
    layers = write_layers(tmp_path / "layers.csv", [layer_row(PAIRS, dedup=False)])
    path = tmp_path / "costs.json"
    path.write_text('{"kind": "linear", "pair_cost": 1}')
    with pytest.raises(InputError, match="holds no measured curves"):
        check_calibration(layers, path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 700), text=st.text(max_size=4))
def test_damaged_layers_are_read_or_refused_in_a_line(tmp_path: Path, at: int, text: str) -> None:
    """Whatever stands somewhere in the file, it is an input error of one line or a sound score."""
    path = write_layers(tmp_path / "layers.csv", [layer_row(PAIRS, dedup=False)])
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + text.encode("utf-8", "surrogatepass") + whole[at + 1 :])
    report, refused = attempt(path)
    assert (report is None) == bool(refused)
    assert refused.count("\n") <= text.count("\n")
    assert report is None or np.isfinite(report["median_error"])


def attempt(path: Path) -> tuple[Any, str]:
    """Return a report, or why there is none."""
    try:
        return score_layers(read_measured_layers(path), curves()), ""
    except InputError as exc:
        return None, str(exc)


def test_the_shape_in_the_file_is_the_one_predicted(tmp_path: Path) -> None:
    """Sizes come from the row, not from the label."""
    row = {**layer_row(PAIRS, dedup=False), "hidden": 2 * SHAPE.hidden_size}
    found = read_measured_layers(write_layers(tmp_path / "layers.csv", [row]))
    assert found[0].shape.hidden_size == 2000
    assert score_layers(found, curves())["median_bias"] > 0.2
