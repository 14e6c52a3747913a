"""Reads calibration files: by their content linear weights, a data sheet's options or measured curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from placement._fields import brief
from placement.calibration.data_sheet import DataSheetCalibration
from placement.calibration.linear import LinearCalibration
from placement.calibration.measured_file import EXPERTS, FORMAT, measured_from_dict
from placement.calibration.protocol import Calibration
from placement.errors import InputError
from placement.model_shape import ModelShape

__all__ = ["calibration_from_dict", "read_calibration"]

_KINDS = ("linear", "data-sheet")


def calibration_from_dict(
    values: Mapping[str, Any], *, shapes: Mapping[str, ModelShape] | None = None
) -> Calibration:
    """Build a calibration from the contents of a calibration file.

    Parameters
    ----------
    values
        Contents of the file.
    shapes
        Sizes of measured models by label, for those that neither the file nor a preset describes.

    Raises
    ------
    InputError
        If keys are missing or wrong, or, but for measured curves, unknown.
    """
    options = {str(key): value for key, value in values.items() if key != "kind"}
    measured = EXPERTS in values or values.get("format") == FORMAT
    kind = values.get("kind", "measured" if measured else None)
    if kind == "measured":
        return measured_from_dict(values, shapes=shapes)
    try:
        if kind == "linear":
            return LinearCalibration(**options)
        if kind == "data-sheet":
            return DataSheetCalibration(**options)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise InputError(f"a {kind} calibration cannot be read from it: {exc}") from exc
    raise InputError(
        f'neither "kind" ({" or ".join(_KINDS)}) nor measured curves ("{EXPERTS}"); found '
        f"kind={brief(kind)} and keys {sorted(options)[:6]}"
    )


def read_calibration(path: str | Path, *, shapes: Mapping[str, ModelShape] | None = None) -> Calibration:
    """Read a calibration file (JSON).

    Parameters
    ----------
    shapes
        As for `calibration_from_dict`.

    Raises
    ------
    InputError
        If the file is missing, not JSON, or not a calibration.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise InputError(f"calibration {path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise InputError(f"calibration {path} is not JSON: {exc}") from exc
    except RecursionError as exc:
        raise InputError(f"calibration {path} is nested too deeply to be a calibration") from exc
    if not isinstance(values, dict):
        raise InputError(f"calibration {path} holds a {type(values).__name__}, not an object")
    try:
        return calibration_from_dict(values, shapes=shapes)
    except InputError as exc:
        raise InputError(f"calibration {path}: {exc}") from exc
