"""The plan: circuits for every layer, when to change them, and what other fabrics would do and cost.

Shape letters: L layers, S servers, A all-to-alls, K sets of circuits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from placement.errors import InputError
from placement.planning.fabric.allocation import Allocation
from placement.planning.fabric.completion import FloatArray, IntArray
from placement.planning.fabric.prediction import Prediction
from placement.planning.fabric.prices import FabricKind
from placement.planning.fabric.region import FabricRegion
from placement.planning.fabric.schedule import Schedule

__all__ = ["FabricAnswer", "FabricPlan", "PlacementAnswer", "Timing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What surrounds the all-to-alls of a step.

    Parameters
    ----------
    window_s
        Compute before an all-to-all, which hides a change of circuits as far as it goes, seconds.
    training
        Whether a step goes back as well: four all-to-alls per layer, else two.
    paired
        Whether a pair's two directions share its links, as in MixNet's Algorithm 1; else links are full
        duplex and the busier direction counts.

    Raises
    ------
    InputError
        If the window is out of range.
    """

    window_s: float = 0.0
    training: bool = True
    paired: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite(self.window_s) and self.window_s >= 0):
            raise InputError(f"window_s is {self.window_s}; it must be finite and 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricAnswer:
    """A fabric's time and price.

    Parameters
    ----------
    kind
        Which fabric.
    step_s
        Compute windows, all-to-alls and exposed changes of one step, seconds; infinite where it cannot serve.
    all_to_all_s
        All-to-alls and exposed changes alone.
    dollars
        Network of the region's servers.
    """

    kind: FabricKind
    step_s: float
    all_to_all_s: float
    dollars: float

    @property
    def steps_per_dollar(self) -> float:
        """Steps per second and dollar."""
        return 0.0 if self.step_s == 0 else 1.0 / (self.step_s * self.dollars)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementAnswer:
    """What planning the placement together with the circuits gives.

    Parameters
    ----------
    device_LE
        Device of each expert, ``[layers, experts]``.
    time_s, held_out_s
        All-to-alls and fullest devices of one step, on fitted and on held-out windows, seconds.
    separate_s, separate_held_out_s
        The same for placements that were chosen first and given circuits afterwards, by name.
    """

    device_LE: IntArray
    time_s: float
    held_out_s: float
    separate_s: Mapping[str, float]
    separate_held_out_s: Mapping[str, float]

    @property
    def best_separate(self) -> str:
        """The best placement without regard to circuits."""
        return min(self.separate_s, key=lambda name: self.separate_s[name])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "device_of_expert": self.device_LE.tolist(),
            "time_s": self.time_s,
            "held_out_s": self.held_out_s,
            "separate_s": dict(self.separate_s),
            "separate_held_out_s": dict(self.separate_held_out_s),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FabricPlan:
    """Circuits for every layer and what they are worth.

    Parameters
    ----------
    region, timing, generation
        What was planned for; the generation of prices, Gb/s.
    demand_LSS
        Bytes of one all-to-all of each layer, ``[layers, servers, servers]``.
    static_SS
        Circuits for the mean demand, which are up at the start.
    allocations
        Circuits of each layer.
    schedule, always_keep_s, always_change_s
        When circuits change; the times of never changing and of changing at every layer, seconds.
    fabrics
        Other fabrics, and this one first.
    placement, prediction
        Answers for a trace; None for plain demand.
    notes
        What the reader must know of the input.
    """

    region: FabricRegion
    timing: Timing
    generation: int
    demand_LSS: FloatArray
    static_SS: IntArray
    allocations: tuple[Allocation, ...]
    schedule: Schedule
    always_keep_s: float
    always_change_s: float
    fabrics: tuple[FabricAnswer, ...]
    placement: PlacementAnswer | None = None
    prediction: Prediction | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.allocations)

    @property
    def time_s(self) -> float:
        """One all-to-all of every layer on circuits of its own, seconds."""
        return sum(allocation.time_s for allocation in self.allocations)

    @property
    def lower_bound_s(self) -> float:
        """No circuits are faster, layer by layer, seconds."""
        return sum(allocation.lower_bound_s for allocation in self.allocations)

    @property
    def published_s(self) -> float:
        """The same all-to-alls on MixNet's own circuits, seconds."""
        return sum(allocation.published_s for allocation in self.allocations)

    @property
    def gap(self) -> float:
        """Share of `time_s` that better circuits could save at most."""
        return 0.0 if self.time_s == 0 else (self.time_s - self.lower_bound_s) / self.time_s

    def fabric(self, kind: FabricKind) -> FabricAnswer:
        """Return one fabric's answer."""
        return next(answer for answer in self.fabrics if answer.kind is kind)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as strict JSON."""
        region, schedule = self.region, self.schedule
        return {
            "format": "moe-placement-plan/1",
            "plan": "fabric",
            "region": {
                "servers": region.num_servers,
                "ocs_ports": region.ocs_ports,
                "eps_ports": region.eps_ports,
                "link_gbits": region.link_gbits,
                "switch": region.switch.name,
                "switch_ports": region.switch.ports,
                "reconfiguration_s": region.switch.reconfiguration_s,
            },
            "timing": {
                "window_s": self.timing.window_s,
                "training": self.timing.training,
                "paired": self.timing.paired,
            },
            "time_s": self.time_s,
            "lower_bound_s": self.lower_bound_s,
            "gap": self.gap,
            "published_s": self.published_s,
            "static_circuits": self.static_SS.tolist(),
            "layers": [_layer(*pair) for pair in zip(self.allocations, self.demand_LSS, strict=True)],
            "schedule": {
                "circuits_of_layer": (schedule.up_A - 1).tolist(),
                "all_to_all_s": schedule.all_to_all_s,
                "exposed_s": schedule.exposed_s,
                "changes": schedule.num_changes,
                "always_keep_s": _finite(self.always_keep_s),
                "always_change_s": _finite(self.always_change_s),
            },
            "price_generation_gbits": self.generation,
            "fabrics": [_fabric(answer) for answer in self.fabrics],
            "placement": None if self.placement is None else self.placement.to_dict(),
            "prediction": None
            if self.prediction is None
            else {
                "wrong_share": self.prediction.error,
                "best": self.prediction.best,
                "held_out_windows": self.prediction.num_windows,
            },
            "notes": list(self.notes),
        }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _layer(allocation: Allocation, demand_SS: FloatArray) -> dict[str, Any]:
    return {
        "circuits": allocation.circuits_SS.tolist(),
        "split_bytes": allocation.split_SS.tolist(),
        "demand_bytes": demand_SS.tolist(),
        "time_s": allocation.time_s,
        "lower_bound_s": allocation.lower_bound_s,
        "method": allocation.method,
        "time_of_method_s": {name: _finite(t) for name, t in allocation.time_of_method_s.items()},
    }


def _fabric(answer: FabricAnswer) -> dict[str, Any]:
    return {
        "fabric": str(answer.kind),
        "step_s": _finite(answer.step_s),
        "all_to_all_s": _finite(answer.all_to_all_s),
        "dollars": answer.dollars,
        "steps_per_s_per_dollar": answer.steps_per_dollar,
    }
