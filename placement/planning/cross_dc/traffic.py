"""What data centres ask of each other's experts, and what a step takes once it is decided who travels.

For every layer, data centre c and expert e it is decided whether c prefetches a copy of e, or which holder of
e serves c's tokens. A data centre's link is full duplex, so sending and receiving go on at once and the
slower side counts; combine is the mirror image of dispatch:

    gather_c   = max(copies in, copies out) P / (CR B_c) + latency * peers,
    exchange_c = max(tokens in, tokens out) t / B_c      + latency * peers,
    T = sum over layers of  max over c of  [ sum over passes max(w Lat_PE, gather_c) + 2 passes exchange_c ],

where w is 1 forward and 2 backward. Copies come from the expert's home. Tokens are counted per token-expert
pair: a token for two experts of one data centre travels twice.

Shape letters: L MoE layers, C data centres (twice: first the one that asks, then the one that serves),
E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.planning.cross_dc.even import pass_weights

__all__ = ["CrossTraffic", "Decision", "LinkUse", "link_use", "stay_home", "step_time", "time_LC"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossTraffic:
    """Routing between data centres, and their links.

    Parameters
    ----------
    tokens_LCE
        Token-expert pairs per step from each data centre to each expert, ``[layers, centres, experts]``.
    home_LE
        Data centre where each expert lives, ``[layers, experts]``.
    bandwidth_C
        Of each data centre's link to the others, bytes per second and direction, ``[centres]``.
    token_bytes, expert_bytes
        Bytes of one token's activations, and of one expert as it is stored.
    pre_expert_s_L
        Forward computation before each layer's experts, seconds, ``[layers]``.
    compression
        Ratio by which an expert shrinks before it travels, 1 or more.
    latency_s
        Of one message, seconds.
    training
        Whether a backward pass follows.
    layer_copies, total_copies
        Copies that a data centre has room for in one layer, and over all layers; None for no limit.

    Raises
    ------
    InputError
        If shapes do not fit together or a figure is out of range.
    """

    tokens_LCE: FloatArray
    home_LE: IntArray
    bandwidth_C: FloatArray
    token_bytes: float
    expert_bytes: float
    pre_expert_s_L: FloatArray
    compression: float = 1.0
    latency_s: float = 0.0
    training: bool = False
    layer_copies: int | None = None
    total_copies: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("tokens_LCE", np.float64),
            ("home_LE", np.int64),
            ("bandwidth_C", np.float64),
            ("pre_expert_s_L", np.float64),
        ):
            array = np.array(getattr(self, name), dtype=kind)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        self._check_shapes()
        self._check_figures()

    def _check_shapes(self) -> None:
        if self.tokens_LCE.ndim != 3 or 0 in self.tokens_LCE.shape:
            raise InputError(f"tokens have shape {self.tokens_LCE.shape}, not [layers, centres, experts]")
        layers, centres, experts = self.tokens_LCE.shape
        wanted = {"home_LE": (layers, experts), "bandwidth_C": (centres,), "pre_expert_s_L": (layers,)}
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise InputError(f"{name} has shape {getattr(self, name).shape}, not {shape}")

    def _check_figures(self) -> None:
        if not (np.isfinite(self.tokens_LCE).all() and self.tokens_LCE.min() >= 0):
            raise InputError("tokens must be 0 or more")
        if self.home_LE.min() < 0 or self.home_LE.max() >= self.num_centres:
            raise InputError(f"homes must lie within 0..{self.num_centres - 1}")
        if not (np.isfinite(self.bandwidth_C).all() and self.bandwidth_C.min() > 0):
            centre = int(np.argmin(np.where(np.isfinite(self.bandwidth_C), self.bandwidth_C, -np.inf)))
            raise InputError(
                f"data centre {centre} has a link of {self.bandwidth_C[centre]} bytes/s: it is disconnected; "
                "give it a positive bandwidth or leave it out"
            )
        if not (np.isfinite(self.pre_expert_s_L).all() and self.pre_expert_s_L.min() >= 0):
            raise InputError("pre-expert times must be 0 or more")
        for name, least in (
            ("token_bytes", 0.0),
            ("expert_bytes", 0.0),
            ("compression", 1.0),
            ("latency_s", 0.0),
        ):
            if not least <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {least:g} or more")
        for name in ("layer_copies", "total_copies"):
            limit = getattr(self, name)
            if limit is not None and limit < 0:
                raise InputError(f"{name} is {limit}; it must be 0 or more")

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.tokens_LCE.shape[0])

    @property
    def num_centres(self) -> int:
        """Data centres."""
        return int(self.tokens_LCE.shape[1])

    @property
    def num_experts(self) -> int:
        """Experts of each layer."""
        return int(self.tokens_LCE.shape[2])

    @property
    def copy_s_C(self) -> FloatArray:
        """Time that one travelling expert takes on each link, seconds, ``[centres]``."""
        return np.asarray(self.expert_bytes / self.compression / self.bandwidth_C)

    @property
    def token_s_C(self) -> FloatArray:
        """Time that one travelling token takes on each link in one direction, seconds, ``[centres]``."""
        return np.asarray(self.token_bytes / self.bandwidth_C)

    @property
    def most_copies(self) -> int:
        """Copies that a data centre may have in one layer."""
        limits = [limit for limit in (self.layer_copies, self.total_copies) if limit is not None]
        return min([self.num_experts, *limits])

    def layer(self, layer: int, *, most_copies: int | None = None) -> CrossTraffic:
        """Return one layer alone, with at most `most_copies` copies per data centre (None: its limit)."""
        limit = self.most_copies if most_copies is None else min(most_copies, self.most_copies)
        return replace(
            self,
            tokens_LCE=self.tokens_LCE[layer : layer + 1],
            home_LE=self.home_LE[layer : layer + 1],
            pre_expert_s_L=self.pre_expert_s_L[layer : layer + 1],
            layer_copies=limit,
            total_copies=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """Who serves whom.

    Parameters
    ----------
    serve_LCE
        Data centre that serves each data centre's tokens for each expert, ``[layers, centres, experts]``.
    copy_LCE
        Where a copy is prefetched, same shape; never at the expert's home. Who serves must hold the expert.
    """

    serve_LCE: IntArray
    copy_LCE: BoolArray

    def __post_init__(self) -> None:
        for name, kind in (("serve_LCE", np.int64), ("copy_LCE", np.bool_)):
            array = np.array(getattr(self, name), dtype=kind)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @classmethod
    def stacked(cls, layers: list[Decision]) -> Decision:
        """Return the decisions of several layers as one."""
        return cls(
            serve_LCE=np.concatenate([layer.serve_LCE for layer in layers]),
            copy_LCE=np.concatenate([layer.copy_LCE for layer in layers]),
        )

    def fits(self, traffic: CrossTraffic) -> bool:
        """Return whether it keeps within the memory of every data centre."""
        copies_LC = self.copy_LCE.sum(axis=2)
        layer, total = traffic.layer_copies, traffic.total_copies
        return (layer is None or bool(copies_LC.max() <= layer)) and (
            total is None or bool(copies_LC.sum(axis=0).max() <= total)
        )

    def check(self, traffic: CrossTraffic) -> None:
        """Check that every server holds what it serves.

        Raises
        ------
        InputError
            If a shape is wrong, a home has a copy of its own, or a data centre serves what it has not.
        """
        if (
            self.serve_LCE.shape != traffic.tokens_LCE.shape
            or self.copy_LCE.shape != traffic.tokens_LCE.shape
        ):
            raise InputError(f"a decision of shape {self.serve_LCE.shape}, not {traffic.tokens_LCE.shape}")
        at_home = np.arange(traffic.num_centres)[None, :, None] == traffic.home_LE[:, None, :]
        if (self.copy_LCE & at_home).any():
            raise InputError("an expert's home needs no copy")
        held = np.take_along_axis(self.copy_LCE | at_home, self.serve_LCE, axis=1)
        if not held.all():
            layer, centre, expert = (int(i) for i in np.argwhere(~held)[0])
            raise InputError(
                f"layer {layer}: data centre {self.serve_LCE[layer, centre, expert]} serves expert {expert} "
                f"to {centre} without holding it"
            )


def stay_home(traffic: CrossTraffic) -> Decision:
    """Return plain expert parallelism: every token travels to its expert's home."""
    shape = traffic.tokens_LCE.shape
    return Decision(
        serve_LCE=np.broadcast_to(traffic.home_LE[:, None, :], shape),
        copy_LCE=np.zeros(shape, dtype=np.bool_),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinkUse:
    """What travels between data centres.

    Parameters
    ----------
    tokens_LCC
        Tokens that the first sends to the second per step, ``[layers, centres, centres]``.
    copies_LCC
        Experts that the first fetches from the second, same shape.
    """

    tokens_LCC: FloatArray
    copies_LCC: FloatArray


def link_use(traffic: CrossTraffic, decision: Decision) -> LinkUse:
    """Return what travels under a decision, token-expert pairs counted one by one."""
    layers, centres, _ = traffic.tokens_LCE.shape
    row = (np.arange(layers)[:, None] * centres + np.arange(centres))[:, :, None] * centres
    tokens = np.bincount((row + decision.serve_LCE).ravel(), traffic.tokens_LCE.ravel(), layers * centres**2)
    home = np.broadcast_to(traffic.home_LE[:, None, :], decision.copy_LCE.shape)
    copied = decision.copy_LCE.ravel().astype(np.float64)
    copies = np.bincount((row + home).ravel(), weights=copied, minlength=layers * centres**2)
    diagonal = np.eye(centres, dtype=np.bool_)
    tokens_LCC = np.where(diagonal, 0.0, tokens.reshape(layers, centres, centres))
    copies_LCC = np.asarray(copies, dtype=np.float64).reshape(layers, centres, centres)
    return LinkUse(tokens_LCC=tokens_LCC, copies_LCC=copies_LCC)


def time_LC(traffic: CrossTraffic, use: LinkUse) -> FloatArray:
    """Return how long each data centre's link and computation are busy, seconds, ``[layers, centres]``."""
    gather_LC = _slower_side(use.copies_LCC, traffic.copy_s_C, traffic.latency_s)
    exchange_LC = _slower_side(use.tokens_LCC, traffic.token_s_C, traffic.latency_s)
    weights = pass_weights(traffic.training)
    ready = [np.maximum(weight * traffic.pre_expert_s_L[:, None], gather_LC) for weight in weights]
    return np.asarray(sum(ready) + 2 * len(weights) * exchange_LC)


def _slower_side(amount_LCC: FloatArray, unit_s_C: FloatArray, latency_s: float) -> FloatArray:
    received, sent = (
        amount_LCC.sum(axis=axis) * unit_s_C + latency_s * (amount_LCC > 0).sum(axis=axis) for axis in (1, 2)
    )
    return np.asarray(np.maximum(received, sent))


def step_time(traffic: CrossTraffic, decision: Decision) -> float:
    """Return the time of all layers, seconds: in each the data centre that takes longest."""
    return float(time_LC(traffic, link_use(traffic, decision)).max(axis=1).sum())
