"""What replicas buy: the same comparison with more and more spare slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from placement.comparison import Comparison, PolicyResult, compare
from placement.errors import InputError
from placement.problem import PlacementProblem, make_problem

__all__ = ["Replication", "compare_spare_slots", "spare_slot_steps"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replication:
    """Comparisons of the same policies on the same windows, by spare slots.

    Parameters
    ----------
    spare_slots
        Slots per layer beyond one per expert, over all devices, ascending.
    comparisons
        One for each.
    """

    spare_slots: tuple[int, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Policies that have an answer everywhere, in order."""
        answered = [{result.name for result in each.policies} for each in self.comparisons]
        first = self.comparisons[0].policies
        return tuple(result.name for result in first if all(result.name in names for names in answered))

    def results(self, name: str) -> tuple[PolicyResult, ...]:
        """Return a policy's results, by spare slots.

        Raises
        ------
        InputError
            If it has no answer somewhere.
        """
        return tuple(each.policy(name) for each in self.comparisons)


def spare_slot_steps(problem: PlacementProblem, *, most: int | None = None) -> tuple[int, ...]:
    """Return numbers of spare slots worth comparing: the fewest possible, then 1, 2, 4, ... more a device.

    Parameters
    ----------
    most
        Largest number; by default half as many as there are experts, and at least one more for every device.
    """
    devices, experts = problem.num_devices, problem.num_experts
    # Every device owns the same number of slots.
    least = -experts % devices
    wanted = max(devices, experts // 2 - least) if most is None else max(0, most - least)
    # A device holds an expert once, so that more slots than this stay empty.
    limit = min(wanted, experts * (devices - 1) - least) // devices
    more, steps = 1, [0]
    while more < limit:
        steps.append(more)
        more *= 2
    return tuple(least + step * devices for step in dict.fromkeys([*steps, limit]))


def compare_spare_slots(
    problem: PlacementProblem,
    *,
    spare_slots: Sequence[int] | None = None,
    only: Sequence[str] = ("eplb", "auto"),
    **options: Any,
) -> Replication:
    """Compare policies with several numbers of spare slots.

    Parameters
    ----------
    problem
        With the profile of all windows. Its own slots are not used.
    spare_slots
        Slots per layer beyond one per expert; by default `spare_slot_steps`.
    only
        Policies, ``auto`` among them.
    options
        As for `placement.compare`.

    Raises
    ------
    InputError
        If the topology names each device's slots, so that there are none to add, or as `compare`.
    InfeasibleError
        If memory does not hold the copies.
    """
    if problem.topology.slots_D is not None:
        raise InputError("the topology names each device's slots; leave them out to see what more would buy")
    steps = spare_slot_steps(problem) if spare_slots is None else sorted({int(n) for n in spare_slots})
    if not steps:
        raise InputError("there is no number of spare slots to compare; name at least one")
    compared = [compare(_with_spare_slots(problem, spare), only=only, **options) for spare in steps]
    return Replication(spare_slots=tuple(steps), comparisons=tuple(compared))


def _with_spare_slots(problem: PlacementProblem, spare_slots: int) -> PlacementProblem:
    return make_problem(
        problem.profile,
        problem.topology,
        model=problem.model,
        semantics=problem.semantics,
        objective=problem.objective,
        risk=problem.risk,
        calibration=problem.calibration,
        replica_split=problem.replica_split,
        max_imbalance=problem.max_imbalance,
        spare_slots=spare_slots,
    )
