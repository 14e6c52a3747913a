"""What the cost model asks of a calibration."""

from __future__ import annotations

from typing import Protocol

from placement.calibration.curve import PiecewiseLinear
from placement.devices import DeviceKind
from placement.model_shape import ModelShape
from placement.tier import Tier

__all__ = ["Calibration"]


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
