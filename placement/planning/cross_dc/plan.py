"""`plan_cross_dc`: domain sizes from the model, and from real routing who prefetches which expert.

Shape letters: L MoE layers, C data centres, E experts, W windows, G devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placement.errors import InputError
from placement.planning.cross_dc.closed_form import share_of_size
from placement.planning.cross_dc.even import EvenLoad, EvenTimes, best_sizes, even_times, size_curve
from placement.planning.cross_dc.homes import choose_homes
from placement.planning.cross_dc.relation import MessageCount, message_counts
from placement.planning.cross_dc.scale import DEFAULT_CENTRES, ScalePoint, scale_curve
from placement.planning.cross_dc.solve import CrossSolution, Effort, solve_cross
from placement.planning.cross_dc.traffic import CrossTraffic, Decision, FloatArray, stay_home, step_time
from placement.planning.cross_dc.uniform import UniformChoice, best_uniform

__all__ = ["CrossDcPlan", "Policy", "RoutedPlan", "plan_cross_dc", "plan_routed"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Policy:
    """One way to decide who travels, and what it costs.

    Parameters
    ----------
    name
        What reports call it.
    traffic
        What was planned for, with the policy's homes.
    decision
        Who serves whom.
    fitted_s
        Step time on the tokens that it was fitted to, seconds.
    held_out_s
        Mean step time of windows that no policy has seen, seconds; None without such.
    distinct_s
        Step time on the fitted tokens where a token travels once per data centre, seconds; None where the
        tokens are not known one by one.
    """

    name: str
    traffic: CrossTraffic
    decision: Decision
    fitted_s: float
    held_out_s: float | None = None
    distinct_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return its figures."""
        return {
            "name": self.name,
            "fitted_s": self.fitted_s,
            "held_out_s": self.held_out_s,
            "distinct_s": self.distinct_s,
            "copies": int(self.decision.copy_LCE.sum()),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedPlan:
    """Who prefetches what under real routing.

    Parameters
    ----------
    policies
        Plain expert parallelism, the best uniform domains, the program with the homes given, and where homes
        were chosen the best uniform domains and the program with those.
    uniform
        The best uniform domains with the homes given.
    solution
        Of the last policy, which is recommended.
    windows
        Windows that were held out.
    """

    policies: tuple[Policy, ...]
    uniform: UniformChoice
    solution: CrossSolution
    windows: int

    @property
    def chosen(self) -> Policy:
        """What is recommended."""
        return self.policies[-1]

    @property
    def copied_share_LC(self) -> FloatArray:
        """Share of the experts homed elsewhere that each data centre prefetches, ``[layers, centres]``."""
        traffic = self.chosen.traffic
        at_home = np.arange(traffic.num_centres)[None, :, None] == traffic.home_LE[:, None, :]
        remote_LC = (~at_home).sum(axis=2)
        return np.asarray(self.chosen.decision.copy_LCE.sum(axis=2) / np.maximum(remote_LC, 1))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan: who prefetches what by layer and data centre, and all figures."""
        chosen = self.chosen
        away_LCE = (chosen.decision.serve_LCE != chosen.traffic.home_LE[:, None, :]) & (
            chosen.decision.serve_LCE != np.arange(chosen.traffic.num_centres)[None, :, None]
        )
        return {
            "policies": [policy.to_dict() for policy in self.policies],
            "uniform_size": self.uniform.size,
            "uniform_same_offset": self.uniform.same_offset,
            "step_s": self.solution.step_s,
            "lower_bound_s": self.solution.lower_bound_s,
            "gap": self.solution.gap,
            "held_out_windows": self.windows,
            "home": chosen.traffic.home_LE.tolist(),
            "prefetch": [
                [np.nonzero(row)[0].tolist() for row in copies_CE] for copies_CE in chosen.decision.copy_LCE
            ],
            "served_elsewhere": [
                {
                    "layer": int(layer),
                    "from": int(centre),
                    "expert": int(expert),
                    "to": int(chosen.decision.serve_LCE[layer, centre, expert]),
                }
                for layer, centre, expert in np.argwhere(away_LCE)
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossDcPlan:
    """The answer of `plan_cross_dc`.

    Parameters
    ----------
    load
        One layer under even gating.
    plain, best, unlimited
        Times of plain expert parallelism, of the best domains, and of the best with memory for all.
    curves
        Times over the sizes of each level, the others at their best.
    messages
        Messages of each level under the best domains.
    scale
        Gains over the number of data centres.
    break_even_tokens
        From how many tokens on an expert is cheaper to fetch than to visit.
    routed
        The plan for real routing; None without any.
    centre_names
        What reports call the data centres.
    """

    load: EvenLoad
    plain: EvenTimes
    best: EvenTimes
    unlimited: EvenTimes
    curves: tuple[tuple[EvenTimes, ...], ...]
    messages: tuple[MessageCount, ...]
    scale: tuple[ScalePoint, ...]
    break_even_tokens: float
    routed: RoutedPlan | None
    centre_names: tuple[str, ...]

    @property
    def even_speed_up(self) -> float:
        """Gain of the best domains over plain expert parallelism under even gating."""
        return 1.0 if self.best.step_s == 0 else self.plain.step_s / self.best.step_s

    @property
    def unlimited_bytes(self) -> float:
        """Memory for gathered experts that the best domains of all take on each device, bytes."""
        return (math.prod(self.unlimited.sizes) - 1) * self.load.expert_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the machine-readable plan."""
        return {
            "format": "moe-placement-plan/1",
            "plan": "cross-dc",
            "break_even_tokens": self.break_even_tokens,
            "data_centres": list(self.centre_names),
            "even": {
                "levels": [
                    {
                        "name": level.name,
                        "size": level.size,
                        "bandwidth_bytes_per_s": level.bandwidth,
                        "latency_s": level.latency_s,
                        "domain": size,
                        "gather_s": gather_s,
                        "exchange_s": exchange_s,
                        "gather_messages": count.gather,
                        "exchange_messages": count.exchange,
                    }
                    for level, size, gather_s, exchange_s, count in zip(
                        self.load.levels,
                        self.best.sizes,
                        self.best.gather_s,
                        self.best.exchange_s,
                        self.messages,
                        strict=True,
                    )
                ],
                "step_s": self.best.step_s,
                "plain_step_s": self.plain.step_s,
                "lower_bound_s": self.best.step_s,
                "speed_up": self.even_speed_up,
                "exposed_gather_s": self.best.exposed_gather_s,
                "unlimited_memory": {
                    "domains": list(self.unlimited.sizes),
                    "step_s": self.unlimited.step_s,
                    "replica_bytes_per_device": self.unlimited_bytes,
                },
            },
            "scale": [
                {
                    "data_centres": point.centres,
                    "fixed_size": point.fixed_size,
                    "fixed_share": point.fixed_share,
                    "best": point.best,
                    "best_size": point.best_size,
                }
                for point in self.scale
            ],
            "routed": None if self.routed is None else self.routed.to_dict(),
        }


def plan_cross_dc(
    load: EvenLoad,
    *,
    break_even_tokens: float,
    routed: RoutedPlan | None = None,
    centre_names: Sequence[str] = (),
) -> CrossDcPlan:
    """Plan what travels between data centres: experts or tokens.

    Parameters
    ----------
    load
        One layer under even gating.
    break_even_tokens
        Of one expert and one token; see `closed_form.break_even_tokens`.
    routed
        The plan for real routing, of `plan_routed`.
    centre_names
        What reports call the data centres; by default their numbers.

    Raises
    ------
    InputError
        If the outermost level has a single member, or the names do not fit it.
    """
    outer = load.levels[0]
    if outer.size < 2:
        raise InputError(f"level {outer.name!r} has one member; between data centres there are at least 2")
    names = tuple(centre_names) or tuple(f"{outer.name} {index}" for index in range(outer.size))
    if len(names) != outer.size:
        raise InputError(f"{len(names)} names for {outer.size} data centres")
    best = best_sizes(load)
    return CrossDcPlan(
        load=load,
        plain=even_times(load, (1,) * len(load.levels)),
        best=best,
        unlimited=best_sizes(replace(load, replica_bytes=None)),
        curves=tuple(size_curve(load, best.sizes, level=index) for index in range(len(load.levels))),
        messages=message_counts(load.levels, best.sizes),
        scale=_scale(load, best.sizes[0]),
        break_even_tokens=break_even_tokens,
        routed=routed,
        centre_names=names,
    )


def _scale(load: EvenLoad, size: int) -> tuple[ScalePoint, ...]:
    """Return the gains over the usual numbers of data centres and those that whole domains form."""
    doubled = (size * 2**power for power in range(10))
    centres = {*DEFAULT_CENTRES, *(count for count in doubled if 2 <= count <= DEFAULT_CENTRES[-1])}
    share = share_of_size(load.levels[0].size, size)
    return scale_curve(load, size=size, share=share, centres=sorted(centres))


def plan_routed(
    traffic: CrossTraffic,
    *,
    held_out_WLCE: FloatArray | None = None,
    own_homes: bool = True,
    effort: Effort | None = None,
) -> RoutedPlan:
    """Decide for real routing who prefetches what, and where experts live.

    Parameters
    ----------
    traffic
        Routing to fit, links, memory, and homes to start from.
    held_out_WLCE
        Tokens of windows that only judge, scaled to a step, ``[windows, layers, centres, experts]``.
    own_homes
        Whether homes may be chosen; else they stay.
    effort
        How long to look.
    """
    uniform = best_uniform(traffic)
    solution = solve_cross(traffic, effort=effort)
    entries = [
        ("plain expert parallelism", traffic, stay_home(traffic)),
        (f"uniform domains of {uniform.size}", traffic, uniform.decision),
        ("program", traffic, solution.decision),
    ]
    if own_homes:
        moved, better = choose_homes(traffic, effort=effort)
        if better.step_s < solution.step_s:
            solution, again = better, best_uniform(moved)
            entries += [
                (f"uniform domains of {again.size}, homes chosen", moved, again.decision),
                ("program, homes chosen", moved, better.decision),
            ]
    policies = tuple(_policy(name, where, decision, held_out_WLCE) for name, where, decision in entries)
    windows = 0 if held_out_WLCE is None else len(held_out_WLCE)
    return RoutedPlan(policies=policies, uniform=uniform, solution=solution, windows=windows)


def _policy(name: str, traffic: CrossTraffic, decision: Decision, held_out_WLCE: FloatArray | None) -> Policy:
    held_out_s = None
    if held_out_WLCE is not None and len(held_out_WLCE):
        windows = (replace(traffic, tokens_LCE=tokens_LCE) for tokens_LCE in held_out_WLCE)
        held_out_s = float(np.mean([step_time(window, decision) for window in windows]))
    return Policy(
        name=name,
        traffic=traffic,
        decision=decision,
        fitted_s=step_time(traffic, decision),
        held_out_s=held_out_s,
    )
