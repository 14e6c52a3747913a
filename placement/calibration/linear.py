"""Abstract weights: a price for a token-expert pair and one for a token received."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.calibration.curve import PiecewiseLinear
from placement.devices import DeviceKind
from placement.errors import InputError
from placement.model_shape import ModelShape
from placement.tier import Tier

__all__ = ["LinearCalibration"]


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
