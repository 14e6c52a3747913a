"""How an expert's tokens are spread over its replicas in the engine that runs the placement.

A placement says where replicas are; which of them a token uses is the engine's choice, made in every step.
Replicas of an expert are numbered by slot, r of them. Of a token of the trace:

- ``hash``: replica ``h mod r`` for all of its experts, with ``h = 2654435769 * i mod 2**32`` and ``i`` its
  index in its batch, as vLLM's EPLB kernel has it (``eplb_map_to_physical_and_record``). The batch is the
  sampled tokens of its window that live on the same device, in recorded order: engines hash per rank.
- ``nearest``: the replica on its home device; else, among those on its home node if there are any, among all
  otherwise, replica ``home mod number of them``: a fixed choice that spreads the homes. SGLang's static
  dispatch prefers in this order. A token of unknown home uses every replica with probability ``1 / r``.
- ``lp``: in every window and layer the loads are split so that the fullest device is as light as can be (the
  linear programme of DeepSeek's LPLB), found by water-filling; then each token picks a replica for each of
  its experts with that split's shares, independently. Tokens of the trace's tail belong to no window and are
  spread evenly.

``even`` needs nothing of this; neither does a placement without replicas. Under sampled tokens the shares are
counted on the sample and applied to the exact loads; an expert that no sampled token of a window selects is
shared evenly there. Traffic is the expected number of groups that a token touches. Stay-put tokens keep their
own rule (stay where a replica is, else go to the first), whatever the split: it concerns loads alone there.

Shape letters: W windows, L layers, E experts, X most replicas of one expert, S slots, D devices, T tokens,
K top-k, H homes (row 0 unknown, 1 + device), R rows of shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.calibration import PiecewiseLinear
from placement.plan import EMPTY, Placement
from placement.problem import PlacementProblem, ReplicaSplit
from placement.profile import RoutingProfile

__all__ = [
    "LayerSplit",
    "Replicas",
    "SplitRule",
    "device_costs",
    "device_loads",
    "even_shares",
    "least_fullest_shares",
    "needs_split",
    "number_replicas",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

HASH_MULTIPLIER = 2654435769
"""2**32 over the golden ratio: Knuth's multiplicative hash."""

TOLERANCE = 1e-13
MOST_SWEEPS = 10_000
"""Water-filling ends when a sweep moves less than `TOLERANCE` mean device loads, or after so many sweeps."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replicas:
    """Where the replicas of one layer's experts are.

    Parameters
    ----------
    replica_EX
        Device of each replica, numbered by slot, ``[experts, most replicas]``, padded with -1.
    replicas_E
        Replicas of each expert, ``[experts]``.
    """

    replica_EX: IntArray
    replicas_E: IntArray


def number_replicas(row_S: IntArray, device_of_slot_S: IntArray, num_experts: int) -> Replicas:
    """Number the replicas of each expert by slot.

    Parameters
    ----------
    row_S
        Expert of each slot of a layer, `EMPTY` where there is none.
    """
    replicas_E = np.bincount(row_S[row_S != EMPTY], minlength=num_experts)
    slots = np.argsort(row_S, kind="stable")[np.count_nonzero(row_S == EMPTY) :]
    expert = row_S[slots]
    number = np.arange(slots.size) - (np.cumsum(replicas_E) - replicas_E)[expert]
    replica_EX = np.full((num_experts, int(replicas_E.max())), -1, dtype=np.int64)
    replica_EX[expert, number] = device_of_slot_S[slots]
    return Replicas(replica_EX=replica_EX, replicas_E=replicas_E.astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerSplit:
    """How the tokens of one layer spread over replicas.

    Parameters
    ----------
    replicas
        Where the replicas are.
    share_WEX
        Realised share of each expert's load on each of its replicas, by window.
    hash_T
        Hash of each sampled token; empty where rows of shares decide.
    row_T, share_REX
        Row of each sampled token, and the shares of each row.
    """

    replicas: Replicas
    share_WEX: FloatArray
    hash_T: IntArray
    row_T: IntArray
    share_REX: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitRule:
    """A replica split on some traffic: turns the replicas of a layer into shares.

    Parameters
    ----------
    kind
        Which split; not ``even``.
    profile
        The traffic.
    node_of_device_D
        Node of each device.
    """

    kind: ReplicaSplit
    profile: RoutingProfile
    node_of_device_D: IntArray
    _last_counts: dict[int, FloatArray] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, problem: PlacementProblem) -> SplitRule:
        """Return the rule of a problem."""
        return cls(
            kind=problem.replica_split,
            profile=problem.profile,
            node_of_device_D=problem.topology.node_of_device_D,
        )

    @cached_property
    def home_row_T(self) -> IntArray:
        """Home row (0 unknown, 1 + device) of each sampled token."""
        home_T, size = self.profile.home_T, self.profile.num_sampled_tokens
        return np.zeros(size, dtype=np.int64) if home_T is None else home_T + 1

    @cached_property
    def hash_T(self) -> IntArray:
        """Hash of each sampled token's index among those of its window and home, ``[tokens]``."""
        window_T = self.profile.window_of_token_T
        if self.kind is not ReplicaSplit.HASH or window_T is None:
            return np.zeros(0, dtype=np.int64)
        order = np.lexsort((self.home_row_T, window_T))
        changed = (np.diff(window_T[order]) != 0) | (np.diff(self.home_row_T[order]) != 0)
        first = np.append(0, np.nonzero(changed)[0] + 1)
        run_T = np.append(0, np.cumsum(changed))
        index_T = np.empty(order.size, dtype=np.int64)
        index_T[order] = np.arange(order.size) - first[run_T]
        return (index_T * HASH_MULTIPLIER) & 0xFFFFFFFF

    def layer(self, layer: int, replicas: Replicas) -> LayerSplit:
        """Split one layer's loads and tokens over its replicas."""
        no_rows = np.zeros(0, dtype=np.int64)
        if self.kind is ReplicaSplit.LP:
            share_WEX = least_fullest_shares(
                self.profile.load_WLE[:, layer], replicas, num_devices=self.node_of_device_D.size
            )
            window_T = self.profile.window_of_token_T
            rows = no_rows if window_T is None else window_T
            share_REX = np.concatenate([share_WEX, even_shares(replicas)[None]])
        elif self.kind is ReplicaSplit.NEAREST:
            share_REX, rows = self._nearest_shares(replicas), self.home_row_T
            share_WEX = self._shares_by_home(layer, replicas, share_REX)
        else:
            share_REX, rows = np.zeros((0, *replicas.replica_EX.shape)), no_rows
            share_WEX = self._shares_by_hash(layer, replicas)
        return LayerSplit(
            replicas=replicas, share_WEX=share_WEX, hash_T=self.hash_T, row_T=rows, share_REX=share_REX
        )

    def update(
        self, before: LayerSplit, replicas: Replicas, tokens_by_expert: Mapping[int, IntArray]
    ) -> LayerSplit:
        """Split by hash again where the replicas of some experts have changed.

        Parameters
        ----------
        before
            The split of the layer so far.
        replicas
            Where the replicas are now.
        tokens_by_expert
            The sampled tokens that select each expert that has changed.
        """
        profile = self.profile
        assert profile.window_of_token_T is not None
        num_windows, (_, widest) = profile.num_windows, replicas.replica_EX.shape
        share_WEX = np.zeros((num_windows, *replicas.replica_EX.shape))
        kept = min(widest, before.share_WEX.shape[2])
        share_WEX[:, :, :kept] = before.share_WEX[:, :, :kept]
        for expert, tokens in tokens_by_expert.items():
            num = int(replicas.replicas_E[expert])
            cell = profile.window_of_token_T[tokens] * num + self.hash_T[tokens] % num
            count = np.bincount(cell, minlength=(num_windows + 1) * num)[: num_windows * num]
            count_WX = count.reshape(num_windows, num)
            total_W = count_WX.sum(axis=1, keepdims=True)
            share_WEX[:, expert] = 0.0
            share_WEX[:, expert, :num] = np.where(total_W > 0, count_WX / np.maximum(total_W, 1), 1.0 / num)
        return replace(before, replicas=replicas, share_WEX=share_WEX)

    def _shares_by_hash(self, layer: int, replicas: Replicas) -> FloatArray:
        from placement.cost.split_kernels import count_picks

        profile = self.profile
        assert profile.experts_TLK is not None
        count_WEX = np.zeros((profile.num_windows, *replicas.replica_EX.shape))
        count_picks(
            np.ascontiguousarray(profile.experts_TLK[:, layer]),
            profile.window_of_token_T,
            self.hash_T,
            replicas.replicas_E,
            count_WEX,
        )
        return _normalised(count_WEX, replicas)

    def _nearest_shares(self, replicas: Replicas) -> FloatArray:
        """Share of each replica by home, ``[1 + devices, experts, replicas]``: all of it, but in row 0."""
        replica_EX, node_D = replicas.replica_EX, self.node_of_device_D
        home_H = np.arange(node_D.size)[:, None, None]
        here_HEX = replica_EX[None] == home_H
        near_HEX = (replica_EX >= 0)[None] & (node_D[replica_EX][None] == node_D[:, None, None])
        any_HEX = np.broadcast_to((replica_EX >= 0)[None], near_HEX.shape)
        mask_HEX = np.where(near_HEX.any(axis=2, keepdims=True), near_HEX, any_HEX)
        mask_HEX = np.where(here_HEX.any(axis=2, keepdims=True), here_HEX, mask_HEX)
        number_HEX = np.cumsum(mask_HEX, axis=2) - 1
        picked_HEX = mask_HEX & (number_HEX == home_H % mask_HEX.sum(axis=2, keepdims=True))
        return np.concatenate([even_shares(replicas)[None], picked_HEX.astype(np.float64)])

    def _shares_by_home(self, layer: int, replicas: Replicas, share_HEX: FloatArray) -> FloatArray:
        count_WEX = np.einsum("whe,hex->wex", self._counts_by_home(layer), share_HEX)
        return _normalised(count_WEX, replicas)

    def _counts_by_home(self, layer: int) -> FloatArray:
        """Sampled pairs by window, home row and expert; kept for the layer asked for last."""
        if layer not in self._last_counts:
            profile, num_homes = self.profile, 1 + self.node_of_device_D.size
            assert profile.experts_TLK is not None
            assert profile.window_of_token_T is not None
            shape = (profile.num_windows + 1, num_homes, profile.num_experts)
            row_T = (profile.window_of_token_T * num_homes + self.home_row_T) * profile.num_experts
            cell = (row_T[:, None] + profile.experts_TLK[:, layer].astype(np.int64)).ravel()
            count_WHE = np.bincount(cell, minlength=int(np.prod(shape))).reshape(shape)[:-1]
            self._last_counts.clear()
            self._last_counts[layer] = count_WHE.astype(np.float64)
        return self._last_counts[layer]


def even_shares(replicas: Replicas) -> FloatArray:
    """Share of each replica when all of an expert's replicas are used alike, ``[experts, replicas]``."""
    return np.asarray((replicas.replica_EX >= 0) / replicas.replicas_E[:, None])


def _normalised(count_WEX: FloatArray, replicas: Replicas) -> FloatArray:
    """Turn counts into shares; even where nothing was counted."""
    total_WEX = np.broadcast_to(count_WEX.sum(axis=2, keepdims=True), count_WEX.shape)
    share_WEX = np.array(np.broadcast_to(even_shares(replicas), count_WEX.shape))
    return np.asarray(np.divide(count_WEX, total_WEX, out=share_WEX, where=total_WEX > 0))


def least_fullest_shares(load_WE: FloatArray, replicas: Replicas, *, num_devices: int) -> FloatArray:
    """Share of each expert's load on each replica so that the fullest device is as light as can be.

    The device loads are the most even ones that any split attains; the shares are those that water-filling
    reaches from the even split, experts in order of number.

    Parameters
    ----------
    load_WE
        Token-expert pairs, ``[windows, experts]``.

    Returns
    -------
    FloatArray
        Shares, ``[windows, experts, most replicas]``, 0 beyond an expert's replicas.
    """
    from placement.cost.split_kernels import water_fill

    share_WEX = np.zeros((load_WE.shape[0], *replicas.replica_EX.shape))
    water_fill(
        np.ascontiguousarray(load_WE),
        replicas.replica_EX,
        replicas.replicas_E,
        num_devices,
        TOLERANCE,
        MOST_SWEEPS,
        share_WEX,
    )
    return share_WEX


def device_loads(load_WE: FloatArray, split: LayerSplit, *, num_devices: int) -> FloatArray:
    """Realised token-expert pairs on each device, ``[windows, devices]``."""
    load_WD = np.zeros((load_WE.shape[0], num_devices))
    _add_up(load_WE[:, :, None] * split.share_WEX, split.replicas.replica_EX, load_WD)
    return load_WD


def device_costs(
    load_WE: FloatArray, split: LayerSplit, curves: Sequence[PiecewiseLinear], kind_of_device_D: IntArray
) -> FloatArray:
    """Time of the experts of each device under the realised split, ``[windows, devices]``; NaN if unknown.

    Parameters
    ----------
    curves
        Time of one expert against its tokens, for each device kind.
    """
    replica_EX = split.replicas.replica_EX
    load_WEX = load_WE[:, :, None] * split.share_WEX
    cost_WD = np.full((load_WE.shape[0], kind_of_device_D.size), np.nan)
    for kind, curve in enumerate(curves):
        cost_WD[:, kind_of_device_D == kind] = 0.0
        of_kind_EX = (replica_EX >= 0) & (kind_of_device_D[replica_EX] == kind)
        _add_up(curve(load_WEX), np.where(of_kind_EX, replica_EX, -1), cost_WD)
    return cost_WD


def _add_up(value_WEX: FloatArray, replica_EX: IntArray, out_WD: FloatArray) -> None:
    """Add what each replica carries to its device; -1 marks a replica to leave out."""
    for x in range(replica_EX.shape[1]):
        held = np.nonzero(replica_EX[:, x] >= 0)[0]
        np.add.at(out_WD.T, replica_EX[held, x], value_WEX[:, held, x].T)


def needs_split(problem: PlacementProblem, placement: Placement) -> bool:
    """Return whether the split matters: it is not even, and some expert has a second replica."""
    return problem.replica_split is not ReplicaSplit.EVEN and bool((placement.replicas_LE > 1).any())
