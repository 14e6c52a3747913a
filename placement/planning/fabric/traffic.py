"""From a placement to the bytes between servers: who sends tokens to whom in one layer.

A token lives on a device. In a layer it is sent once to every other server that holds one of its experts
(dispatch semantics with one copy per server, as in `placement.cost`), and its results come back the same way.

Shape letters: T tokens, K top-k, E experts, D devices, S servers, L layers, W windows, N swaps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from placement.errors import InputError
from placement.planning.fabric.completion import FloatArray, IntArray
from placement.problem import PlacementProblem
from placement.profile import RoutingProfile

__all__ = ["LayerTraffic", "RegionTraffic", "dealt_homes"]


def dealt_homes(profile: RoutingProfile, num_devices: int) -> IntArray:
    """Return a home for each token: its own, or tokens of a window dealt to devices in contiguous blocks."""
    window_T = profile.window_of_token_T
    if window_T is None:
        raise InputError("the trace has expert counts only; which server talks to which needs its tokens")
    size_W = np.bincount(window_T, minlength=profile.num_windows + 1)
    start_W = np.concatenate([[0], np.cumsum(size_W)[:-1]])
    place_T = np.arange(window_T.size) - start_W[window_T]
    dealt_T = place_T * num_devices // size_W[window_T]
    if profile.home_T is None:
        return np.asarray(dealt_T, dtype=np.int64)
    return np.asarray(np.where(profile.home_T < 0, dealt_T, profile.home_T), dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTraffic:
    """The tokens of one layer, as the fabric sees them.

    Parameters
    ----------
    has_TE
        Whether a token selects an expert, ``[tokens, experts]``, as floats for matrix products.
    home_T
        Server that each token lives on, ``[tokens]``, ascending.
    bytes_T
        Bytes that one copy of each (sampled) token stands for, ``[tokens]``.
    compute_DE
        Seconds that each expert takes on each device, ``[devices, experts]``.
    server_D
        Server of each device, ``[devices]``.
    """

    has_TE: FloatArray
    home_T: IntArray
    bytes_T: FloatArray
    compute_DE: FloatArray
    server_D: IntArray

    @property
    def num_servers(self) -> int:
        """Servers."""
        return int(self.server_D.max()) + 1

    def held_TS(self, device_E: IntArray) -> FloatArray:
        """Return how many of each token's experts each server holds, ``[tokens, servers]``."""
        holds_ES = np.zeros((device_E.size, self.num_servers))
        holds_ES[np.arange(device_E.size), self.server_D[device_E]] = 1.0
        return self.has_TE @ holds_ES

    def demand(self, device_E: IntArray) -> FloatArray:
        """Return the bytes dispatched from server to server, ``[servers, servers]``."""
        demand_SS = self.by_home(self.held_TS(device_E) > 0)
        np.fill_diagonal(demand_SS, 0.0)
        return demand_SS

    def by_home(self, counted_TX: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> FloatArray:
        """Return the bytes of the tokens that are counted, summed by home, ``[servers, ...]``."""
        first_S = np.searchsorted(self.home_T, np.arange(self.num_servers + 1))
        return np.stack(
            [self.bytes_T[start:end] @ counted_TX[start:end] for start, end in itertools.pairwise(first_S)]
        )

    def compute_D(self, device_E: IntArray) -> FloatArray:
        """Return the seconds that every device's experts take, ``[devices]``."""
        experts = np.arange(device_E.size)
        seconds_E = self.compute_DE[device_E, experts]
        return np.bincount(device_E, weights=seconds_E, minlength=self.server_D.size).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RegionTraffic:
    """Every layer's tokens on one region.

    Parameters
    ----------
    layers
        Layers in order.
    """

    layers: tuple[LayerTraffic, ...]

    @classmethod
    def of(cls, problem: PlacementProblem, profile: RoutingProfile, *, batch_tokens: float) -> RegionTraffic:
        """Return the mean traffic of a profile's windows, scaled to a batch.

        Parameters
        ----------
        problem
            Topology (a node is a server), model and calibration.
        profile
            Traffic; every window counts.
        batch_tokens
            Tokens of all devices together in one all-to-all.

        Raises
        ------
        InputError
            If the model's sizes are unknown or the trace has no tokens.
        """
        model, topology = problem.model, problem.topology
        if model is None or problem.calibration.flat:
            raise InputError("planning a fabric needs the model's sizes and costs in seconds; name a model")
        home_T = topology.node_of_device_D[dealt_homes(profile, topology.num_devices)]
        order = np.argsort(home_T, kind="stable")
        weight_T = profile.token_weight_T * (batch_tokens / float(profile.token_weight_T.sum()))
        mean_LE = profile.load_WLE.sum(axis=0) * (batch_tokens / float(profile.window_tokens_W.sum()))
        curves = [problem.calibration.expert_curve(kind, model) for kind in topology.kinds]
        assert profile.experts_TLK is not None  # dealt_homes has seen to it
        return cls(
            layers=tuple(
                LayerTraffic(
                    has_TE=_selections(profile.experts_TLK[order, layer], profile.num_experts),
                    home_T=home_T[order],
                    bytes_T=weight_T[order] * model.token_bytes(),
                    compute_DE=np.stack([curve(mean_LE[layer]) for curve in curves])[
                        topology.kind_of_device_D
                    ],
                    server_D=topology.node_of_device_D,
                )
                for layer in range(profile.num_layers)
            )
        )

    def demand(self, device_LE: IntArray) -> FloatArray:
        """Return the bytes dispatched in every layer, ``[layers, servers, servers]``."""
        pairs = zip(self.layers, device_LE, strict=True)
        return np.stack([layer.demand(device_E) for layer, device_E in pairs])


def _selections(
    experts_TK: np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]], num_experts: int
) -> FloatArray:
    has_TE = np.zeros((len(experts_TK), num_experts))
    has_TE[np.arange(len(experts_TK))[:, None], experts_TK.astype(np.int64)] = 1.0
    return has_TE
