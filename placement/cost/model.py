"""Evaluates a placement: the predicted step cost, taken apart, and its quality figures.

One step of one window runs layer by layer through three phases that every device waits for: dispatch,
experts, combine. A phase takes as long as its fullest device (experts) or its fullest link (exchanges), so

    step(window) = sum over layers of  max_d sum_{e on d} t_e(load / replicas)
                   + max_link dispatch(volume) + max_link combine(volume)

Attention and everything else that no placement changes is left out. Loads and volumes follow from the
problem's replica split: even, or as the engine realises it (`placement.cost.split`).

Shape letters: W windows, L layers, E experts, D devices, G groups, J links, T tokens, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.calibration import PiecewiseLinear
from placement.cost.breakdown import CostBreakdown, Metrics, ratio_to_mean
from placement.cost.links import Link, links_of
from placement.cost.split import (
    LayerSplit,
    SplitRule,
    device_costs,
    device_loads,
    needs_split,
    number_replicas,
)
from placement.errors import InputError
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, Semantics
from placement.profile import RoutingProfile

__all__ = ["CostModel"]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Exchange:
    """Received volumes of all layers and links, and per-token figures."""

    volume_LJWG: FloatArray
    fanout: float | None = None
    node_fanout: float | None = None
    hops: float | None = None


Splits = tuple[LayerSplit, ...]
"""How each layer's tokens spread over replicas, where the split is not even."""


class CostModel:
    """Computes every objective of one problem; solvers report nothing that it has not computed.

    Parameters
    ----------
    problem
        What to evaluate for.
    """

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem = problem
        self.has_costs = problem.calibration.flat or problem.model is not None

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """Links over which exchanges are charged, innermost first; none without costs."""
        return links_of(self.problem) if self.has_costs else ()

    @cached_property
    def expert_curves(self) -> tuple[PiecewiseLinear, ...]:
        """Time of one expert against its tokens, for each device kind; none without costs."""
        if not self.has_costs:
            return ()
        problem = self.problem
        return tuple(problem.calibration.expert_curve(kind, problem.model) for kind in problem.topology.kinds)

    def evaluate(self, placement: Placement) -> CostBreakdown:
        """Predict the cost of a placement on the problem's traffic.

        Raises
        ------
        InputError
            If the placement does not belong to the problem (layers, experts, devices).
        """
        problem = self.problem
        problem.check_placement(placement)
        splits = self._splits(placement)
        load_WLD = self._load_WLD(placement, splits)
        experts_WLD = self._experts_WLD(placement, splits)
        exchange = self._exchange(placement, splits)
        dispatch_WL, combine_WL, bottleneck_L = self._exchange_times(exchange.volume_LJWG)
        experts_WL = experts_WLD.max(axis=2)
        metrics = self._metrics(placement, load_WLD, exchange)
        step_W = (experts_WL + dispatch_WL + combine_WL).sum(axis=1)
        return CostBreakdown(
            objective=self._objective(step_W, load_WLD, metrics),
            unit=problem.unit,
            step_unit=problem.calibration.unit,
            experts_WL=experts_WL,
            dispatch_WL=dispatch_WL,
            combine_WL=combine_WL,
            load_WLD=load_WLD,
            experts_LD=experts_WLD.mean(axis=0),
            received_LD=self._received_LD(exchange.volume_LJWG),
            fullest_device_L=_most_frequent(load_WLD.argmax(axis=2), problem.num_devices),
            bottleneck_tier_L=bottleneck_L,
            metrics=metrics,
        )

    def objective(self, placement: Placement) -> float:
        """Return the objective alone."""
        return self.evaluate(placement).objective

    def _objective(self, step_W: FloatArray, load_WLD: FloatArray, metrics: Metrics) -> float:
        problem = self.problem
        if problem.objective is Objective.STEP_TIME:
            return problem.risk.summarise(step_W)
        if problem.objective is Objective.BALANCE:
            return problem.risk.summarise(ratio_to_mean(load_WLD).ravel())
        traffic = metrics.hops if problem.semantics is Semantics.STAY_PUT else metrics.fanout
        assert traffic is not None  # PlacementProblem requires tokens for the traffic objective
        return traffic

    @cached_property
    def split_rule(self) -> SplitRule:
        """How tokens choose replicas; for splits other than even."""
        return SplitRule.of(self.problem)

    def _splits(self, placement: Placement) -> Splits | None:
        """Spread every layer's tokens over replicas; None where they are shared evenly."""
        if not needs_split(self.problem, placement):
            return None
        slots = placement.device_of_slot_S
        return tuple(
            self.split_rule.layer(layer, number_replicas(row_S, slots, placement.num_experts))
            for layer, row_S in enumerate(placement.physical_to_logical_map_LS)
        )

    def _load_WLD(self, placement: Placement, splits: Splits | None) -> FloatArray:
        if splits is not None:
            loads = self.problem.profile.load_WLE.transpose(1, 0, 2)
            devices = self.problem.num_devices
            pairs = zip(loads, splits, strict=True)
            return np.stack([device_loads(load, split, num_devices=devices) for load, split in pairs], axis=1)
        share_LED = placement.count_LED / placement.replicas_LE[:, :, None]
        load_LWD = np.matmul(self.problem.profile.load_WLE.transpose(1, 0, 2), share_LED)
        return np.ascontiguousarray(load_LWD.transpose(1, 0, 2))

    def _experts_WLD(self, placement: Placement, splits: Splits | None) -> FloatArray:
        profile, topology = self.problem.profile, self.problem.topology
        if splits is not None:
            kinds, curves = topology.kind_of_device_D, self.expert_curves
            pairs = zip(profile.load_WLE.transpose(1, 0, 2), splits, strict=True)
            return np.stack([device_costs(load, split, curves, kinds) for load, split in pairs], axis=1)
        experts_WLD = np.full((profile.num_windows, profile.num_layers, topology.num_devices), np.nan)
        per_replica_WLE = profile.load_WLE / placement.replicas_LE
        for kind, curve in enumerate(self.expert_curves):
            devices = np.nonzero(topology.kind_of_device_D == kind)[0]
            cost_LWE = curve(per_replica_WLE).transpose(1, 0, 2)
            count_LED = placement.count_LED[:, :, devices].astype(np.float64)
            experts_WLD[:, :, devices] = np.matmul(cost_LWE, count_LED).transpose(1, 0, 2)
        return experts_WLD

    def _exchange(self, placement: Placement, splits: Splits | None) -> _Exchange:
        profile, semantics = self.problem.profile, self.problem.semantics
        if profile.num_sampled_tokens == 0:
            return _Exchange(volume_LJWG=self._volume_without_tokens(placement, splits))
        touched = self._touch(placement, splits)
        walked = self._walk(placement)
        if semantics is Semantics.DISPATCH:
            volume_LJWG = touched.volume_LJWG
        elif semantics is Semantics.STAY_PUT:
            volume_LJWG = walked.volume_LJWG
        else:
            volume_LJWG = self._volume_without_tokens(placement, splits)
        return _Exchange(
            volume_LJWG=volume_LJWG,
            fanout=touched.fanout,
            node_fanout=touched.node_fanout,
            hops=walked.hops,
        )

    def _volume_without_tokens(self, placement: Placement, splits: Splits | None) -> FloatArray:
        """Received volumes that follow from loads alone; NaN where they do not."""
        profile, semantics = self.problem.profile, self.problem.semantics
        volume_LJWG = np.full(self._volume_shape(), np.nan)
        for j, link in enumerate(self.links):
            groups = slice(0, link.num_groups)
            if semantics is Semantics.ALLGATHER:
                volume_LJWG[:, j, :, groups] = profile.window_tokens_W[:, None] * link.enter_HG[0]
            elif semantics is Semantics.DISPATCH_NODEDUP:
                volume_LJWG[:, j, :, groups] = self._pairs_entering(placement, splits, link)
        return volume_LJWG

    def _pairs_entering(self, placement: Placement, splits: Splits | None, link: Link) -> FloatArray:
        """Pairs that enter each device over a link, ``[layers, windows, devices]``."""
        profile = self.problem.profile
        if profile.home_T is None and splits is not None:
            return np.asarray(self._load_WLD(placement, splits).transpose(1, 0, 2) * link.enter_HG[0])
        if splits is not None:
            return np.stack([self._split_pairs(layer, split, link) for layer, split in enumerate(splits)])
        share_LED = placement.count_LED / placement.replicas_LE[:, :, None]
        if profile.home_T is None:
            loads = np.matmul(profile.load_WLE.transpose(1, 0, 2), share_LED)
            return np.asarray(loads * link.enter_HG[0])
        pairs = np.zeros((profile.num_layers, profile.num_windows, self.problem.num_devices))
        for layer in range(profile.num_layers):
            home_load_WHE = home_loads(profile, layer, num_homes=link.enter_HG.shape[0])
            pairs[layer] = np.einsum("whe,ed,hd->wd", home_load_WHE, share_LED[layer], link.enter_HG)
        return pairs

    def _split_pairs(self, layer: int, split: LayerSplit, link: Link) -> FloatArray:
        """Pairs of tokens with homes that enter each device in one layer, ``[windows, devices]``."""
        from placement.cost.split_kernels import count_pairs

        profile = self.problem.profile
        window_T, home_row_T = _token_rows(profile)
        assert profile.experts_TLK is not None
        pairs_WD = np.zeros((profile.num_windows + 1, self.problem.num_devices))
        count_pairs(
            np.ascontiguousarray(profile.experts_TLK[:, layer]),
            window_T,
            home_row_T,
            split.hash_T,
            split.row_T,
            split.share_REX,
            split.replicas.replica_EX,
            split.replicas.replicas_E,
            link.enter_HG,
            pairs_WD,
        )
        return np.asarray((pairs_WD * _weight_per_window(profile)[:, None])[:-1])

    def _volume_shape(self) -> tuple[int, int, int, int]:
        profile = self.problem.profile
        widest = max((link.num_groups for link in self.links), default=1)
        return profile.num_layers, len(self.links), profile.num_windows, widest

    @cached_property
    def padded_links(self) -> tuple[IntArray, FloatArray]:
        """Groups and entering volumes of all links, then of devices and nodes to count fanout."""
        problem = self.problem
        num_devices = problem.num_devices
        groups = [link.group_D for link in self.links]
        groups += [np.arange(num_devices), problem.topology.node_of_device_D]
        enter_JHG = np.zeros((len(groups), 1 + num_devices, num_devices))
        for j, link in enumerate(self.links):
            enter_JHG[j, :, : link.num_groups] = link.enter_HG
        return np.stack(groups), enter_JHG

    def _touch(self, placement: Placement, splits: Splits | None) -> _Exchange:
        profile = self.problem.profile
        group_JD, enter_JHG = self.padded_links
        num_links, num_windows = len(self.links), profile.num_windows
        volume_LJWG = np.full(self._volume_shape(), np.nan)
        # Without a split touches are whole numbers, and counted as such.
        fanout_JW = np.zeros(
            (num_links + 2, num_windows + 1), dtype=np.int64 if splits is None else np.float64
        )
        for layer in range(profile.num_layers):
            volume_JWG = np.zeros((num_links + 2, num_windows + 1, self.problem.num_devices))
            counted = (group_JD, enter_JHG, fanout_JW, volume_JWG)
            if splits is None:
                self._count_touches(placement, layer, counted)
            else:
                self.add_split_touches(splits[layer], layer, counted)
            self._store_volumes(volume_LJWG[layer], volume_JWG)
        touches = self.touches_per_token(fanout_JW) / profile.num_layers
        return _Exchange(
            volume_LJWG=volume_LJWG,
            fanout=float(touches[num_links]),
            node_fanout=float(touches[num_links + 1]) if self.problem.topology.num_nodes > 1 else None,
        )

    def touches_per_token(self, touches_JW: Array) -> FloatArray:
        """Mean groups that a token touches, from counts by window: of every link, then devices and nodes."""
        weight_W = _weight_per_window(self.problem.profile)
        return np.asarray(touches_JW @ weight_W / float(self.problem.profile.token_weight_T.sum()))

    def _count_touches(self, placement: Placement, layer: int, counted: tuple[Array, ...]) -> None:
        from placement.cost.kernels import count_touches

        profile = self.problem.profile
        assert profile.experts_TLK is not None
        count_touches(
            np.ascontiguousarray(profile.experts_TLK[:, layer]),
            *_token_rows(profile),
            placement.first_device_LE[layer],
            placement.replicas_LE[layer],
            placement.count_LED[layer],
            *counted,
        )

    def add_split_touches(
        self,
        split: LayerSplit,
        layer: int,
        counted: tuple[Array, ...],
        *,
        token_N: IntArray | None = None,
        sign: float = 1.0,
    ) -> None:
        """Count what tokens touch in a layer under a split.

        Parameters
        ----------
        counted
            Groups and entering volumes of the links, and the counts of touches and volumes to add to.
        token_N, sign
            Sampled tokens to count, all by default, and what to count them by.
        """
        from placement.cost.split_kernels import count_split_touches

        profile = self.problem.profile
        assert profile.experts_TLK is not None
        count_split_touches(
            np.arange(profile.num_sampled_tokens) if token_N is None else token_N,
            sign,
            np.ascontiguousarray(profile.experts_TLK[:, layer]),
            *_token_rows(profile),
            split.hash_T,
            split.row_T,
            split.share_REX,
            split.replicas.replica_EX,
            split.replicas.replicas_E,
            *counted,
        )

    def _store_volumes(self, out_JWG: FloatArray, volume_JWG: FloatArray) -> None:
        weight_W = _weight_per_window(self.problem.profile)[:-1]
        for j, link in enumerate(self.links):
            out_JWG[j, :, : link.num_groups] = volume_JWG[j, :-1, : link.num_groups] * weight_W[:, None]

    def _walk(self, placement: Placement) -> _Exchange:
        from placement.cost.kernels import walk_tokens

        profile = self.problem.profile
        window_T, home_row_T = _token_rows(profile)
        assert profile.experts_TLK is not None
        group_JD, enter_JHG = self.padded_links
        num_layers, num_windows = profile.num_layers, profile.num_windows
        raw_LJWG = np.zeros((num_layers, len(group_JD), num_windows + 1, self.problem.num_devices))
        # Hops are counted per window on the device pseudo-link, whose entering volume is one token.
        device_link = len(self.links)
        enter_JHG = enter_JHG.copy()
        enter_JHG[device_link] = 1.0
        walk_tokens(
            np.ascontiguousarray(profile.experts_TLK[:, :, 0]),
            window_T,
            home_row_T,
            placement.first_device_LE,
            placement.count_LED,
            group_JD,
            enter_JHG,
            raw_LJWG,
        )
        volume_LJWG = np.full(self._volume_shape(), np.nan)
        for layer in range(num_layers):
            self._store_volumes(volume_LJWG[layer], raw_LJWG[layer])
        arrivals_W = raw_LJWG[1:, device_link].sum(axis=(0, 2))
        boundaries = max(num_layers - 1, 1) * float(profile.token_weight_T.sum())
        return _Exchange(
            volume_LJWG=volume_LJWG, hops=float(arrivals_W @ _weight_per_window(profile)) / boundaries
        )

    def exchange_cost(self, volume_JWG: FloatArray) -> FloatArray:
        """Cost of dispatch and combine in each window, from counted volumes of one layer, ``[windows]``."""
        volume_LJWG = np.full((1, *self._volume_shape()[1:]), np.nan)
        self._store_volumes(volume_LJWG[0], volume_JWG)
        dispatch_WL, combine_WL, _ = self._exchange_times(volume_LJWG)
        return np.asarray((dispatch_WL + combine_WL)[:, 0])

    def _exchange_times(self, volume_LJWG: FloatArray) -> tuple[FloatArray, FloatArray, tuple[str, ...]]:
        profile = self.problem.profile
        shape = (profile.num_windows, profile.num_layers)
        if not self.links:
            nan = np.full(shape, np.nan)
            return nan, nan.copy(), ("",) * profile.num_layers
        fullest_JLW = np.stack(
            [volume_LJWG[:, j, :, : link.num_groups].max(axis=2) for j, link in enumerate(self.links)]
        )
        dispatch_JLW = np.stack([link.dispatch(v) for link, v in zip(self.links, fullest_JLW, strict=True)])
        combine_JLW = np.stack([link.combine(v) for link, v in zip(self.links, fullest_JLW, strict=True)])
        self._leave_out_idle(dispatch_JLW, combine_JLW)
        bounding_LW = dispatch_JLW.argmax(axis=0)
        tier_L = _most_frequent(bounding_LW.T, len(self.links))
        names = tuple(self.links[int(tier)].name for tier in tier_L)
        return dispatch_JLW.max(axis=0).T, combine_JLW.max(axis=0).T, names

    def _leave_out_idle(self, dispatch_JL: FloatArray, combine_JL: FloatArray) -> None:
        """Set to 0 what is not exchanged where tokens stay put; arrays by link, layer and anything else."""
        if self.problem.semantics is Semantics.STAY_PUT:
            # A token that stayed has no way back, and nothing is exchanged before the first layer
            # unless homes are known.
            combine_JL[:] = 0.0
            if self.problem.profile.home_T is None:
                dispatch_JL[:, 0] = 0.0

    def device_times(self, placement: Placement) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return every device's time in dispatch, experts and combine, ``[windows, layers, devices]`` each.

        A phase ends with its slowest device: the maxima over devices are those of `evaluate`.

        Raises
        ------
        InputError
            If the placement does not belong to the problem, or the problem has no costs.
        """
        if not self.has_costs:
            raise InputError(
                "times need costs: name the model's sizes with --model, or use a linear calibration"
            )
        self.problem.check_placement(placement)
        splits = self._splits(placement)
        volume_LJWG = self._exchange(placement, splits).volume_LJWG
        volume_JLWD = [volume_LJWG[:, j][:, :, link.group_D] for j, link in enumerate(self.links)]
        dispatch_JLWD = np.stack([link.dispatch(v) for link, v in zip(self.links, volume_JLWD, strict=True)])
        combine_JLWD = np.stack([link.combine(v) for link, v in zip(self.links, volume_JLWD, strict=True)])
        self._leave_out_idle(dispatch_JLWD, combine_JLWD)
        dispatch_LWD, combine_LWD = dispatch_JLWD.max(axis=0), combine_JLWD.max(axis=0)
        return (
            np.ascontiguousarray(dispatch_LWD.transpose(1, 0, 2)),
            self._experts_WLD(placement, splits),
            np.ascontiguousarray(combine_LWD.transpose(1, 0, 2)),
        )

    def _received_LD(self, volume_LJWG: FloatArray) -> FloatArray:
        if not self.links:
            return np.full((self.problem.num_layers, self.problem.num_devices), np.nan)
        mean_LG = volume_LJWG[:, 0].mean(axis=1)
        return np.asarray(mean_LG[:, self.links[0].group_D])

    def _metrics(self, placement: Placement, load_WLD: FloatArray, exchange: _Exchange) -> Metrics:
        balance_WL = ratio_to_mean(load_WLD)
        summed_L = ratio_to_mean(load_WLD.sum(axis=0))
        hottest_WL = (self.problem.profile.load_WLE / placement.replicas_LE).max(axis=2)
        mean_WL = load_WLD.mean(axis=2)
        floor_WL = np.divide(hottest_WL, mean_WL, out=np.ones_like(mean_WL), where=mean_WL > 0)
        return Metrics(
            balance=float(balance_WL.mean()),
            balance_p95=float(np.quantile(balance_WL, 0.95)),
            balance_floor=float(np.maximum(floor_WL, 1.0).mean()),
            mean_traffic_balance=float(summed_L.mean()),
            worst_layer_balance=float(summed_L.max()),
            fanout=exchange.fanout,
            node_fanout=exchange.node_fanout,
            hops=exchange.hops,
        )


def home_loads(profile: RoutingProfile, layer: int, *, num_homes: int) -> FloatArray:
    """Token-expert pairs by window, home row (0: unknown) and expert, ``[windows, homes, experts]``."""
    assert profile.experts_TLK is not None
    window_T, home_row_T = _token_rows(profile)
    shape = (profile.num_windows + 1, num_homes, profile.num_experts)
    row_T = (window_T * num_homes + home_row_T) * profile.num_experts
    cell = (row_T[:, None] + profile.experts_TLK[:, layer].astype(np.int64)).ravel()
    weight = np.repeat(profile.token_weight_T, profile.top_k)
    count = np.bincount(cell, weights=weight, minlength=int(np.prod(shape))).astype(np.float64)
    return np.asarray(count.reshape(shape)[:-1])


def _token_rows(profile: RoutingProfile) -> tuple[IntArray, IntArray]:
    """Window and home row (0 unknown, 1 + device) of each sampled token."""
    window_T = profile.window_of_token_T
    assert window_T is not None
    if profile.home_T is None:
        return window_T, np.zeros(window_T.size, dtype=np.int64)
    return window_T, profile.home_T + 1


def _weight_per_window(profile: RoutingProfile) -> FloatArray:
    """Real tokens per sampled token of each window, then of the tail, ``[windows + 1]``."""
    assert profile.window_of_token_T is not None
    weight = np.zeros(profile.num_windows + 1)
    weight[profile.window_of_token_T] = profile.token_weight_T
    return weight


def _most_frequent(index_WL: npt.NDArray[np.int64], num_values: int) -> IntArray:
    """Most frequent value of each column."""
    counts = [np.bincount(column, minlength=num_values) for column in index_WL.T]
    return np.array([int(count.argmax()) for count in counts], dtype=np.int64)
