"""HybridEP's closed form on one level: which share of the chunks still travels as tokens.

Source: HybridEP (arXiv 2510.19470), section on the stream model. With p the share sent as tokens, G devices,
D token bytes and ``P_E`` expert bytes per device and links of B bytes/s:

- case 1, ``Lat_PE >= Lat_AG``: ``T = Lat_PE + 2 D (G-1) p / (G B)``, least for the smallest p;
- case 2, ``Lat_PE < Lat_AG``: ``T = p (G-1) (2 D - G P_E) / (B G) + (G-1) P_E / B``, least for
  - 2.1, ``2 D < G P_E``: the largest p, where ``p = 1 - B Lat_PE / (P_E (G-1))``;
  - 2.2, ``2 D >= G P_E``: p = 0.

Domains of S devices are ``p = (G - S) / (G - 1)``, so p = 1 is plain expert parallelism.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.errors import InputError
from placement.planning.cross_dc.even import EvenLoad
from placement.planning.cross_dc.level import Level

__all__ = ["BestShare", "best_share", "break_even_tokens", "share_of_size", "time_of_share"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestShare:
    """The share of chunks to send as tokens.

    Parameters
    ----------
    share
        p, in [0, 1]; no domain size need reach it.
    case
        ``1``, ``2.1`` or ``2.2`` of the paper: where the optimum lies.
    step_s
        Time at that share, forward pass, seconds.
    """

    share: float
    case: str
    step_s: float


def _only_level(load: EvenLoad) -> Level:
    if len(load.levels) != 1 or load.levels[0].size < 2:
        raise InputError(f"the closed form is for one level of 2 or more devices, not {load.levels}")
    return load.levels[0]


def share_of_size(num_devices: int, size: int) -> float:
    """Return p for domains of `size` devices: the share of the other devices reached by tokens."""
    return (num_devices - size) / (num_devices - 1)


def time_of_share(load: EvenLoad, share: float) -> float:
    """Return the forward time of one level with a share p of the chunks sent as tokens, seconds.

    Raises
    ------
    InputError
        If there are several levels, or the share is not in [0, 1].
    """
    level = _only_level(load)
    if not 0 <= share <= 1:
        raise InputError(f"the share is {share}; it must lie in [0, 1]")
    others, bandwidth = level.size - 1, level.bandwidth
    gather_s = (1 - share) * load.sent_expert_bytes * others / bandwidth
    if load.pre_expert_s >= gather_s:
        return load.pre_expert_s + 2 * load.data_bytes * others * share / (level.size * bandwidth)
    slope = others * (2 * load.data_bytes - level.size * load.sent_expert_bytes) / (bandwidth * level.size)
    return share * slope + others * load.sent_expert_bytes / bandwidth


def best_share(load: EvenLoad) -> BestShare:
    """Return the best share of one level; `even.best_sizes` finds what whole domains reach.

    Raises
    ------
    InputError
        If there are several levels.
    """
    level = _only_level(load)
    full_s = load.sent_expert_bytes * (level.size - 1) / level.bandwidth
    if load.pre_expert_s >= full_s:
        share, case = 0.0, "1"
    elif 2 * load.data_bytes >= level.size * load.sent_expert_bytes:
        share, case = 0.0, "2.2"
    else:
        share, case = 1.0 - load.pre_expert_s / full_s, "2.1"
    return BestShare(share=share, case=case, step_s=time_of_share(load, share))


def break_even_tokens(*, expert_bytes: float, token_bytes: float, compression: float = 1.0) -> float:
    """Return from how many tokens on an expert is cheaper to fetch than to visit.

    n tokens travel there and back, ``2 n`` times `token_bytes`; the expert once, ``expert_bytes / CR``. For
    gated bf16 experts (``6 d f`` bytes) and bf16 tokens (``2 d``) the hidden size d cancels:
    ``n = 1.5 f / CR``. Training doubles both sides (``8 d n`` against ``12 d f / CR``), so the answer stays.

    Raises
    ------
    InputError
        If a figure is not positive and finite.
    """
    for name, value in (
        ("expert_bytes", expert_bytes),
        ("token_bytes", token_bytes),
        ("compression", compression),
    ):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value}; it must be positive")
    return expert_bytes / (2 * token_bytes * compression)
