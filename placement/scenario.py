"""What if the cluster were another one: the same traffic on it, ours against the engines' own policies.

Shape letters: W windows, D devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placement.comparison import Comparison, compare
from placement.errors import InputError
from placement.model import ModelShape
from placement.problem import PlacementProblem, make_problem
from placement.profile import RoutingProfile
from placement.topology import Topology, parse_topology

__all__ = [
    "POLICIES",
    "Scenario",
    "ScenarioScore",
    "even_spare_slots",
    "make_scenario",
    "most_and_least",
    "score_scenarios",
    "slower_links",
]

POLICIES = ("contiguous", "eplb", "auto")
"""The policies that scenarios are scored by: experts in order, DeepSeek's balancer, ours."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scenario:
    """A cluster to try, and its placement problem with the profile of all windows."""

    name: str
    problem: PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScenarioScore:
    """A scenario's policies, fitted on every other window and scored on the windows between."""

    name: str
    comparison: Comparison

    def step(self, policy: str = "auto") -> float:
        """Return the mean held-out step of a policy, in `step_unit`."""
        return self.comparison.policy(policy).held_out.step

    @property
    def step_unit(self) -> str:
        """Unit of steps."""
        return self.comparison.policy("auto").held_out.step_unit

    def saving(self, *, against: str = "eplb") -> float:
        """Return the share of another policy's mean held-out step that ours saves."""
        other = self.step(against)
        return 1.0 - self.step() / other if other > 0 else 0.0

    @property
    def better_share(self) -> float:
        """Share of held-out windows in which ours is faster than EPLB."""
        return self.comparison.better_share("auto", "eplb")

    def to_dict(self) -> dict[str, Any]:
        """Return a row of a table: names, held-out steps of the policies, savings and the gap of ours."""
        policies = [result.name for result in self.comparison.policies]
        return {
            "scenario": self.name,
            "devices": self.comparison.problem.num_devices,
            "slots": self.comparison.problem.num_slots,
            **{f"{policy} ({self.step_unit})": self.step(policy) for policy in policies},
            "saving against eplb": self.saving(),
            "windows faster": self.better_share,
            "gap": self.comparison.policy("auto").solution.gap,
        }


def even_spare_slots(num_experts: int, num_devices: int, *, least: int = 0) -> int:
    """Return the fewest slots beyond one per expert, and `least`, that give every device equally many."""
    return least + -(num_experts + least) % num_devices


def slower_links(topology: Topology, share: float) -> Topology:
    """Return a topology whose outermost tier has a share of its bandwidth; above 1 it is faster.

    Raises
    ------
    InputError
        If the share is not above 0.
    """
    if not (np.isfinite(share) and share > 0):
        raise InputError(f"the share of bandwidth is {share}; it must be finite and above 0")
    *inner, last = topology.tiers
    slow = replace(last, bandwidth_D=last.bandwidth_D * share)
    return replace(topology, name=f"{topology.name} at {share:g} of its bandwidth", tiers=(*inner, slow))


def make_scenario(
    name: str,
    profile: RoutingProfile,
    topology: Topology | str,
    *,
    model: ModelShape | None = None,
    spare_slots: int = 0,
    **options: Any,
) -> Scenario:
    """Put traffic on a cluster.

    Parameters
    ----------
    topology
        A topology, or its shorthand or file.
    spare_slots
        Slots per layer beyond one per expert, at least: more where devices would not have equally many.
    options
        As for `make_problem`.

    Raises
    ------
    InputError, InfeasibleError
        As `make_problem`.
    """
    place = parse_topology(topology) if isinstance(topology, str) else topology
    spare_slots = even_spare_slots(profile.num_experts, place.num_devices, least=spare_slots)
    problem = make_problem(profile, place, model=model, spare_slots=spare_slots, **options)
    return Scenario(name=name, problem=problem)


def score_scenarios(scenarios: Iterable[Scenario], **options: Any) -> tuple[ScenarioScore, ...]:
    """Score every scenario's policies on held-out windows.

    Parameters
    ----------
    options
        As for `compare`; by default the policies of `POLICIES`.

    Raises
    ------
    InputError, InfeasibleError, NoPlacementFoundError
        As `compare`.
    """
    chosen = {"only": POLICIES, **options}
    return tuple(
        ScenarioScore(name=scenario.name, comparison=compare(scenario.problem, **chosen))
        for scenario in scenarios
    )


def most_and_least(scores: Sequence[ScenarioScore]) -> tuple[ScenarioScore, ScenarioScore]:
    """Return the scenario in which ours saves most against EPLB, and that in which it saves least.

    Raises
    ------
    InputError
        If there is none.
    """
    if not scores:
        raise InputError("no scenario was scored")
    ordered = sorted(scores, key=lambda score: score.saving())
    return ordered[-1], ordered[0]
