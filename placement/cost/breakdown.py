"""What a placement costs, taken apart: per window, layer and device; experts, dispatch, combine.

Shape letters: W windows, L layers, D devices.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CostBreakdown", "Metrics", "ratio_to_mean"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Quality of a placement on some traffic, whatever the objective.

    Parameters
    ----------
    balance, balance_p95
        Mean and 95th percentile over windows and layers of fullest / mean device load (pairs).
    balance_floor
        The least that `balance` could be with the placement's replicas: a window's hottest expert.
    mean_traffic_balance
        Fullest / mean device of each layer's summed load, mean over layers.
    worst_layer_balance
        The same, of the worst layer.
    fanout
        Distinct devices that a token's experts sit on, mean over tokens and layers; None without tokens.
    node_fanout
        The same over nodes; None on one node.
    hops
        Share of tokens whose first expert sits on another device in the next layer; None without tokens.
    """

    balance: float
    balance_p95: float
    balance_floor: float
    mean_traffic_balance: float
    worst_layer_balance: float
    fanout: float | None
    node_fanout: float | None
    hops: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, those that do not apply left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True, eq=False)
class CostBreakdown:
    """Predicted cost of a placement on some traffic.

    Parameters
    ----------
    objective
        Value of the problem's objective, as `CostModel` computes it.
    unit
        Its unit.
    step_W
        Predicted step cost of each window, in `step_unit`; None for problems without costs.
    step_unit
        ``s``, or ``cost`` for a linear calibration.
    experts_WL, dispatch_WL, combine_WL
        Its parts, ``[windows, layers]``.
    load_WLD
        Token-expert pairs on each device, ``[windows, layers, devices]``.
    experts_LD
        Mean expert time of each device over windows, ``[layers, devices]``.
    received_LD
        Mean volume that each device receives over the innermost link, ``[layers, devices]``, in tokens.
    fullest_device_L
        Device that most often bounds the experts' phase, ``[layers]``.
    bottleneck_tier_L
        Tier that most often bounds the exchange, per layer; empty text where nothing is exchanged.
    metrics
        Quality figures.
    """

    objective: float
    unit: str
    step_unit: str
    experts_WL: FloatArray
    dispatch_WL: FloatArray
    combine_WL: FloatArray
    load_WLD: FloatArray
    experts_LD: FloatArray
    received_LD: FloatArray
    fullest_device_L: IntArray
    bottleneck_tier_L: tuple[str, ...]
    metrics: Metrics

    @property
    def step_W(self) -> FloatArray:
        """Predicted step cost of each window: the sum over layers and phases, ``[windows]``."""
        return np.asarray((self.experts_WL + self.dispatch_WL + self.combine_WL).sum(axis=1))

    @property
    def step(self) -> float:
        """Mean predicted step cost."""
        return float(self.step_W.mean())

    @property
    def balance_WL(self) -> FloatArray:
        """Fullest / mean device load in each window and layer; 1 where a layer saw no token."""
        return ratio_to_mean(self.load_WLD)

    def summary(self) -> dict[str, Any]:
        """Return the JSON form: totals, and one row per layer."""
        layers = [
            {
                "layer": layer,
                "experts": float(self.experts_WL[:, layer].mean()),
                "dispatch": float(self.dispatch_WL[:, layer].mean()),
                "combine": float(self.combine_WL[:, layer].mean()),
                "balance": float(self.balance_WL[:, layer].mean()),
                "fullest_device": int(self.fullest_device_L[layer]),
                "bottleneck_tier": self.bottleneck_tier_L[layer],
            }
            for layer in range(self.experts_WL.shape[1])
        ]
        return {
            "unit": self.step_unit,
            "step": self.step,
            "experts": float(self.experts_WL.sum(axis=1).mean()),
            "dispatch": float(self.dispatch_WL.sum(axis=1).mean()),
            "combine": float(self.combine_WL.sum(axis=1).mean()),
            "layers": layers,
        }


def ratio_to_mean(load: FloatArray) -> FloatArray:
    """Return max / mean over the last axis, 1 where the mean is 0."""
    mean = load.mean(axis=-1)
    ratio = np.ones_like(mean)
    return np.asarray(np.divide(load.max(axis=-1), mean, out=ratio, where=mean > 0))
