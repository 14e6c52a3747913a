"""Holds predicted layer times against measured ones, as ``calibrate --check`` reports it.

What is compared is the time of a whole layer on the slowest rank. Nothing is fitted to the measured layers:
the prediction knows the counts of each row, the sizes of the model and the calibration file.

Shape letters: N measured layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.calibration import Calibration, MeasuredCalibration, read_calibration
from placement.cost.layer_time import PHASES, LayerTime, predict_layer
from placement.errors import InputError
from placement.tasks.measured_layers import MeasuredLayer, read_measured_layers

__all__ = ["check_calibration", "score_layers"]

FloatArray = npt.NDArray[np.float64]

COMPARED = "whole layer on the slowest rank (largest total_ms_rank*)"

_WHOLE = 6
"""Digits of a reported figure."""

_EXCHANGES = frozenset({"dispatch", "combine"})


def check_calibration(measured: str | Path, calibration: str | Path) -> dict[str, Any]:
    """Predict the layers of a CSV from a calibration file and return how far off the predictions are.

    Raises
    ------
    InputError
        If a file cannot be read, or `calibration` is not one of measured curves.
    """
    layers = read_measured_layers(measured)
    shapes = {layer.label: layer.shape for layer in layers if layer.label}
    curves = _measured_curves(read_calibration(calibration, shapes=shapes), calibration)
    try:
        return score_layers(layers, curves)
    except InputError as exc:
        raise InputError(f"calibration {calibration}: {exc}") from exc


def _measured_curves(calibration: Calibration, source: str | Path) -> MeasuredCalibration:
    if isinstance(calibration, MeasuredCalibration):
        return calibration
    raise InputError(
        f"calibration {source} holds no measured curves, so no layer's time follows from it; "
        "write one with: torchrun ... -m placement.cli calibrate"
    )


def score_layers(layers: Sequence[MeasuredLayer], calibration: MeasuredCalibration) -> dict[str, Any]:
    """Return the errors of predicted layer times: ``|predicted - measured| / measured``.

    Parameters
    ----------
    layers
        At least one.

    Raises
    ------
    InputError
        If a layer cannot be predicted from the calibration.
    """
    predicted = [predict_layer(layer.shape, layer.counts, calibration, dedup=layer.dedup) for layer in layers]
    predicted_N = np.array([1e3 * time.total_s for time in predicted])
    measured_N = np.array([float(layer.total_ms_R.max()) for layer in layers])
    return {
        **_errors(predicted_N, measured_N),
        "layers": len(layers),
        "compared": COMPARED,
        "gpu": calibration.gpu,
        "world_size": {"calibration": calibration.world_size, "measured": layers[0].counts.num_ranks},
        "row_bandwidth_gb_s": round(calibration.machine.row_bytes_per_s / 1e9, 1),
        "groups": _groups(layers, predicted_N, measured_N),
        "phases": _phases(layers, predicted),
    }


def _errors(predicted_N: FloatArray, measured_N: FloatArray) -> dict[str, float]:
    """Median and 95th percentile of the errors, and the median's sign: above 0 predictions are too long."""
    relative_N = predicted_N / measured_N - 1.0
    return {
        "median_error": round(float(np.median(np.abs(relative_N))), _WHOLE),
        "p95_error": round(float(np.percentile(np.abs(relative_N), 95)), _WHOLE),
        "median_bias": round(float(np.median(relative_N)), _WHOLE),
    }


def _groups(
    layers: Sequence[MeasuredLayer], predicted_N: FloatArray, measured_N: FloatArray
) -> list[dict[str, Any]]:
    found: dict[tuple[str, str, bool], list[int]] = {}
    for number, layer in enumerate(layers):
        found.setdefault((layer.transport, layer.label, layer.dedup), []).append(number)
    groups = []
    for (transport, label, dedup), index in found.items():
        groups.append(
            {
                "transport": transport,
                "shape": label,
                "dedup": int(dedup),
                "layers": len(index),
                **_errors(predicted_N[index], measured_N[index]),
                **_medians(predicted_N[index], measured_N[index]),
            }
        )
    return groups


def _medians(predicted_N: FloatArray, measured_N: FloatArray) -> dict[str, float]:
    return {
        "predicted_ms": round(float(np.median(predicted_N)), _WHOLE),
        "measured_ms": round(float(np.median(measured_N)), _WHOLE),
    }


def _phases(layers: Sequence[MeasuredLayer], predicted: Sequence[LayerTime]) -> dict[str, Any]:
    """Errors of each phase; an exchange is compared on the rank that came last to it and did not wait."""
    report = {}
    for phase in PHASES:
        here = [index for index, layer in enumerate(layers) if phase in layer.phase_ms_R]
        pick = np.min if phase in _EXCHANGES else np.max
        measured_N = np.array([float(pick(layers[index].phase_ms_R[phase])) for index in here])
        predicted_N = np.array([1e3 * predicted[index].phases()[phase] for index in here])
        known_N = measured_N > 0
        if known_N.any():
            report[phase] = {
                **_errors(predicted_N[known_N], measured_N[known_N]),
                **_medians(predicted_N[known_N], measured_N[known_N]),
                "compared": "shortest rank (nobody waited for)" if phase in _EXCHANGES else "slowest rank",
            }
    return report
