"""Prepares one layer for the compiled search: scenarios, token bit sets, volumes and curves.

A scenario is a load situation that the search prices. The windows of the profile are the plain choice;
`ScenarioPlan` cuts each window into pieces and mixes neighbouring pieces instead, which gives more and
noisier scenarios of the same traffic: what is fitted to them holds better on windows not seen.

Shape letters: W scenarios, P pieces, E experts, D devices, J links, G groups, T tokens, K top-k,
Q segments, N words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.cost.links import Link, counting_link
from placement.cost.model import CostModel
from placement.problem import Objective, Semantics
from placement.profile import RoutingProfile

if TYPE_CHECKING:
    from placement.cost.layer_kernels import Layer

__all__ = [
    "WINDOWS",
    "Neighbours",
    "ScenarioPlan",
    "Scenarios",
    "expert_overlap",
    "make_layer",
    "make_scenarios",
]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

WORD_BITS = 64

GOLDEN_RATIO = 0.6180339887498949
"""Multiples of it, without their whole part, spread evenly over [0, 1) however many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioPlan:
    """How windows become scenarios.

    Parameters
    ----------
    pieces_per_window
        Equal consecutive pieces that every window is cut into; needs sampled tokens when above 1.
    span_pieces
        Consecutive pieces that one scenario mixes, stepping by one piece; 1 with one piece per window
        gives the windows themselves.
    shrink
        Weight of the mean over all pieces in every scenario, in [0, 1).
    soft
        Whether maxima over devices and groups are softened, so that devices nearly full count too.
    max_tokens
        Sampled tokens used at most; None for all.
    max_scenarios
        Scenarios at most; spread evenly when there would be more.
    """

    pieces_per_window: int = 1
    span_pieces: int = 1
    shrink: float = 0.0
    soft: bool = False
    max_tokens: int | None = None
    max_scenarios: int | None = None


WINDOWS = ScenarioPlan()
"""The profile's own windows: the objective itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenarios:
    """Tokens grouped into pieces, and pieces mixed into scenarios; the same for every layer.

    Parameters
    ----------
    plan
        What it was made by.
    token_T
        Sampled tokens used, ordered by piece and home.
    piece_T
        Piece of each of them.
    segment_start_Q, segment_piece_Q, segment_home_Q
        Runs of 64-token words that share piece and home (row 0 unknown), ``[segments (+ 1)]``.
    bit_T
        Bit of each token in the padded bit sets.
    scale_P
        Real tokens of a whole window per used token of each piece.
    load_token_T, load_piece_T
        All sampled tokens inside windows, and the piece of each: loads are counted on these, since they cost
        nothing to search on and a sample of a piece is noisy.
    mix_WM
        Pieces of each scenario.
    """

    plan: ScenarioPlan
    token_T: IntArray
    piece_T: IntArray
    segment_start_Q: IntArray
    segment_piece_Q: IntArray
    segment_home_Q: IntArray
    bit_T: IntArray
    scale_P: FloatArray
    load_token_T: IntArray
    load_piece_T: IntArray
    mix_WM: IntArray

    @property
    def num_scenarios(self) -> int:
        """Scenarios."""
        return int(self.mix_WM.shape[0])

    @property
    def num_words(self) -> int:
        """Words of 64 tokens."""
        return int(self.segment_start_Q[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """Where stay-put tokens are before and after a layer: device of each sampled token, -1 for none."""

    previous_T: IntArray
    next_T: IntArray


def make_scenarios(profile: RoutingProfile, plan: ScenarioPlan) -> Scenarios:
    """Group a profile's sampled tokens into pieces and mix these into scenarios."""
    pieces = plan.pieces_per_window if profile.num_sampled_tokens else 1
    load_token_T, load_piece_T = _pieces(profile, pieces)
    used_T = _spread(load_token_T.size, plan.max_tokens)
    token_T, piece_T = load_token_T[used_T], load_piece_T[used_T]
    num_pieces = profile.num_windows * pieces
    home_T = np.zeros(token_T.size, dtype=np.int64)
    if profile.home_T is not None:
        home_T = profile.home_T[token_T] + 1
    order = np.lexsort((home_T, piece_T))
    token_T, piece_T, home_T = token_T[order], piece_T[order], home_T[order]
    start_Q, segment_piece_Q, segment_home_Q, bit_T = _segments(piece_T, home_T)
    used_P = np.bincount(piece_T, minlength=num_pieces)
    window_tokens_P = np.repeat(profile.window_tokens_W, pieces)
    return Scenarios(
        plan=plan,
        token_T=token_T,
        piece_T=piece_T,
        segment_start_Q=start_Q,
        segment_piece_Q=segment_piece_Q,
        segment_home_Q=segment_home_Q,
        bit_T=bit_T,
        scale_P=np.divide(window_tokens_P, used_P, out=np.zeros(num_pieces), where=used_P > 0),
        load_token_T=load_token_T,
        load_piece_T=load_piece_T,
        mix_WM=_mix(num_pieces, plan),
    )


def _spread(num_tokens: int, max_tokens: int | None) -> IntArray:
    """Choose at most so many tokens, evenly."""
    every = 1 if max_tokens is None else max(1, -(-num_tokens // max_tokens))
    return np.arange(0, num_tokens, every)


def _pieces(profile: RoutingProfile, pieces: int) -> tuple[IntArray, IntArray]:
    """Sampled tokens and the piece of each, the tail left out."""
    if profile.window_of_token_T is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    num_inside = int(np.searchsorted(profile.window_of_token_T, profile.num_windows))
    window_T = profile.window_of_token_T[:num_inside]
    first_W = np.searchsorted(window_T, np.arange(profile.num_windows))
    count_W = np.bincount(window_T, minlength=profile.num_windows)
    within_T = np.arange(num_inside) - first_W[window_T]
    piece_T = window_T * pieces + within_T * pieces // np.maximum(count_W[window_T], 1)
    return np.arange(num_inside), piece_T


def _segments(piece_T: IntArray, home_T: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Pad every run of one piece and home to whole words."""
    if piece_T.size == 0:
        empty = np.zeros(0, dtype=np.int64)
        return np.zeros(1, dtype=np.int64), empty, empty, empty
    new_run = np.append(True, (np.diff(piece_T) != 0) | (np.diff(home_T) != 0))
    first_Q = np.nonzero(new_run)[0]
    run_T = np.cumsum(new_run) - 1
    words_Q = -(-np.diff(np.append(first_Q, piece_T.size)) // WORD_BITS)
    start_Q = np.append(0, np.cumsum(words_Q))
    bit_T = start_Q[run_T] * WORD_BITS + np.arange(piece_T.size) - first_Q[run_T]
    return start_Q, piece_T[first_Q], home_T[first_Q], bit_T


def _mix(num_pieces: int, plan: ScenarioPlan) -> IntArray:
    span = min(plan.span_pieces, num_pieces)
    first = np.arange(num_pieces - span + 1)
    if plan.max_scenarios is not None and first.size > plan.max_scenarios:
        first = np.unique(np.linspace(0, num_pieces - span, plan.max_scenarios).round().astype(np.int64))
    # Any first few of the scenarios spread over all of the traffic: estimates look at those alone.
    first = first[np.argsort(first * GOLDEN_RATIO % 1.0, kind="stable")] if plan.soft else first
    return np.asarray(first[:, None] + np.arange(span), dtype=np.int64)


def make_layer(
    model: CostModel,
    layer: int,
    scenarios: Scenarios,
    *,
    max_replicas: int = 1,
    neighbours: Neighbours | None = None,
    weight_W: FloatArray | None = None,
) -> Layer:
    """Build the compiled search's view of one layer.

    Parameters
    ----------
    max_replicas
        Replicas that one expert may get.
    neighbours
        For `Semantics.STAY_PUT`: where tokens come from and go to.
    weight_W
        Weight of each scenario; equal by default.
    """
    from placement.cost.layer_kernels import make_compiled_layer

    problem = model.problem
    load_WE = _loads(problem.profile, layer, scenarios)
    sums_volume = problem.objective is Objective.TRAFFIC
    mix_WM = scenarios.mix_WM
    if sums_volume:
        # A mean over tokens needs no scenarios: one mixture of all pieces.
        mix_WM = np.arange(scenarios.scale_P.size)[None, :]
        load_WE = load_WE.mean(axis=0, keepdims=True)
    links = _search_links(model)
    additive_JGEW, base_JGW, terms = _volumes(model, layer, scenarios, links, mix_WM, load_WE, neighbours)
    use_bits = bool(links) and problem.semantics is Semantics.DISPATCH
    bits_EN = _bits(problem.profile, layer, scenarios, per_position=False)[0] if use_bits else _no_bits()
    position_bits = (
        _bits(problem.profile, layer, scenarios, per_position=True)
        if use_bits and max_replicas > 1
        else _no_bits()[None]
    )
    enter_JHG = _pad_enter(links, problem.num_devices)
    repeat = additive_JGEW.shape[0] // len(links) if links and not use_bits else 1
    total_E = problem.profile.load_WLE[:, layer].sum(axis=0)
    return make_compiled_layer(
        cost_KREW=_expert_costs(model, load_WE, max_replicas),
        weight_W=_weights(weight_W, mix_WM.shape[0]),
        kind_D=np.ascontiguousarray(problem.topology.kind_of_device_D),
        group_JD=np.tile(_stack([link.group_D for link in links], problem.num_devices), (repeat, 1)),
        num_groups_J=np.tile(np.array([link.num_groups for link in links], dtype=np.int64), repeat),
        enter_JHG=enter_JHG,
        bits_EN=bits_EN,
        position_bits_OEN=position_bits,
        segment_start_Q=scenarios.segment_start_Q,
        segment_piece_Q=scenarios.segment_piece_Q,
        segment_home_Q=scenarios.segment_home_Q,
        scale_P=scenarios.scale_P,
        mix_WM=mix_WM,
        shrink=float(scenarios.plan.shrink),
        additive_JGEW=additive_JGEW,
        base_JGW=base_JGW,
        curve_x_YJX=terms[0],
        curve_y_YJX=terms[1],
        curve_points_YJ=terms[2],
        overlap_EE=expert_overlap(problem.profile, layer, scenarios) if use_bits else np.zeros((0, 0)),
        total_E=np.ascontiguousarray(total_E),
        device_limit=_device_limit(model, total_E),
        sums_volume=sums_volume,
        soft=scenarios.plan.soft and not sums_volume,
    )


def _weights(weight_W: FloatArray | None, num_scenarios: int) -> FloatArray:
    if weight_W is None or weight_W.size != num_scenarios:
        return np.full(num_scenarios, 1.0 / num_scenarios)
    return np.ascontiguousarray(weight_W / weight_W.sum())


def _device_limit(model: CostModel, total_E: FloatArray) -> float:
    problem = model.problem
    if problem.objective is not Objective.TRAFFIC:
        return float("inf")
    # A hair of slack keeps sums that equal the limit inside it.
    return float(problem.max_imbalance * total_E.sum() / problem.num_devices * (1 + 1e-12))


def _search_links(model: CostModel) -> tuple[Link, ...]:
    """Links that the search must price: none where no placement changes what they carry."""
    problem = model.problem
    if problem.objective is Objective.BALANCE or problem.semantics is Semantics.ALLGATHER:
        return ()
    if problem.objective is Objective.TRAFFIC:
        return (counting_link(problem.num_devices),)
    return model.links


def _loads(profile: RoutingProfile, layer: int, scenarios: Scenarios) -> FloatArray:
    """Token-expert pairs of each scenario, scaled to a whole window, ``[scenarios, experts]``."""
    plan = scenarios.plan
    load_PE = profile.load_WLE[:, layer]
    num_pieces = scenarios.scale_P.size
    if num_pieces > profile.num_windows:
        assert profile.experts_TLK is not None
        experts_TK = profile.experts_TLK[scenarios.load_token_T, layer].astype(np.int64)
        cell = (scenarios.load_piece_T[:, None] * profile.num_experts + experts_TK).ravel()
        count_PE = np.bincount(cell, minlength=num_pieces * profile.num_experts).reshape(num_pieces, -1)
        tokens_P = np.bincount(scenarios.load_piece_T, minlength=num_pieces)
        whole_P = np.repeat(profile.window_tokens_W, num_pieces // profile.num_windows)
        scale_P = np.divide(whole_P, tokens_P, out=np.zeros(num_pieces), where=tokens_P > 0)
        load_PE = count_PE.astype(np.float64) * scale_P[:, None]
    load_WE = load_PE[scenarios.mix_WM].mean(axis=1)
    return np.asarray((1 - plan.shrink) * load_WE + plan.shrink * load_PE.mean(axis=0))


def _expert_costs(model: CostModel, load_WE: FloatArray, max_replicas: int) -> FloatArray:
    """Cost of a replica by device kind and number of replicas, ``[kinds, replicas, experts, scenarios]``."""
    problem = model.problem
    per_replica_REW = load_WE.T[None] / np.arange(1, max_replicas + 1)[:, None, None]
    num_kinds = len(problem.topology.kinds)
    if problem.objective is Objective.TRAFFIC:
        return np.zeros((num_kinds, *per_replica_REW.shape))
    if problem.objective is Objective.BALANCE:
        mean_W = load_WE.sum(axis=1) / problem.num_devices
        ratio = np.divide(per_replica_REW, mean_W, out=np.zeros_like(per_replica_REW), where=mean_W > 0)
        return np.repeat(ratio[None], num_kinds, axis=0)
    return np.stack([curve(per_replica_REW) for curve in model.expert_curves])


def _stack(rows: list[IntArray], num_devices: int) -> IntArray:
    return np.stack(rows) if rows else np.zeros((0, num_devices), dtype=np.int64)


def _no_bits() -> Array:
    return np.zeros((0, 0), dtype=np.uint64)


def _pad_enter(links: tuple[Link, ...], num_devices: int) -> FloatArray:
    enter_JHG = np.zeros((len(links), 1 + num_devices, num_devices))
    for j, link in enumerate(links):
        enter_JHG[j, :, : link.num_groups] = link.enter_HG
    return enter_JHG


def _bits(profile: RoutingProfile, layer: int, scenarios: Scenarios, *, per_position: bool) -> Array:
    """Bit sets of the tokens that select each expert, ``[positions or 1, experts, words]``."""
    assert profile.experts_TLK is not None
    experts_TK = profile.experts_TLK[scenarios.token_T, layer]
    bits = np.zeros(
        (profile.top_k if per_position else 1, profile.num_experts, scenarios.num_words), np.uint64
    )
    word_T = scenarios.bit_T // WORD_BITS
    mask_T = np.left_shift(np.uint64(1), (scenarios.bit_T % WORD_BITS).astype(np.uint64))
    for position in range(profile.top_k):
        np.bitwise_or.at(bits[position if per_position else 0], (experts_TK[:, position], word_T), mask_T)
    return bits


def expert_overlap(profile: RoutingProfile, layer: int, scenarios: Scenarios) -> FloatArray:
    """Share of each expert's tokens that select another one too, ``[experts, experts]``."""
    assert profile.experts_TLK is not None
    experts_TK = profile.experts_TLK[scenarios.token_T, layer].astype(np.int64)
    pair = experts_TK[:, :, None] * profile.num_experts + experts_TK[:, None, :]
    count_EE = np.bincount(pair.ravel(), minlength=profile.num_experts**2).reshape(profile.num_experts, -1)
    return np.asarray(count_EE / np.maximum(count_EE.diagonal(), 1)[:, None])


Terms = tuple[FloatArray, FloatArray, IntArray]


def _curves(terms: list[list[Any]]) -> Terms:
    """Pack curves by term and link; None marks a link without part in a term."""
    num_links = max((len(term) for term in terms), default=0)
    widest = max((curve.x.size for term in terms for curve in term if curve is not None), default=2)
    x = np.zeros((len(terms), num_links, widest))
    y = np.zeros_like(x)
    points = np.zeros((len(terms), num_links), dtype=np.int64)
    for t, term in enumerate(terms):
        for j, curve in enumerate(term):
            if curve is not None:
                points[t, j] = curve.x.size
                x[t, j, : curve.x.size], y[t, j, : curve.x.size] = curve.x, curve.y
    return x, y, points


def _phases(links: tuple[Link, ...]) -> list[list[Any]]:
    """Return the exchange terms of links: dispatch, and combine unless it is free."""
    terms: list[list[Any]] = [[link.dispatch for link in links], [link.combine for link in links]]
    return [term for term in terms if any(curve.y[-1] > 0 for curve in term)]


def _volumes(
    model: CostModel,
    layer: int,
    scenarios: Scenarios,
    links: tuple[Link, ...],
    mix_WM: IntArray,
    load_WE: FloatArray,
    neighbours: Neighbours | None,
) -> tuple[FloatArray, FloatArray, Terms]:
    """Additive volumes, their bases, and the curves, for every semantics."""
    problem = model.problem
    if problem.semantics is Semantics.STAY_PUT and links:
        assert neighbours is not None
        return _stay_put_volumes(model, layer, scenarios, links, mix_WM, neighbours)
    terms = _curves(_phases(links))
    num_devices = problem.num_devices
    if problem.semantics is not Semantics.DISPATCH_NODEDUP or not links:
        return np.zeros((0, 0, 0, 0)), np.zeros((0, 0, 0)), terms
    base_JGW = np.zeros((len(links), num_devices, mix_WM.shape[0]))
    if problem.profile.home_T is None:
        additive = [link.enter_HG[0][:, None, None] * load_WE.T[None] for link in links]
        return np.stack(additive), base_JGW, terms
    additive = [
        _mixed(
            _entering(problem.profile, layer, scenarios, link.enter_HG, all_positions=True), mix_WM, scenarios
        )
        for link in links
    ]
    return np.stack(additive), base_JGW, terms


def _entering(
    profile: RoutingProfile,
    layer: int,
    scenarios: Scenarios,
    enter_HG: FloatArray,
    *,
    all_positions: bool,
    row_T: IntArray | None = None,
) -> FloatArray:
    """Volume that each expert's tokens add to every group, by piece, ``[groups, experts, pieces]``.

    `row_T` is each sampled token's row of `enter_HG`; by default its home.
    """
    assert profile.experts_TLK is not None
    if row_T is None:
        assert profile.home_T is not None
        row_T = profile.home_T + 1
    num_rows, num_pieces = enter_HG.shape[0], scenarios.scale_P.size
    experts_TK = profile.experts_TLK[scenarios.token_T, layer].astype(np.int64)
    experts_TK = experts_TK if all_positions else experts_TK[:, :1]
    key = (row_T[scenarios.token_T] * num_pieces + scenarios.piece_T)[
        :, None
    ] * profile.num_experts + experts_TK
    count = np.bincount(key.ravel(), minlength=num_rows * num_pieces * profile.num_experts)
    count_HPE = count.reshape(num_rows, num_pieces, profile.num_experts) * scenarios.scale_P[None, :, None]
    return np.asarray(np.tensordot(enter_HG.T, count_HPE, axes=1).transpose(0, 2, 1))


def _mixed(volume_GEP: FloatArray, mix_WM: IntArray, scenarios: Scenarios) -> FloatArray:
    """Mix pieces into scenarios as the loads are mixed, over the last axis."""
    shrink = scenarios.plan.shrink
    mixed = volume_GEP[..., mix_WM].mean(axis=-1)
    return np.asarray((1 - shrink) * mixed + shrink * volume_GEP.mean(axis=-1, keepdims=True))


def _stay_put_volumes(
    model: CostModel,
    layer: int,
    scenarios: Scenarios,
    links: tuple[Link, ...],
    mix_WM: IntArray,
    neighbours: Neighbours,
) -> tuple[FloatArray, FloatArray, Terms]:
    """Volumes of the exchanges into a layer and into the next one, given where tokens come from and go.

    A token whose next device is in group g enters it unless it is there already: the exchange into the next
    layer receives a fixed volume less what this layer's experts keep in the group.
    """
    profile = model.problem.profile
    arriving, leaving, base = [], [], []
    for link in links:
        outside_HG = np.where(link.group_D[:, None] != np.arange(link.num_groups), link.enter_HG[1:], 0.0)
        enter_HG = np.vstack([np.zeros(link.num_groups), outside_HG])
        into = _entering(
            profile, layer, scenarios, enter_HG, all_positions=False, row_T=neighbours.previous_T + 1
        )
        inside_HG = np.where(
            link.group_D[:, None] == np.arange(link.num_groups), outside_HG.max(axis=0)[None, :], 0.0
        )
        keep_HG = np.vstack([np.zeros(link.num_groups), inside_HG])
        kept = _entering(profile, layer, scenarios, keep_HG, all_positions=False, row_T=neighbours.next_T + 1)
        arriving.append(_pad_groups(_mixed(into, mix_WM, scenarios), model.problem.num_devices))
        leaving.append(_pad_groups(-_mixed(kept, mix_WM, scenarios), model.problem.num_devices))
        base.append(_pad_groups(_mixed(kept.sum(axis=1), mix_WM, scenarios), model.problem.num_devices))
    none: list[Any] = [None] * len(links)
    curves = [link.dispatch for link in links]
    base_JGW = np.stack([np.zeros_like(b) for b in base] + base)
    return np.stack(arriving + leaving), base_JGW, _curves([curves + none, none + curves])


def _pad_groups(volume_G: FloatArray, num_devices: int) -> FloatArray:
    """Pad the leading axis of groups to the number of devices."""
    padding = [(0, num_devices - volume_G.shape[0])] + [(0, 0)] * (volume_G.ndim - 1)
    return np.pad(volume_G, padding)
