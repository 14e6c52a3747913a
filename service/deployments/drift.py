r"""Drift: by how much a placement does worse than it promised, and whether traffic has really changed.

Two figures are taken from the latest complete windows, both of logical loads, so that it does not matter
which placement ran when a window was counted:

*excess*
    Balance (mean over windows and layers of fullest / mean device load, by the cost model) over the
    *reference*, less 1. The reference is what was predicted when the placement was promoted; where nothing
    was predicted, the least balance that the placement's hottest experts allow. It is never below what
    sampling noise alone would cost a perfectly even placement (with :math:`m` pairs on the mean of :math:`D`
    devices, :math:`1 + z_D \sqrt{(1 - 1/D) / m}`, where :math:`z_D` is the expected maximum of :math:`D`
    standard normals), nor below what the last refresh in vain could attain.

*shift*
    Total variation distance between the expert shares of these windows and those that the placement was
    fitted to, mean over layers, less what sampling noise explains: half the sum over experts of
    :math:`\sqrt{2 / \pi} \sqrt{\varphi p (1 - p) (1/n_1 + 1/n_2)}` for counts :math:`n_1, n_2`, where
    :math:`\varphi` says how much more than independent draws the windows vary among themselves (bursts), with
    half as much again for certainty. 0 means: the same traffic, as far as one can tell.

A refresh is due when the excess passes the policy's threshold and the shift is not 0. The excess alone says
how much a change hurts: traffic may shift between experts of one device, which costs nothing, so the shift
alone starts no solve. But the excess alone may come from windows of another size than those of the trace that
was fitted (smaller ones are noisier), and then no other placement would do better: without a shift nothing
starts. Where it is not known what a placement was fitted to, the excess decides alone, and the refresh is
judged on windows that it was not fitted to before anything changes.

Shape letters: W windows, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Drift", "dispersion_L", "measure_drift", "noise_balance", "shift_of", "total_variation_L"]

FloatArray = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

CERTAINTY = 1.5
"""How much of the expected noise a distance must exceed to count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What recent windows say of a placement.

    Parameters
    ----------
    balance
        On the recent windows.
    reference
        What is expected; see the module.
    excess
        ``balance / reference - 1``.
    shift, distance, noise
        Distance to the loads that were fitted beyond noise; the whole distance, and the noise; None where it
        is not known what was fitted.
    windows
        Windows that it was measured on.
    """

    balance: float
    reference: float
    reference_of: str
    excess: float
    shift: float | None
    distance: float | None
    noise: float | None
    windows: int

    def is_due(self, threshold: float) -> bool:
        """Tell whether a refresh is due."""
        return self.excess > threshold and (self.shift is None or self.shift > 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def measure_drift(
    *,
    balance: float,
    floor: float,
    noise_floor: float,
    predicted: float | None,
    attainable: float | None,
    recent_WLE: Array,
    fitted_LE: Array | None,
) -> Drift:
    """Put the figures together.

    Parameters
    ----------
    balance, floor
        Of the placement on the recent windows, and the least that its replicas allow.
    noise_floor
        As of `noise_balance`.
    predicted
        Balance that was predicted for the placement.
    attainable
        Balance that the last refresh in vain could reach.
    recent_WLE, fitted_LE
        Loads of the recent windows, and those fitted where they are known.
    """
    reference, source = (floor, "floor") if predicted is None else (predicted, "predicted")
    for value, name in ((noise_floor, "noise"), (attainable, "attainable")):
        if value is not None and value > reference:
            reference, source = value, name
    shift = distance = noise = None
    if fitted_LE is not None:
        shift, distance, noise = shift_of(recent_WLE, fitted_LE)
    return Drift(
        balance=balance,
        reference=reference,
        reference_of=source,
        excess=balance / reference - 1,
        shift=shift,
        distance=distance,
        noise=noise,
        windows=len(recent_WLE),
    )


def noise_balance(load_WLE: Array, num_devices: int) -> float:
    """Return the balance that sampling noise alone would give a perfectly even placement."""
    if num_devices < 2:
        return 1.0
    pairs_WL = np.asarray(load_WLE.sum(axis=2), dtype=np.float64)
    mean_WL = pairs_WL[pairs_WL > 0] / num_devices
    if not mean_WL.size:
        return 1.0
    fullest = NormalDist().inv_cdf((num_devices - 0.375) / (num_devices + 0.25))
    # The fullest device holds no more than all pairs.
    return float(np.minimum(1 + fullest * np.sqrt((1 - 1 / num_devices) / mean_WL), num_devices).mean())


def total_variation_L(one_LE: Array, other_LE: Array) -> FloatArray:
    """Half the L1 distance between the expert shares of each layer; 0 where one of both counts nothing."""
    one, other = _shares(one_LE), _shares(other_LE)
    known_L = (one.sum(axis=1) > 0) & (other.sum(axis=1) > 0)
    return np.asarray(np.where(known_L, 0.5 * np.abs(one - other).sum(axis=1), 0.0))


def dispersion_L(load_WLE: Array) -> FloatArray:
    """How much more the shares of windows vary than those of independent draws, per layer; 1 or more."""
    load_WLE = np.asarray(load_WLE, dtype=np.float64)
    pairs_WL = load_WLE.sum(axis=2)
    share_LE = _shares(load_WLE.sum(axis=0))
    if len(load_WLE) < 2:
        return np.ones(load_WLE.shape[1])
    expected_WLE = pairs_WL[:, :, None] * share_LE
    # Pearson's statistic over its degrees of freedom.
    squares_WLE = np.divide(
        (load_WLE - expected_WLE) ** 2, expected_WLE, out=np.zeros_like(load_WLE), where=expected_WLE > 0
    )
    freedom_L = (len(load_WLE) - 1) * np.maximum((share_LE > 0).sum(axis=1) - 1, 1)
    return np.asarray(np.maximum(squares_WLE.sum(axis=(0, 2)) / freedom_L, 1.0))


def shift_of(recent_WLE: Array, fitted_LE: Array) -> tuple[float, float, float]:
    """Return shift, distance and noise; see the module."""
    recent_LE = np.asarray(recent_WLE, dtype=np.float64).sum(axis=0)
    fitted_LE = np.asarray(fitted_LE, dtype=np.float64)
    distance_L = total_variation_L(recent_LE, fitted_LE)
    pairs_L = [np.maximum(load_LE.sum(axis=1), 1.0) for load_LE in (recent_LE, fitted_LE)]
    share_LE = _shares(_shares(recent_LE) + _shares(fitted_LE))
    variance_LE = share_LE * (1 - share_LE) * (1 / pairs_L[0] + 1 / pairs_L[1])[:, None]
    spread_L = np.sqrt(2 / math.pi * dispersion_L(recent_WLE))
    noise_L = 0.5 * spread_L * np.sqrt(variance_LE).sum(axis=1)
    distance, noise = float(distance_L.mean()), float(noise_L.mean())
    return max(0.0, distance - CERTAINTY * noise), distance, noise


def _shares(load_LE: Array) -> FloatArray:
    load = np.asarray(load_LE, dtype=np.float64)
    total = load.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(load, total, out=np.zeros_like(load), where=total > 0))
