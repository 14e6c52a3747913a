"""What every group of experts costs on every kind of part, window by window: all of a layer's objective.

A layer's cost in a window is a sum over phases (experts, dispatch, combine) of the costliest part, a device
or a group of devices, and what a part costs depends on the experts that it holds alone. So a layer is known
once a table per kind of part gives the cost of every subset of the right size; the tokens that touch a
subset are counted for all subsets at once by summing over subsets of its complement.

Shape letters: W windows, E experts, M masks, R masks of one size, Y phases, H homes, T tokens, K top-k.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.calibration import PiecewiseLinear
from placement.cost import CostModel
from placement.cost.links import Link
from placement.cost.model import home_loads
from placement.problem import Objective, Semantics
from placement.profile import RoutingProfile
from placement.solvers.exact.layout import Layout, Part, exchange_links, homes_matter
from placement.solvers.exact.subsets import Subsets

__all__ = ["LayerTables", "count_touching", "expert_costs", "expert_order", "make_tables", "token_masks"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTables:
    """One layer, priced for every subset of its experts.

    Parameters
    ----------
    order_E
        Expert behind each bit of a mask.
    kind_RYW
        By kind of part: cost of each subset of its size in each phase and window.
    """

    order_E: IntArray
    kind_RYW: dict[int, FloatArray]


def expert_order(profile: RoutingProfile, layer: int) -> IntArray:
    """Experts of a layer by falling load, ``[experts]``."""
    return np.argsort(-profile.load_WLE[:, layer].sum(axis=0), kind="stable")


def make_tables(
    model: CostModel, layer: int, layout: Layout, subsets: Subsets, *, order_E: IntArray | None = None
) -> LayerTables:
    """Price every subset of a layer's experts on every kind of part.

    For stay-put semantics the exchange is the way from known homes into the layer, which only the first
    layer has; that between layers is no property of one layer.
    """
    if order_E is None:
        order_E = expert_order(model.problem.profile, layer)
    links = exchange_links(model)
    if model.problem.semantics is Semantics.STAY_PUT and (layer > 0 or model.problem.profile.home_T is None):
        links = ()
    parts = (*layout.devices, *layout.groups)
    sizes = frozenset(part.slots for part in parts)
    volumes = _Volumes(model, layer, links, order_E, subsets, sizes) if links else None
    experts_KWE = expert_costs(model, layer)[:, :, order_E]
    tables = {}
    for part in parts:
        if part.kind not in tables:
            experts_WE = experts_KWE[_kind_of(model, part)] if part.first == part.last else None
            tables[part.kind] = _price(part, subsets, experts_WE, volumes, model.problem.profile.num_windows)
    return LayerTables(order_E=order_E, kind_RYW=tables)


def _kind_of(model: CostModel, part: Part) -> int:
    timed = model.problem.objective is Objective.STEP_TIME
    return int(model.problem.topology.kind_of_device_D[part.devices[0]]) if timed else 0


def expert_costs(model: CostModel, layer: int) -> FloatArray:
    """Cost of one expert in each window, ``[device kinds, windows, experts]``.

    Time; under the balance objective shares of the mean device load.
    """
    problem = model.problem
    load_WE = problem.profile.load_WLE[:, layer]
    if problem.objective is Objective.STEP_TIME:
        return np.stack([curve(load_WE) for curve in model.expert_curves])
    mean_W1 = load_WE.sum(axis=1, keepdims=True) / problem.num_devices
    # A window without tokens counts as balanced: one, however its experts are placed.
    even = np.full_like(load_WE, problem.num_devices / problem.num_experts)
    return np.asarray(np.divide(load_WE, mean_W1, out=even, where=mean_W1 > 0)[None])


def _price(
    part: Part, subsets: Subsets, experts_WE: FloatArray | None, volumes: _Volumes | None, num_windows: int
) -> FloatArray:
    """Cost of each subset on one part, ``[masks of its size, phases, windows]``."""
    members_RE = subsets.members(part.slots)
    num_phases = 1 if volumes is None else 1 + volumes.num_phases
    cost_RYW = np.zeros((len(members_RE), num_phases, num_windows))
    if experts_WE is not None:
        cost_RYW[:, 0] = members_RE @ experts_WE.T
    if volumes is not None:
        for j in part.links:
            volumes.charge(cost_RYW[:, 1:], part, j)
    return cost_RYW


class _Volumes:
    """Received volumes of subsets, and what the links charge for them."""

    def __init__(
        self,
        model: CostModel,
        layer: int,
        links: tuple[Link, ...],
        order_E: IntArray,
        subsets: Subsets,
        sizes: frozenset[int],
    ) -> None:
        self.model, self.layer, self.links = model, layer, links
        self.order_E, self.subsets, self.sizes = order_E, subsets, sizes
        self.curves = [_curves(link, model.problem.semantics, len(links)) for link in links]
        self.num_phases = len(self.curves[0])
        self.by_home = homes_matter(model.problem, links)
        self.everyone: dict[int, FloatArray] | None = None

    def charge(self, cost_RYW: FloatArray, part: Part, j: int) -> None:
        """Raise a part's exchange costs to what one of its links charges."""
        link = self.links[j]
        group = int(link.group_D[part.devices[0]])
        by_pair = self.model.problem.semantics is Semantics.DISPATCH_NODEDUP
        volume_RW = self._pairs(link, group, part.slots) if by_pair else self._tokens(link, group, part.slots)
        for phase, curve in enumerate(self.curves[j]):
            np.maximum(cost_RYW[:, phase], curve(volume_RW), out=cost_RYW[:, phase])

    def _pairs(self, link: Link, group: int, size: int) -> FloatArray:
        """Pairs that enter a group with each subset of a size, ``[masks, windows]``."""
        profile, enter_H = self.model.problem.profile, link.enter_HG[:, group]
        if profile.home_T is None:
            pairs_WE = profile.load_WLE[:, self.layer] * enter_H[0]
        else:
            home_WHE = home_loads(profile, self.layer, num_homes=enter_H.size)
            pairs_WE = np.einsum("whe,h->we", home_WHE, enter_H)
        return np.asarray(self.subsets.members(size) @ pairs_WE[:, self.order_E].T)

    def _tokens(self, link: Link, group: int, size: int) -> FloatArray:
        """Tokens that enter a group with each subset of a size, ``[masks, windows]``."""
        enter_H = link.enter_HG[:, group]
        if self.by_home:
            return self._touching(self._enter_rows(link, group))[size]
        if self.everyone is None:
            self.everyone = self._touching(np.ones(enter_H.size))
        return np.asarray(self.everyone[size] * enter_H[0])

    def _enter_rows(self, link: Link, group: int) -> FloatArray:
        """What a token adds to a group's volume by home, ``[homes]``; row 0 for unknown ones."""
        enter_H = link.enter_HG[:, group].copy()
        if self.model.problem.semantics is Semantics.STAY_PUT:
            # A token enters the first layer for nothing where its home is unknown or already in the group.
            enter_H[0] = 0.0
            enter_H[1:][link.group_D == group] = 0.0
        return enter_H

    def _touching(self, enter_H: FloatArray) -> dict[int, FloatArray]:
        profile = self.model.problem.profile
        first_only = self.model.problem.semantics is Semantics.STAY_PUT
        mask_T = token_masks(profile, self.layer, self.order_E, first_only=first_only)
        home_T = np.zeros(mask_T.size, dtype=np.int64) if profile.home_T is None else profile.home_T + 1
        window_T = profile.window_of_token_T
        assert window_T is not None
        weight_T = enter_H[home_T] * profile.token_weight_T
        return count_touching(mask_T, window_T, weight_T, profile.num_windows, self.subsets, self.sizes)


def _curves(link: Link, semantics: Semantics, num_links: int) -> tuple[PiecewiseLinear, ...]:
    """Curves of the phases of an exchange; one where a single link makes both alike monotone."""
    if semantics is Semantics.STAY_PUT:
        return (link.dispatch,)
    if num_links > 1:
        return link.dispatch, link.combine
    x = np.union1d(link.dispatch.x, link.combine.x)
    # A point beyond both curves' last carries both last slopes on.
    x = np.append(x, 2.0 * x[-1])
    return (PiecewiseLinear(x=x, y=link.dispatch(x) + link.combine(x)),)


def token_masks(
    profile: RoutingProfile, layer: int, order_E: IntArray, *, first_only: bool = False
) -> IntArray:
    """Experts of every sampled token as a mask, ``[tokens]``."""
    assert profile.experts_TLK is not None
    bit_E = np.empty(order_E.size, dtype=np.int64)
    bit_E[order_E] = np.int64(1) << np.arange(order_E.size)
    experts_TK = profile.experts_TLK[:, layer]
    used_TK = experts_TK[:, :1] if first_only else experts_TK
    return np.asarray(bit_E[used_TK].sum(axis=1))


def count_touching(
    mask_T: IntArray,
    window_T: IntArray,
    weight_T: FloatArray,
    num_windows: int,
    subsets: Subsets,
    sizes: frozenset[int],
) -> dict[int, FloatArray]:
    """Weight of the tokens that touch each subset, by size, ``[masks of that size, windows]``.

    A subset is missed by the tokens whose experts all lie in its complement, so one sum over subsets for
    each window serves all of them. `window_T` ascends; tokens beyond the last window are left out.
    """
    every = (1 << subsets.num_experts) - 1
    touching = {size: np.empty((subsets.of_size(size).size, num_windows)) for size in sizes}
    bounds = np.searchsorted(window_T, np.arange(num_windows + 1))
    for window, (first, last) in enumerate(itertools.pairwise(bounds)):
        within_M = np.bincount(mask_T[first:last], weights=weight_T[first:last], minlength=every + 1)
        for expert in range(subsets.num_experts):
            pair_M = within_M.reshape(-1, 2, 1 << expert)
            pair_M[:, 1] += pair_M[:, 0]
        for size, touching_RW in touching.items():
            touching_RW[:, window] = within_M[every] - within_M[every ^ subsets.of_size(size)]
    return touching
