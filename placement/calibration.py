"""What compute and communication cost: linear weights, data sheets, or measured curves.

A calibration turns "so many tokens" into "so much time". The cost model asks it for one curve per device
kind (time of one expert against its tokens) and one per tier (time of an exchange against the bytes that
the busiest device receives); it knows nothing of placements.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from placement.devices import DeviceKind
from placement.errors import InputError
from placement.model import ModelShape, preset_model
from placement.model_shape import canonical_dtype
from placement.tier import Tier

__all__ = [
    "Calibration",
    "DataSheetCalibration",
    "LinearCalibration",
    "MeasuredCalibration",
    "PiecewiseLinear",
    "read_calibration",
]

FloatArray = npt.NDArray[np.float64]

KERNEL_BANDWIDTH_EFFICIENCY = 0.8
"""Share of the data-sheet memory bandwidth that kernels reach when they stream weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PiecewiseLinear:
    """A non-decreasing curve through given points, continued beyond the last with the last slope.

    Parameters
    ----------
    x, y
        Points, ``[points]``, at least two; `x` strictly ascending from 0.

    Raises
    ------
    InputError
        If the points are not finite, not ascending, or do not start at ``x = 0``.
    """

    x: FloatArray
    y: FloatArray

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.x.ndim != 1 or self.x.shape != self.y.shape or self.x.size < 2:
            raise InputError(f"a curve needs two points or more, not {self.x.shape} and {self.y.shape}")
        if not (np.isfinite(self.x).all() and np.isfinite(self.y).all()):
            raise InputError("a curve has a point that is not finite")
        if self.x[0] != 0 or (np.diff(self.x) <= 0).any():
            raise InputError(f"a curve's x must ascend from 0, not {self.x[:4].tolist()}")
        if self.y[0] < 0 or (np.diff(self.y) < 0).any():
            raise InputError("a curve must not fall and not start below 0")

    @classmethod
    def line(cls, *, intercept: float, slope: float) -> PiecewiseLinear:
        """Return ``intercept + slope * x``."""
        return cls(x=np.array([0.0, 1.0]), y=np.array([intercept, intercept + slope]))

    @property
    def last_slope(self) -> float:
        """Slope beyond the last point."""
        return float((self.y[-1] - self.y[-2]) / (self.x[-1] - self.x[-2]))

    def __call__(self, values: npt.ArrayLike) -> FloatArray:
        """Evaluate the curve at any non-negative values."""
        x = np.asarray(values, dtype=np.float64)
        beyond = np.maximum(x - self.x[-1], 0.0) * self.last_slope
        return np.asarray(np.interp(x, self.x, self.y) + beyond, dtype=np.float64)

    def scaled(self, *, x: float = 1.0, y: float = 1.0) -> PiecewiseLinear:
        """Return the curve of ``y * f(value / x)``."""
        return PiecewiseLinear(x=self.x * x, y=self.y * y)


class Calibration(Protocol):
    """What the cost model asks of a calibration."""

    @property
    def unit(self) -> str:
        """Unit of every cost: ``s``, or ``cost`` for abstract weights."""

    @property
    def flat(self) -> bool:
        """True if communication is charged per device regardless of tiers and homes."""

    def expert_curve(self, kind: DeviceKind, model: ModelShape | None) -> PiecewiseLinear:
        """Return the time of one expert on one device against its tokens; 0 at 0 tokens."""

    def exchange_curve(self, tier: Tier, model: ModelShape | None, *, phase: str) -> PiecewiseLinear:
        """Return the time of one exchange against tokens received by the busiest device of a tier.

        `phase` is ``dispatch`` or ``combine``.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCalibration:
    """Abstract weights: ``pair_cost`` per token-expert pair and ``token_cost`` per distinct token.

    The step costs, summed over layers, ``pair_cost`` times the pairs on the fullest device plus
    ``token_cost`` times the distinct tokens received by the fullest device.
    """

    pair_cost: float = 1.0
    token_cost: float = 0.0

    def __post_init__(self) -> None:
        for name in ("pair_cost", "token_cost"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value!r}; it must be a finite number, 0 or more")
        if self.pair_cost == 0 and self.token_cost == 0:
            raise InputError("pair_cost and token_cost are both 0: every placement would cost the same")

    @property
    def unit(self) -> str:
        """Unit of the costs."""
        return "cost"

    @property
    def flat(self) -> bool:
        """Tokens are charged per device, whatever the tiers."""
        return True

    def expert_curve(self, kind: DeviceKind, model: ModelShape | None) -> PiecewiseLinear:
        """Return ``pair_cost`` per token."""
        return PiecewiseLinear.line(intercept=0.0, slope=self.pair_cost)

    def exchange_curve(self, tier: Tier, model: ModelShape | None, *, phase: str) -> PiecewiseLinear:
        """Return ``token_cost`` per token, all of it in the dispatch."""
        return PiecewiseLinear.line(intercept=0.0, slope=self.token_cost if phase == "dispatch" else 0.0)


def _needs_model(model: ModelShape | None) -> ModelShape:
    if model is None:
        raise InputError(
            "step time needs the model's sizes: name it with --model, or use a linear calibration"
        )
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSheetCalibration:
    """Costs from the data sheet: a roofline for experts, latency + bytes / bandwidth for exchanges.

    One expert with n tokens takes ``max(n * FLOPs / FLOP/s, weight bytes / memory bandwidth)``: at a few
    tokens the weights are read whatever the load.

    Parameters
    ----------
    dispatch_dtype, combine_dtype
        Types in which hidden states travel.
    overlap
        Share of communication that the engine hides behind compute, in [0, 1).
    """

    dispatch_dtype: str = "bf16"
    combine_dtype: str = "bf16"
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap is {self.overlap}; it must lie in [0, 1)")
        for dtype in (self.dispatch_dtype, self.combine_dtype):
            canonical_dtype(dtype)

    @property
    def unit(self) -> str:
        """Unit of the costs."""
        return "s"

    @property
    def flat(self) -> bool:
        """Exchanges follow the tiers."""
        return False

    def expert_curve(self, kind: DeviceKind, model: ModelShape | None) -> PiecewiseLinear:
        """Return the roofline of one expert on one device."""
        shape = _needs_model(model)
        per_token_s = shape.flops_per_pair / kind.achieved_flops
        read_s = shape.bytes_per_expert() / (kind.memory_bandwidth * KERNEL_BANDWIDTH_EFFICIENCY)
        knee = read_s / per_token_s
        # Between no token and one the cost rises from nothing to a whole read of the weights.
        first = min(1.0, knee / 2)
        return PiecewiseLinear(
            x=np.array([0.0, first, knee, 2 * knee]), y=np.array([0.0, read_s, read_s, 2 * read_s])
        )

    def exchange_curve(self, tier: Tier, model: ModelShape | None, *, phase: str) -> PiecewiseLinear:
        """Return latency + bytes / bandwidth of the tier's best device."""
        shape = _needs_model(model)
        dtype = self.dispatch_dtype if phase == "dispatch" else self.combine_dtype
        slope = shape.token_bytes(dtype) / float(tier.effective_bandwidth_D.max())
        exposed = 1.0 - self.overlap
        return PiecewiseLinear.line(intercept=exposed * tier.latency_s, slope=exposed * slope)


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredCalibration:
    """Curves measured on a machine: grouped expert GEMMs and all-to-alls inside a node.

    Parameters
    ----------
    gpu
        Name of the measured GPU.
    expert_seconds
        For each measured model, the time of one expert against its tokens.
    node_exchange
        Time of an all-to-all inside a node against the bytes that a device receives from others.
    data_sheet
        Serves what was not measured (outer tiers).
    """

    gpu: str
    expert_seconds: Mapping[str, PiecewiseLinear]
    node_exchange: PiecewiseLinear
    data_sheet: DataSheetCalibration = DataSheetCalibration()

    @property
    def unit(self) -> str:
        """Unit of the costs."""
        return "s"

    @property
    def flat(self) -> bool:
        """Exchanges follow the tiers."""
        return False

    def expert_curve(self, kind: DeviceKind, model: ModelShape | None) -> PiecewiseLinear:
        """Return the curve of the measured model nearest in size, scaled by parameters per expert.

        Weight reads and FLOPs per token are both proportional to the parameters.
        """
        shape = _needs_model(model)
        params = {name: preset_model(_measured_model(name)).params_per_expert for name in self.expert_seconds}
        nearest = min(params, key=lambda name: abs(math.log(params[name] / shape.params_per_expert)))
        return self.expert_seconds[nearest].scaled(y=shape.params_per_expert / params[nearest])

    def exchange_curve(self, tier: Tier, model: ModelShape | None, *, phase: str) -> PiecewiseLinear:
        """Return the measured curve for the innermost tier, the data sheet's for the others."""
        shape = _needs_model(model)
        if tier.name != "node":
            return self.data_sheet.exchange_curve(tier, model, phase=phase)
        sheet = self.data_sheet
        dtype = sheet.dispatch_dtype if phase == "dispatch" else sheet.combine_dtype
        return self.node_exchange.scaled(x=1.0 / shape.token_bytes(dtype), y=1.0 - sheet.overlap)


def _measured_model(name: str) -> str:
    """Model whose expert sizes a measurement's label stands for."""
    return {"dsv3-slice": "deepseek-v3", "qwen3-30b": "qwen3-30b-a3b"}.get(name, name)


_MIB = 1024.0 * 1024.0


def _monotone(x: Sequence[float], y: Sequence[float], *, y_at_0: float | None) -> PiecewiseLinear:
    """Curve through measured points: sorted, noise that falls flattened, starting at x = 0."""
    order = np.argsort(np.asarray(x, dtype=np.float64))
    x_sorted, y_sorted = np.asarray(x, dtype=np.float64)[order], np.asarray(y, dtype=np.float64)[order]
    # A later, larger size that measured faster shows that the earlier time was noise.
    y_sorted = np.minimum.accumulate(y_sorted[::-1])[::-1]
    start = float(y_sorted[0]) if y_at_0 is None else y_at_0
    if x_sorted[0] > 0:
        x_sorted, y_sorted = np.append(0.0, x_sorted), np.append(start, y_sorted)
    return PiecewiseLinear(x=x_sorted, y=y_sorted)


def _expert_curve(points: Sequence[Mapping[str, float]]) -> PiecewiseLinear:
    tokens = [float(point["tokens_per_expert"]) for point in points]
    seconds = [1e-3 * float(point["ms"]) / float(point["local_experts"]) for point in points]
    return _monotone(tokens, seconds, y_at_0=0.0)


def _measured(values: Mapping[str, Any]) -> MeasuredCalibration:
    world = int(values["world_size"])
    if world < 2:
        raise InputError(f"world_size is {world}; an all-to-all is measured on 2 GPUs or more")
    curve = values["all_to_all_ms_by_MiB_sent_per_rank"]
    # An even all-to-all keeps 1 / world of each rank's buffer at home.
    received = [float(point[0]) * _MIB * (world - 1) / world for point in curve]
    seconds = [1e-3 * float(point[1]) for point in curve]
    experts = {str(name): _expert_curve(points) for name, points in values["expert_ffn_ms"].items()}
    if not experts:
        raise InputError("expert_ffn_ms names no model")
    for name in experts:
        preset_model(_measured_model(name))
    return MeasuredCalibration(
        gpu=str(values.get("gpu", "unknown GPU")),
        expert_seconds=experts,
        node_exchange=_monotone(received, seconds, y_at_0=None),
    )


_KINDS = ("linear", "data-sheet")


def calibration_from_dict(values: Mapping[str, Any]) -> Calibration:
    """Build a calibration from the contents of a calibration file.

    Raises
    ------
    InputError
        If keys are missing, unknown or of the wrong type.
    """
    options = {str(key): value for key, value in values.items() if key != "kind"}
    kind = values.get("kind", "measured" if "expert_ffn_ms" in values else None)
    try:
        if kind == "linear":
            return LinearCalibration(**options)
        if kind == "data-sheet":
            return DataSheetCalibration(**options)
        if kind == "measured":
            return _measured(values)
    except InputError:
        raise
    except KeyError as exc:
        raise InputError(f"key {exc} is missing") from exc
    except (TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as exc:
        raise InputError(f"a {kind} calibration cannot be read from it: {exc}") from exc
    raise InputError(
        f'neither "kind" ({" or ".join(_KINDS)}) nor measured curves ("expert_ffn_ms"); found '
        f"kind={kind!r} and keys {sorted(options)[:6]}"
    )


def read_calibration(path: str | Path) -> Calibration:
    """Read a calibration file (JSON).

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
        return calibration_from_dict(values)
    except InputError as exc:
        raise InputError(f"calibration {path}: {exc}") from exc
