"""Costs from the data sheet, where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.calibration.curve import PiecewiseLinear
from placement.devices import DeviceKind
from placement.errors import InputError
from placement.model_shape import ModelShape, canonical_dtype
from placement.tier import Tier

__all__ = ["KERNEL_BANDWIDTH_EFFICIENCY", "DataSheetCalibration", "needs_model"]

KERNEL_BANDWIDTH_EFFICIENCY = 0.8
"""Share of the data-sheet memory bandwidth that kernels reach when they stream weights."""


def needs_model(model: ModelShape | None) -> ModelShape:
    """Return the model.

    Raises
    ------
    InputError
        If it is None: costs in seconds need its sizes.
    """
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
        shape = needs_model(model)
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
        shape = needs_model(model)
        dtype = self.dispatch_dtype if phase == "dispatch" else self.combine_dtype
        slope = shape.token_bytes(dtype) / float(tier.effective_bandwidth_D.max())
        exposed = 1.0 - self.overlap
        return PiecewiseLinear.line(intercept=exposed * tier.latency_s, slope=exposed * slope)
