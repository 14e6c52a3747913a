"""Curves measured on a machine: experts' grouped matrix products and all-to-alls, tier by tier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from placement.calibration.curve import PiecewiseLinear
from placement.calibration.data_sheet import DataSheetCalibration, needs_model
from placement.calibration.machine import Machine
from placement.devices import DeviceKind
from placement.errors import InputError
from placement.model_shape import ModelShape
from placement.tier import Tier

__all__ = ["NODE_TIER", "ExpertTimes", "MeasuredCalibration"]

NODE_TIER = "node"
"""Name of the innermost tier."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertTimes:
    """Measured experts of one model.

    Parameters
    ----------
    params_per_expert
        Weights of one expert; None where the file does not tell and no preset has the label.
    shares
        Shares of a rank's experts that had tokens, ascending.
    curves
        For each share, the seconds of one of those experts against its tokens.
    """

    params_per_expert: int | None
    shares: Sequence[float]
    curves: Sequence[PiecewiseLinear]

    def __post_init__(self) -> None:
        if not self.shares or len(self.shares) != len(self.curves):
            raise InputError(f"{len(self.shares)} shares of active experts and {len(self.curves)} curves")

    @property
    def busy(self) -> PiecewiseLinear:
        """Seconds of one expert against its tokens, all experts of the rank having some."""
        return self.curves[-1]

    def seconds(self, tokens: float, *, share: float) -> float:
        """Return the seconds of one active expert, between the shares that were measured."""
        values = [float(curve(tokens)) for curve in self.curves]
        return float(np.interp(share, self.shares, values))


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredCalibration:
    """Curves measured on a machine.

    Parameters
    ----------
    experts
        For each measured model, the times of its experts.
    node_exchange
        Time of an all-to-all inside a node against the bytes that a device receives from others.
    tier_exchange
        The same over other tiers, by name, as far as they were measured.
    world_size
        Ranks that took part.
    machine
        Memory, rows and host of the measured machine.
    data_sheet
        Serves what was not measured (other tiers).
    """

    experts: Mapping[str, ExpertTimes]
    node_exchange: PiecewiseLinear
    tier_exchange: Mapping[str, PiecewiseLinear] = field(default_factory=dict)
    world_size: int = 2
    machine: Machine = field(default_factory=Machine)
    data_sheet: DataSheetCalibration = field(default_factory=DataSheetCalibration)

    @property
    def gpu(self) -> str:
        """Name of the measured GPU."""
        return self.machine.gpu

    @property
    def unit(self) -> str:
        """Unit of the costs."""
        return "s"

    @property
    def flat(self) -> bool:
        """Exchanges follow the tiers."""
        return False

    def nearest_experts(self, model: ModelShape) -> tuple[ExpertTimes, float]:
        """Return the measured experts nearest in size, and how much larger the model's are.

        Weight reads and FLOPs per token are both proportional to the parameters.

        Raises
        ------
        InputError
            If the sizes of no measured model are known.
        """
        sized = {
            name: times.params_per_expert
            for name, times in self.experts.items()
            if times.params_per_expert is not None
        }
        if not sized:
            raise InputError(f"the sizes of {', '.join(self.experts)} are not known: give expert_shapes")

        def distance(name: str) -> tuple[float, bool]:
            return abs(math.log(sized[name] / model.params_per_expert)), name != model.name

        nearest = min(sized, key=distance)
        return self.experts[nearest], model.params_per_expert / sized[nearest]

    def expert_curve(self, kind: DeviceKind, model: ModelShape | None) -> PiecewiseLinear:
        """Return the curve of the measured model nearest in size, scaled by parameters per expert."""
        times, scale = self.nearest_experts(needs_model(model))
        return times.busy.scaled(y=scale)

    def exchange_curve(self, tier: Tier, model: ModelShape | None, *, phase: str) -> PiecewiseLinear:
        """Return the measured curve of a tier, the data sheet's where there is none."""
        shape = needs_model(model)
        curve = self.node_exchange if tier.name == NODE_TIER else self.tier_exchange.get(tier.name)
        if curve is None:
            return self.data_sheet.exchange_curve(tier, model, phase=phase)
        sheet = self.data_sheet
        dtype = sheet.dispatch_dtype if phase == "dispatch" else sheet.combine_dtype
        return curve.scaled(x=1.0 / shape.token_bytes(dtype), y=1.0 - sheet.overlap)
