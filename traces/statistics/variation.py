r"""What makes loads uneven: the same experts all the time, others from window to window, or chance.

The relative load :math:`r_{we}` of an expert is its load over the mean expert's, 1 when even. Its mean square
distance from 1, over windows and experts, has three parts: that of the mean over windows (*steady*), what a
window of independent tokens would show by chance (*chance*), and the rest (*moving*). Only the first can be
balanced once for all.

Shape letters: W windows, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["LoadVariation", "load_variation"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadVariation:
    """How uneven each layer's loads are, and why.

    Parameters
    ----------
    relative_LE
        Load of each expert over its layer's mean, all windows together.
    busiest_WL
        Busiest expert's load over the mean, in every window.
    steady_L, moving_L, chance_L
        Parts of the mean square distance of the relative load from 1.
    """

    relative_LE: FloatArray
    busiest_WL: FloatArray
    steady_L: FloatArray
    moving_L: FloatArray
    chance_L: FloatArray

    @property
    def busiest(self) -> tuple[int, int]:
        """Layer and expert of the highest relative load, all windows together."""
        layer, expert = np.unravel_index(int(self.relative_LE.argmax()), self.relative_LE.shape)
        return int(layer), int(expert)

    @property
    def busiest_window(self) -> tuple[int, int]:
        """Window and layer in which the busiest expert stands out most."""
        window, layer = np.unravel_index(int(self.busiest_WL.argmax()), self.busiest_WL.shape)
        return int(window), int(layer)

    @property
    def moving_most(self) -> int:
        """Layer whose loads move most."""
        return int(self.moving_L.argmax())

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of all unevenness that are steady, moving and chance; together 1, or 0 where all is even."""
        parts = np.array([self.steady_L.sum(), self.moving_L.sum(), self.chance_L.sum()])
        steady, moving, chance = (parts / (parts.sum() or 1.0)).tolist()
        return steady, moving, chance

    def table(self) -> list[dict[str, float]]:
        """Return a row for each layer: relative loads of the busiest expert, and causes of unevenness."""
        whole_L = np.maximum(self.steady_L + self.moving_L + self.chance_L, np.finfo(np.float64).tiny)
        return [
            {
                "layer": layer,
                "busiest expert, all windows": float(self.relative_LE[layer].max()),
                "busiest expert of a window, mean": float(self.busiest_WL[:, layer].mean()),
                "stays": float(self.steady_L[layer] / whole_L[layer]),
                "moves": float(self.moving_L[layer] / whole_L[layer]),
                "chance": float(self.chance_L[layer] / whole_L[layer]),
            }
            for layer in range(len(self.relative_LE))
        ]


def load_variation(load_WLE: npt.ArrayLike) -> LoadVariation:
    """Divide the unevenness of loads into what stays, what moves and what chance makes.

    Parameters
    ----------
    load_WLE
        Token-expert pairs of windows of about equal size, ``[windows, layers, experts]``.

    Raises
    ------
    InputError
        If there is no window.
    """
    load = np.asarray(load_WLE)
    if load.ndim != 3 or 0 in load.shape:
        raise InputError(f"loads have shape {load.shape}, not [windows, layers, experts]")
    layers = [_of_layer(load[:, layer]) for layer in range(load.shape[1])]
    relative, busiest, parts = zip(*layers, strict=True)
    steady_L, moving_L, chance_L = np.array(parts).T
    return LoadVariation(
        relative_LE=np.stack(relative),
        busiest_WL=np.stack(busiest, axis=1),
        steady_L=steady_L,
        moving_L=moving_L,
        chance_L=chance_L,
    )


def _of_layer(load_WE: npt.NDArray[np.generic]) -> tuple[FloatArray, FloatArray, tuple[float, float, float]]:
    load = load_WE.astype(np.float64)
    num_windows, num_experts = load.shape
    total_W = load.sum(axis=1, keepdims=True)
    relative_WE = np.divide(num_experts * load, total_W, out=np.ones_like(load), where=total_W > 0)
    mean_E = num_experts * load.sum(axis=0) / (load.sum() or 1.0)
    whole = float(np.mean((relative_WE - 1) ** 2))
    # A count with mean m has about the variance m: of n pairs, each expert gets n / E of them.
    by_chance = min(whole, float(num_experts / max(1.0, total_W.mean())))
    steady = min(whole - by_chance, max(0.0, float(np.mean((mean_E - 1) ** 2)) - by_chance / num_windows))
    return mean_E, relative_WE.max(axis=1), (steady, whole - by_chance - steady, by_chance)
