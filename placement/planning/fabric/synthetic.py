"""Demand to try things on: log-normal bytes between servers, the same for the same seed.

Shape letters: L layers, S servers.
"""

from __future__ import annotations

import math

import numpy as np

from placement.errors import InputError
from placement.planning.fabric.completion import FloatArray

__all__ = ["synthetic_demand"]


def synthetic_demand(
    num_servers: int, *, skew: float, seed: int = 0, num_layers: int = 1, mean_bytes: float = 64e6
) -> FloatArray:
    """Draw what every server sends to every other, ``[layers, servers, servers]``.

    Parameters
    ----------
    skew
        Standard deviation of the logarithm; 0 for equal bytes.
    seed
        The same seed gives the same demand.
    num_layers
        Draws.
    mean_bytes
        Mean of the distribution.

    Raises
    ------
    InputError
        If a figure is out of range.
    """
    if not (math.isfinite(skew) and skew >= 0):
        raise InputError(f"skew is {skew}; it must be finite and 0 or more")
    if num_layers < 1 or not (math.isfinite(mean_bytes) and mean_bytes > 0):
        raise InputError(f"{num_layers} layers of {mean_bytes} bytes; both must be positive")
    random = np.random.default_rng(seed)
    size = (num_layers, num_servers, num_servers)
    demand_LSS = mean_bytes * random.lognormal(-(skew**2) / 2, skew, size)
    demand_LSS[:, np.arange(num_servers), np.arange(num_servers)] = 0.0
    return demand_LSS
