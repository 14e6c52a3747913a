"""Reads expert counts as SGLang gives them in JSON: ``{"logical_count": [layers][experts]}``, or by step.

All decoder layers are listed; dense ones count nothing and are dropped. SGLang's files do not say how many
experts a token selects: that is the model's to tell. Files that the service makes of load windows say so
themselves, as ``top_k``, beside the ``model_name``.
Shape letters: W windows (steps), L layers, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.counts import ExpertCounts, drop_dense_layers
from traces.files import reading
from traces.importers.json_file import json_head, load_json
from traces.importers.shapes import likely_model, tell

if TYPE_CHECKING:
    from placement.model_shape import ModelShape
    from traces.readers import ReadOptions

__all__ = ["LIMIT_COUNTS", "check_counts", "expert_counts", "open", "sniff", "summed_steps"]

LIMIT_COUNTS = 1 << 26
"""Counts (windows x layers x experts) that are kept; neighbouring steps of longer recordings are summed."""

_HEAD_BYTES = 1 << 16
_KEY = re.compile(rb'"logical_count"\s*:\s*\[')
_LIMIT_EXACT = 2.0**53


def sniff(path: Path) -> bool:
    """Tell whether a JSON file counts experts under ``logical_count``."""
    return _KEY.search(json_head(path, _HEAD_BYTES)) is not None


def open(path: Path, options: ReadOptions) -> ExpertCounts:
    """Read the counts.

    Raises
    ------
    InputError
        If the file is no valid JSON, counts are not whole numbers from 0, layers are not the model's, or no
        model is named and none is known by its shape.
    """
    with reading(path):
        content = load_json(path)
        if not isinstance(content, Mapping) or "logical_count" not in content:
            raise InputError("has no logical_count; it is no file of SGLang's expert counts")
        load_WLE = _whole_numbers(content["logical_count"])
        if options.model is None and type(content.get("top_k")) is int:
            name = content.get("model_name")
            check_counts(load_WLE)
            return ExpertCounts(
                load_WLE=summed_steps(load_WLE),
                top_k=content["top_k"],
                model_name=name if isinstance(name, str) else None,
                moe_layer_ids=_layer_ids(content.get("moe_layer_ids")),
            )
        return expert_counts(load_WLE, options.model)


def expert_counts(load_WLE: npt.NDArray[Any], model: ModelShape | None) -> ExpertCounts:
    """Return counts of all decoder layers, or of the MoE layers, as counts of a model's MoE layers.

    Parameters
    ----------
    load_WLE
        Integers, ``[windows, layers, experts]``, layers as an engine lists them.
    model
        The model; `None` to find it by the shape of the counts among the presets.

    Raises
    ------
    InputError
        If the counts are not the model's, or no model is known; negative counts that wrapped around are
        named as such.
    """
    if load_WLE.ndim != 3 or 0 in load_WLE.shape:
        raise InputError(f"counts have shape {list(load_WLE.shape)}, not [steps, layers, experts]")
    check_counts(load_WLE)
    load_WLE = summed_steps(load_WLE)
    num_layers, num_experts = load_WLE.shape[1:]
    known = likely_model(num_layers=num_layers, num_experts=num_experts) if model is None else model
    if known is None:
        raise InputError(
            f"counts {num_layers} layers of {num_experts} experts, which no known model has alone, and does "
            "not say how many experts a token selects; name the model with --model"
        )
    if known.num_experts != num_experts:
        raise InputError(
            f"counts {num_experts} experts, {known.name} has {known.num_experts}; name the right model with "
            "--model"
        )
    load_WLE, layer_ids = drop_dense_layers(
        load_WLE, moe_layer_ids=known.moe_layer_ids or None, num_decoder_layers=known.num_decoder_layers
    )
    counts = ExpertCounts(
        load_WLE=load_WLE, top_k=known.top_k, model_name=known.name, moe_layer_ids=layer_ids
    )
    if model is None:
        tell(f"assuming {known.name}, which has {num_layers} layers of {num_experts} experts")
    return counts


def summed_steps(load_WLE: npt.NDArray[Any], *, share: float = 1.0) -> npt.NDArray[Any]:
    """Drop steps that routed nothing, and sum neighbouring ones where there are more than can be kept.

    Parameters
    ----------
    load_WLE
        Counts by step, integers.
    share
        Part of `LIMIT_COUNTS` that they may take.
    """
    busy_W = load_WLE.any(axis=(1, 2))
    # Buffers are longer than what was recorded.
    load_WLE = load_WLE[busy_W] if busy_W.any() else load_WLE[:1]
    most_windows = max(int(LIMIT_COUNTS * share) // max(load_WLE[0].size, 1), 1)
    steps = -(-len(load_WLE) // most_windows)
    if steps < 2:
        return load_WLE
    first = np.arange(0, len(load_WLE), steps)
    return np.asarray(np.add.reduceat(load_WLE, first, axis=0, dtype=np.int64))


def check_counts(load_WLE: npt.NDArray[Any]) -> None:
    """Refuse negative counts, and say where they come from.

    Raises
    ------
    InputError
        With the first of the least counts.
    """
    least = int(load_WLE.min())
    if least < 0:
        step, layer, expert = (int(i) for i in np.unravel_index(int(load_WLE.argmin()), load_WLE.shape))
        wrapped = "; counts of 32 bits wrap around past 2^31: dump more often" if least < -(2**16) else ""
        raise InputError(
            f"the count of step {step} layer {layer} expert {expert} is {least}; counts are not negative"
            f"{wrapped}"
        )


def _layer_ids(value: Any) -> tuple[int, ...] | None:
    """Return the decoder layers that a file names, if it names any."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        raise InputError(f"moe_layer_ids is {str(value)[:60]}, not a list of decoder layers")
    return tuple(value)


def _whole_numbers(value: Any) -> npt.NDArray[Any]:
    """Return nested lists as integers ``[steps, layers, experts]``; whole floats count as integers."""
    try:
        count = np.array(value)
    except (ValueError, OverflowError) as exc:
        raise InputError("logical_count has rows of different lengths") from exc
    if count.dtype.kind not in "iuf" or count.ndim < 2 or not count.size:
        raise InputError(
            f"logical_count is {count.dtype} {list(count.shape)}, not numbers [layers][experts] or "
            "[steps][layers][experts]"
        )
    if count.dtype.kind == "f":
        odd = (count != np.floor(count)) | (np.abs(count) > _LIMIT_EXACT)
        if odd.any():
            raise InputError(f"logical_count holds {count[odd][0]!s}, which is no whole number of pairs")
        count = count.astype(np.int64)
    return count.reshape(-1, *count.shape[-2:])
