"""Fewest hops of a stay-put chain whose placements are too many to list: what one device holds is a path.

A path is one group of experts per layer; it keeps the tokens that go from each group to the next. A placement
is a path for every device such that each expert of each layer lies on exactly one. So the most tokens kept is
a set partitioning problem over paths, solved in three steps:

1. Incumbents: any two devices' paths are divided anew in the best way (a chain of few states), pair by pair,
   from many random starts.
2. Bound: the linear relaxation by column generation (Dantzig and Wolfe, Operations Research 8, 1960) with
   smoothed duals (Wentges, Int. Trans. Oper. Res. 4, 1997). With a price for every expert of every layer, no
   placement keeps more than the sum of all prices and, for each device, the most that a path keeps beyond
   the prices of its experts.
3. Proof: the shortfalls of a placement's paths from that maximum add up to the bound less what it keeps.
   A placement better than the incumbent therefore consists of paths with small shortfalls: all of these are
   listed and combined, smallest first, until two devices are left, whose experts are divided as in step 1.

Groups above the load limit are left out throughout, which makes the limit exact.

Shape letters: L layers, E experts, D devices, R groups of one size by rank, N paths, M masks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement.bounds import LowerBound
from placement.plan import Placement
from placement.solvers.exact.layout import make_layout
from placement.solvers.exact.proof import PROOF_STEP
from placement.solvers.exact.rows import masks_of_layer, row_of_masks
from placement.solvers.exact.separate import device_limit
from placement.solvers.exact.subsets import Subsets
from placement.solvers.protocol import SolveRequest

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix

__all__ = ["solve_paths"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NUM_STARTS = 400
"""Random starts of the search for incumbents."""

MAX_ROUNDS = 200
"""Rounds of column generation."""

ROUND_GAP = 0.05
"""Column generation ends when the relaxation could still fall by this share of the gap to the incumbent."""

SMOOTHING = 0.6
"""Weight of the best prices so far in the prices that paths are sought with."""

PATHS_PER_LAYER = 40
"""Best groups of every layer through which a round adds the best path, beside one for every expert."""

MOST_PATHS = 100_000
"""Paths listed for a proof."""

FEW_PATHS = 200
"""Paths so few that their combinations are tried at once, without a tighter bound."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Groups:
    """Groups of one size, as all devices of that size may hold them.

    Parameters
    ----------
    devices
        Devices of that size, as positions of the layout.
    mask_R, members_RE
        The groups.
    kept_LRR
        Tokens kept between a group and one of the next layer, ``[layers - 1, groups, groups]``.
    allowed_LR
        Whether a group keeps the load limit.
    """

    devices: tuple[int, ...]
    mask_R: IntArray
    members_RE: FloatArray
    kept_LRR: FloatArray
    allowed_LR: npt.NDArray[np.bool_]

    def values(self, price_LE: FloatArray, *, forbidden: float = -np.inf) -> FloatArray:
        """Return what each group is worth by itself at some prices, ``[layers, groups]``."""
        return np.where(self.allowed_LR, 0.0, forbidden) - price_LE @ self.members_RE.T

    def kept(self, path_NL: IntArray) -> FloatArray:
        """Tokens kept by some paths, ``[paths]``."""
        layers = np.arange(len(self.kept_LRR))
        return np.asarray(self.kept_LRR[layers, path_NL[:, :-1], path_NL[:, 1:]].sum(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Bound:
    """Prices of experts, and what no placement can exceed by them.

    `most_S` is the most that a path is worth, by size of device.
    """

    price_LE: FloatArray
    most_S: tuple[float, ...]
    most: float


@dataclass(slots=True, eq=False)
class _Columns:
    """Paths of one size of device in the relaxation."""

    seen: set[tuple[int, ...]] = field(default_factory=set)
    paths: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, path: IntArray) -> None:
        """Add a path unless it is there."""
        key = tuple(path.tolist())
        if key not in self.seen:
            self.seen.add(key)
            self.paths.append(key)


def solve_paths(request: SolveRequest, start: Placement) -> Placement:
    """Return the placement with the fewest hops, proved; stopped early, the best one and what is known."""
    return _Paths(request, start).solve()


class _Paths:
    """One solve."""

    def __init__(self, request: SolveRequest, start: Placement) -> None:
        self.request, self.start = request, start
        self.model, self.problem = request.model, request.problem
        self.layout = make_layout(request.model)
        self.subsets = Subsets(self.problem.num_experts)
        slots = [part.slots for part in self.layout.devices]
        self.sizes = sorted(set(slots))
        transitions_LEE = np.stack(
            [self.problem.profile.transitions(layer) for layer in range(self.problem.num_layers - 1)]
        )
        self.groups = [
            self._make_groups(size, tuple(i for i, s in enumerate(slots) if s == size), transitions_LEE)
            for size in self.sizes
        ]
        self.size_P = [self.sizes.index(s) for s in slots]
        self.total = float(transitions_LEE.sum())
        self.columns = [_Columns() for _ in self.sizes]
        self.best_PL = self._ranks(start)
        self.most_kept = self._kept(self.best_PL) if self._is_allowed(self.best_PL) else -np.inf

    def _make_groups(self, size: int, devices: tuple[int, ...], transitions_LEE: FloatArray) -> _Groups:
        members_RE = self.subsets.members(size)
        load_LE = self.problem.profile.load_WLE.sum(axis=0)
        limit_L = np.array([device_limit(self.model, load_E) for load_E in load_LE])
        return _Groups(
            devices=devices,
            mask_R=self.subsets.of_size(size),
            members_RE=members_RE,
            kept_LRR=np.ascontiguousarray(members_RE @ transitions_LEE @ members_RE.T),
            allowed_LR=load_LE @ members_RE.T <= limit_L[:, None],
        )

    def solve(self) -> Placement:
        """Find, bound, and close the gap between the two."""
        self._search()
        if self.request.stop():
            return self._placement()
        bound = self._bound()
        if bound is not None:
            proved = self._close(bound)
            self._prove(bound, proved)
        return self._placement()

    def _prove(self, bound: _Bound, proved: bool) -> None:
        layer_L = np.full(self.problem.num_layers, -np.inf)
        if proved and np.isfinite(self.most_kept):
            value = self.model.objective(self._placement()) * PROOF_STEP
        else:
            # Prices may be any numbers: the bound holds but for the rounding of some sums.
            value = max(0.0, 1.0 - bound.most * (1 + 1e-11) / self.total)
        self.request.prove(LowerBound(value=value, layer_L=layer_L))

    # Incumbents.

    def _search(self) -> None:
        """Descend from the start and from random placements; their paths begin the relaxation."""
        rng = np.random.default_rng([self.request.seed, 16])
        self._descend(self._ranks(self.start))
        for _ in range(NUM_STARTS):
            if self.request.stop():
                break
            self._descend(self._random(rng))

    def _random(self, rng: np.random.Generator) -> IntArray:
        path_PL = np.empty((len(self.size_P), self.problem.num_layers), dtype=np.int64)
        ends = np.cumsum([self.sizes[s] for s in self.size_P])[:-1]
        for layer in range(self.problem.num_layers):
            held = np.split(np.int64(1) << rng.permutation(self.problem.num_experts), ends)
            path_PL[:, layer] = self.subsets.rank_M[[int(bits.sum()) for bits in held]]
        return path_PL

    def _descend(self, path_PL: IntArray) -> None:
        """Divide pairs of devices anew until none gains; keep the paths, and a better placement."""
        settled: set[tuple[int, int]] = set()
        pairs = list(itertools.combinations(range(len(path_PL)), 2))
        while len(settled) < len(pairs):
            for pair in pairs:
                if pair in settled or self.request.stop():
                    settled.add(pair)
                elif self._divide(path_PL, *pair):
                    settled = {other for other in settled if not {*other} & {*pair}}
                settled.add(pair)
        for path_L, size in zip(path_PL, self.size_P, strict=True):
            self.columns[size].add(path_L)
        self._offer(path_PL)

    def _divide(self, path_PL: IntArray, first: int, second: int) -> bool:
        """Divide what two devices hold between them in the best way; say whether that gains."""
        penalty = -self.total
        before = self._worth(path_PL, first, penalty) + self._worth(path_PL, second, penalty)
        held_L = self._masks(path_PL, first) | self._masks(path_PL, second)
        after, first_L, second_L = self._split(held_L, first, second, forbidden=penalty)
        if after <= before + 1e-9 * self.total:
            return False
        path_PL[first], path_PL[second] = first_L, second_L
        return True

    def _split(
        self, held_L: IntArray, first: int, second: int, *, forbidden: float
    ) -> tuple[float, IntArray, IntArray]:
        from placement.solvers.exact.kernels import split_in_two

        one, other = self.groups[self.size_P[first]], self.groups[self.size_P[second]]
        free_LE = np.zeros((self.problem.num_layers, self.problem.num_experts))
        first_L, second_L = np.zeros((2, self.problem.num_layers), dtype=np.int64)
        worth = split_in_two(
            one.kept_LRR,
            other.kept_LRR,
            one.values(free_LE, forbidden=forbidden),
            other.values(free_LE, forbidden=forbidden),
            held_L,
            one.mask_R,
            self.subsets.rank_M,
            first_L,
            second_L,
        )
        return float(worth), first_L, second_L

    def _worth(self, path_PL: IntArray, position: int, penalty: float) -> float:
        groups, path_L = self.groups[self.size_P[position]], path_PL[position]
        over = ~groups.allowed_LR[np.arange(path_L.size), path_L]
        return float(groups.kept(path_L[None])[0] + penalty * over.sum())

    def _masks(self, path_PL: IntArray, position: int) -> IntArray:
        return np.asarray(self.groups[self.size_P[position]].mask_R[path_PL[position]])

    def _kept(self, path_PL: IntArray) -> float:
        return sum(self._worth(path_PL, position, 0.0) for position in range(len(path_PL)))

    def _is_allowed(self, path_PL: IntArray) -> bool:
        layers = np.arange(self.problem.num_layers)
        return all(
            self.groups[size].allowed_LR[layers, path_L].all()
            for path_L, size in zip(path_PL, self.size_P, strict=True)
        )

    def _offer(self, path_PL: IntArray) -> None:
        """Keep a placement if it is allowed and better."""
        kept = self._kept(path_PL)
        if kept > self.most_kept * (1 + 1e-12) and self._is_allowed(path_PL):
            self.best_PL, self.most_kept = path_PL.copy(), kept
            self.request.report(self._placement())

    # Bound.

    def _bound(self) -> _Bound | None:
        """Solve the linear relaxation over all paths; None when stopped before anything was known."""
        shape = (self.problem.num_layers, self.problem.num_experts)
        price_LE = np.full(shape, max(self.most_kept, 0.0) / (shape[0] * shape[1]))
        best: _Bound | None = None
        for _ in range(MAX_ROUNDS):
            relaxed, price_LE = self._relax()
            if best is not None:
                price_LE = SMOOTHING * best.price_LE + (1 - SMOOTHING) * price_LE
            bound = self._price(price_LE)
            best = bound if best is None or bound.most < best.most else best
            gap = best.most - max(self.most_kept, 0.0)
            done = best.most - relaxed <= ROUND_GAP * gap or self._list_paths(best, FEW_PATHS) is not None
            if done or self.request.stop():
                break
        return best

    def _relax(self) -> tuple[float, FloatArray]:
        """Solve the relaxation over the paths so far: its value, and the prices of experts."""
        from scipy.optimize import linprog

        kept_N, cover = self._columns_as_rows()
        right = np.ones(cover.shape[0])
        right[cover.shape[0] - len(self.groups) :] = [len(groups.devices) for groups in self.groups]
        solved = linprog(-kept_N, A_eq=cover, b_eq=right, bounds=(0, None), method="highs-ds")
        if solved.status != 0:
            raise RuntimeError(f"the relaxation over {kept_N.size} paths was not solved: {solved.message}")
        price = -solved.eqlin.marginals[: self.problem.num_layers * self.problem.num_experts]
        return float(-solved.fun), price.reshape(self.problem.num_layers, self.problem.num_experts)

    def _columns_as_rows(self) -> tuple[FloatArray, csc_matrix]:
        """What the paths keep, and which experts of which layers they hold; last, of which size they are."""
        from scipy.sparse import csc_matrix, vstack

        layers = np.arange(self.problem.num_layers)
        kept, held, size_N = [], [], []
        for size, (groups, columns) in enumerate(zip(self.groups, self.columns, strict=True)):
            path_NL = np.array(columns.paths, dtype=np.int64).reshape(-1, layers.size)
            over_N = (~groups.allowed_LR[layers, path_NL]).sum(axis=1)
            kept.append(groups.kept(path_NL) - self.total * over_N)
            held.append(groups.members_RE[path_NL].reshape(len(path_NL), -1))
            size_N += [size] * len(path_NL)
        of_size = np.array(size_N) == np.arange(len(self.groups))[:, None]
        cover = csc_matrix(np.concatenate(held).T)
        return np.concatenate(kept), csc_matrix(vstack([cover, csc_matrix(of_size.astype(np.float64))]))

    def _price(self, price_LE: FloatArray) -> _Bound:
        """Find the paths worth most at some prices, add them to the relaxation, and bound by them."""
        from placement.solvers.exact.kernels import best_ahead, best_behind

        most_S = []
        for groups, columns in zip(self.groups, self.columns, strict=True):
            value_LR = groups.values(price_LE)
            behind_LR = best_behind(groups.kept_LRR, value_LR)
            ahead_LR = best_ahead(groups.kept_LRR, value_LR)
            self._add_paths(groups, columns, value_LR, behind_LR, ahead_LR)
            most_S.append(float((behind_LR + ahead_LR).max()))
        devices_S = [len(groups.devices) for groups in self.groups]
        most = float(price_LE.sum()) + float(np.dot(devices_S, most_S))
        return _Bound(price_LE=price_LE, most_S=tuple(most_S), most=most)

    def _add_paths(
        self,
        groups: _Groups,
        columns: _Columns,
        value_LR: FloatArray,
        behind_LR: FloatArray,
        ahead_LR: FloatArray,
    ) -> None:
        """Add the best paths through the best groups of every layer, and through every expert."""
        from placement.solvers.exact.kernels import best_through

        worth_LR = behind_LR + ahead_LR
        path_L = np.zeros(len(value_LR), dtype=np.int64)
        for layer, worth_R in enumerate(worth_LR):
            held_worth_ER = np.where(groups.members_RE.T > 0, worth_R, -np.inf)
            through = np.concatenate([np.argsort(-worth_R)[:PATHS_PER_LAYER], held_worth_ER.argmax(axis=1)])
            for rank in np.unique(through).tolist():
                if np.isfinite(worth_R[rank]):
                    best_through(groups.kept_LRR, value_LR, behind_LR, ahead_LR, layer, rank, path_L)
                    columns.add(path_L)

    # Proof.

    def _close(self, bound: _Bound) -> bool:
        """Try everything that could beat the incumbent; say whether that was done to the end."""
        listed = self._list_paths(bound, MOST_PATHS)
        return listed is not None and self._combine(listed, bound)

    def _gap(self, bound: _Bound) -> float:
        """How much more than the incumbent a placement could keep, with some room for rounding."""
        return bound.most - self.most_kept + 1e-9 * self.total

    def _list_paths(self, bound: _Bound, most_paths: int) -> _Listed | None:
        """List all paths that fall short by at most their share of the gap; None if there are more than that.

        All but the last two devices are combined from the list, smallest shortfall first: each of these falls
        short by no more than a third of the gap.
        """
        from placement.solvers.exact.kernels import best_ahead, every_path

        num_layers = self.problem.num_layers
        short, masks, size_N = [], [], []
        for size, groups in enumerate(self.groups):
            value_LR = groups.values(bound.price_LE)
            out_NL = np.empty((most_paths, num_layers), dtype=np.int64)
            least = bound.most_S[size] - self._gap(bound) / 3
            scratch = np.zeros(num_layers, dtype=np.int64), np.zeros(num_layers)
            ahead_LR = best_ahead(groups.kept_LRR, value_LR)
            found = every_path(groups.kept_LRR, value_LR, ahead_LR, least, *scratch, out_NL)
            if found > most_paths:
                return None
            path_NL = out_NL[:found]
            worth_N = groups.kept(path_NL) + value_LR[np.arange(num_layers), path_NL].sum(axis=1)
            short.append(np.maximum(bound.most_S[size] - worth_N, 0.0))
            masks.append(groups.mask_R[path_NL])
            size_N += [size] * found
        order = np.argsort(np.concatenate(short), kind="stable")
        return _Listed(
            short_N=np.concatenate(short)[order],
            mask_NL=np.concatenate(masks)[order],
            size_N=np.array(size_N, dtype=np.int64)[order],
        )

    def _combine(self, listed: _Listed, bound: _Bound) -> bool:
        """Go through all sets of disjoint paths that could beat the incumbent; False when stopped."""
        room_S = [len(groups.devices) for groups in self.groups]
        every = (1 << self.problem.num_experts) - 1
        held_L = np.full(self.problem.num_layers, every, dtype=np.int64)
        return self._extend(listed, bound, np.arange(listed.short_N.size), [], room_S, held_L, 0.0)

    def _extend(
        self,
        listed: _Listed,
        bound: _Bound,
        free_N: IntArray,
        chosen: list[int],
        room_S: list[int],
        left_L: IntArray,
        short: float,
    ) -> bool:
        """Add one more path, each of those that are disjoint from the chosen ones, or finish with a split."""
        devices = sum(room_S)
        if devices <= 2:
            self._finish(listed, chosen, left_L)
            return True
        for at, path in enumerate(free_N.tolist()):
            # The paths to come fall short by this one's shortfall or more.
            if short + devices * listed.short_N[path] > self._gap(bound):
                break
            if self.request.stop():
                return False
            size = int(listed.size_N[path])
            if room_S[size] == 0:
                continue
            later_N = free_N[at + 1 :]
            disjoint_N = ~(listed.mask_NL[later_N] & listed.mask_NL[path]).any(axis=1)
            room = [count - (s == size) for s, count in enumerate(room_S)]
            if not self._extend(
                listed,
                bound,
                later_N[disjoint_N],
                [*chosen, path],
                room,
                left_L ^ listed.mask_NL[path],
                short + float(listed.short_N[path]),
            ):
                return False
        return True

    def _finish(self, listed: _Listed, chosen: list[int], left_L: IntArray) -> None:
        """Divide what is left between the last two devices in the best way, and offer the placement."""
        path_PL = np.empty((len(self.size_P), self.problem.num_layers), dtype=np.int64)
        free = {size: list(groups.devices) for size, groups in enumerate(self.groups)}
        for path in chosen:
            path_PL[free[int(listed.size_N[path])].pop()] = self.subsets.rank_M[listed.mask_NL[path]]
        first, second = itertools.chain(*free.values())
        worth, path_PL[first], path_PL[second] = self._split(left_L, first, second, forbidden=-np.inf)
        if np.isfinite(worth):
            self._offer(path_PL)

    # Placements.

    def _ranks(self, placement: Placement) -> IntArray:
        """Group at each position and layer, by rank among those of its size, ``[positions, layers]``."""
        order_E = np.arange(self.problem.num_experts)
        masks = [
            masks_of_layer(placement, layer, self.layout, order_E) for layer in range(self.problem.num_layers)
        ]
        return np.asarray(self.subsets.rank_M[np.stack(masks, axis=1)], dtype=np.int64)

    def _placement(self) -> Placement:
        order_E = np.arange(self.problem.num_experts)
        mask_PL = np.stack([self._masks(self.best_PL, p) for p in range(len(self.best_PL))])
        rows = [row_of_masks(self.problem, self.layout, order_E, mask_P) for mask_P in mask_PL.T]
        return self.start.with_layers(np.stack(rows))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Listed:
    """Paths by rising shortfall from the most that one is worth: their experts, their size of device."""

    short_N: FloatArray
    mask_NL: IntArray
    size_N: IntArray
