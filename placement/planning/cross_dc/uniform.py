"""Domains of one size for every layer and data centre: what HybridEP decides, under real routing.

Shape letters: L MoE layers, C data centres, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from placement.errors import InputError
from placement.planning.cross_dc.level import divisors
from placement.planning.cross_dc.traffic import CrossTraffic, Decision, step_time

__all__ = ["UniformChoice", "best_uniform", "contiguous_homes", "uniform_choices", "uniform_decision"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UniformChoice:
    """One domain size under real routing.

    Parameters
    ----------
    size
        Data centres of a domain.
    same_offset
        True where tokens go to their sender's counterpart in the expert's domain, as published; False where
        they go to the expert's home.
    decision
        Who serves whom.
    step_s
        Time of all layers, seconds.
    """

    size: int
    same_offset: bool
    decision: Decision
    step_s: float


def contiguous_homes(
    *, num_layers: int, num_centres: int, num_experts: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return homes in order, as evenly as the numbers allow, ``[layers, experts]``."""
    home_E = np.arange(num_experts, dtype=np.int64) * num_centres // num_experts
    return np.tile(home_E, (num_layers, 1))


def uniform_decision(traffic: CrossTraffic, size: int, *, same_offset: bool) -> Decision:
    """Return the decision of domains of `size` consecutive data centres: each fetches its domain's experts.

    Raises
    ------
    InputError
        If the size does not divide the number of data centres.
    """
    centres = traffic.num_centres
    if size < 1 or centres % size:
        raise InputError(f"domains of {size} do not fill {centres} data centres")
    home_LCE = np.broadcast_to(traffic.home_LE[:, None, :], traffic.tokens_LCE.shape)
    centre_LCE = np.broadcast_to(np.arange(centres)[None, :, None], home_LCE.shape)
    inside = home_LCE // size == centre_LCE // size
    away = home_LCE // size * size + centre_LCE % size if same_offset else home_LCE
    return Decision(serve_LCE=np.where(inside, centre_LCE, away), copy_LCE=inside & (home_LCE != centre_LCE))


def uniform_choices(traffic: CrossTraffic) -> Iterator[UniformChoice]:
    """Yield every size that fits the memory, under both rules of where tokens go; size 1 once."""
    for size in divisors(traffic.num_centres):
        for same_offset in (True, False) if size > 1 else (True,):
            decision = uniform_decision(traffic, size, same_offset=same_offset)
            if decision.fits(traffic):
                yield UniformChoice(
                    size=size,
                    same_offset=same_offset,
                    decision=decision,
                    step_s=step_time(traffic, decision),
                )


def best_uniform(traffic: CrossTraffic) -> UniformChoice:
    """Return the fastest size within memory; size 1, plain expert parallelism, always fits."""
    return min(uniform_choices(traffic), key=lambda choice: choice.step_s)
