"""The least cost of a partition whose fullest group counts in each window, by columns of whole groups.

Exactly one group holds expert e. So where a partition is a choice of sets of experts, and ``z[S]`` says
which, the fullest group of a window costs at least ``sum over S that hold e of z[S] cost[S, w]``, for every
e: rows that tell devices apart without naming them. With 0 <= z the least sum over windows is a linear
program (Dantzig and Wolfe, Oper. Res. 8, 1960) whose columns are listed, not searched for.

Few of its columns and rows matter. A master program over some of them proposes weights ``part[e, w]`` of the
rows, which are mixed with the best weights so far (Wentges, Int. Trans. Oper. Res. 4, 1997). For any weights,
with no more than 1 in each window, the cheapest cover of the experts by sets that cost

    price[S] = sum over e in S and w of part[e, w] cost[S, w]

bounds the partition; and for any prices of experts so does what they add up to, with as many times the
least reduced cost of *all* sets as there are groups. Nothing rests on the programs' own arithmetic.

Where windows are many, masters see consecutive ones merged, and weights for all of them answer the choice of
sets that the last master made.

Shape letters: S sets of experts, M members, E experts and the dummy, X windows of all parts, R rows kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.bounds.columns import GroupColumns
from placement.bounds.terms import soft_maximum

__all__ = ["Fullest", "cheapest_cover", "least_fullest"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SEARCHED_COLUMNS = 2000
"""Cheapest columns among which a pricing looks for some that a program lacks."""

ENOUGH = 6
"""Columns of each expert that a pricing adds, if there are as many."""

COVER_ROUNDS = 4
"""Pricings for one cover's prices of experts."""

MOST_COLUMNS = 500
"""Columns that a cover's program starts with, of those that earlier ones were about."""

MIXED = 0.5
"""Part of the master's weights in the mixture with the best weights so far."""

FIRST_ROWS = 3
"""Experts of each window whose rows the first master has."""

CLOSE = 1e-3
"""What is left between the bound and the master's value, as a part of it, when rounds end early."""

MOST_WINDOWS = 80
"""Windows of a part beyond which masters are of consecutive windows merged."""

FOLLOWED = 3
"""Bounds for all windows, after the masters of merged ones."""

SOFT_START = 4
"""The first of these moves the choice of sets by one part in so many."""

PROGRAM_SIZE = 1e4
"""Size of the objective in programs, whose tolerances are absolute."""

ROUNDING = 1e-9
"""What bounds are stepped back by, against the sum of the magnitudes in them; doubles err by far less."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fullest:
    """A part of the objective: the sum over windows of the dearest group, or more.

    Parameters
    ----------
    cost_SW
        What each set costs in each window where it is a group, at least 0, ``[sets, windows]``.
    floor_W
        What each window costs at least for some other reason, ``[windows]``.
    """

    cost_SW: FloatArray
    floor_W: FloatArray

    def merged(self) -> Fullest:
        """Return a part that is no more, with consecutive windows merged where they are too many."""
        num_windows = self.floor_W.size
        if num_windows <= MOST_WINDOWS:
            return self
        first_B = np.arange(0, num_windows, -(-num_windows // MOST_WINDOWS))
        return Fullest(
            cost_SW=np.add.reduceat(self.cost_SW, first_B, axis=1),
            floor_W=np.add.reduceat(self.floor_W, first_B),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cover:
    """A bound on covers by sets, and how it was found.

    Parameters
    ----------
    value
        No partition's sets cost less.
    price_E
        Prices of experts and the dummy.
    reduced_S
        What sets cost beyond the prices of their members.
    """

    value: float
    price_E: FloatArray
    reduced_S: FloatArray


def cheapest_cover(columns: GroupColumns, cost_S: FloatArray, *, rounds: int) -> float:
    """Bound the least total cost of the groups of a partition.

    Parameters
    ----------
    cost_S
        What each set costs where it is a group, ``[sets]``.
    rounds
        Programs to solve.
    """
    scale = _unit(cost_S[columns.any_partition].sum())
    return _Covers(columns).bound(cost_S / scale, rounds=rounds).value * scale


class _Covers:
    """Finds prices of experts, from the columns that mattered before.

    Parameters
    ----------
    columns
        All sets that can be a group.
    """

    def __init__(self, columns: GroupColumns) -> None:
        self.columns = columns
        self.pool = np.sort(columns.any_partition)
        self.chosen_S = np.zeros(len(columns.members_SM))
        self.price_E: FloatArray | None = None

    def bound(self, cost_S: FloatArray, *, rounds: int) -> _Cover:
        """Bound covers by sets of some costs."""
        columns = self.columns
        price_E = self.price_E if self.price_E is not None else _even_prices(columns, cost_S)
        best = latest = _cover(columns, cost_S, price_E)
        for _ in range(rounds):
            self.pool = np.union1d(self.pool, _varied(columns, latest.reduced_S))
            solved = self._solve(cost_S)
            if solved is None:
                break
            value, price_E = solved
            latest = _cover(columns, cost_S, price_E)
            if latest.value > best.value:
                best = latest
            if value - best.value <= CLOSE / 4 * abs(value):
                break
        self.price_E = best.price_E
        kept = self.pool[_least(best.reduced_S[self.pool], MOST_COLUMNS)]
        self.pool = np.union1d(columns.any_partition, kept)
        return best

    def _solve(self, cost_S: FloatArray) -> tuple[float, FloatArray] | None:
        """Return value and prices of the program of the columns at hand; one that fails proves nothing."""
        from scipy.optimize import linprog

        solved = linprog(
            cost_S[self.pool],
            A_eq=_membership(self.columns, self.pool),
            b_eq=_demand(self.columns),
            method="highs-ds",
        )
        if not solved.success:
            return None
        self.chosen_S[:] = 0.0
        self.chosen_S[self.pool] = solved.x
        return float(solved.fun), _with_dummy(self.columns, solved.eqlin.marginals)


def least_fullest(columns: GroupColumns, parts: Sequence[Fullest], *, rounds: int) -> float:
    """Bound the sum over windows and parts of the dearest group.

    Parameters
    ----------
    parts
        What to add up.
    rounds
        Masters to solve.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        merged = [part.merged() for part in parts]
        ascent = _Ascent(columns, merged)
        best = ascent.run(rounds)
        if merged != list(parts):
            best = max(best, _Ascent(columns, parts).follow(ascent.chosen_S, FOLLOWED))
    return best


class _Ascent:
    """Alternates between masters and bounds.

    Parameters
    ----------
    columns, parts
        As for `least_fullest`.
    """

    def __init__(self, columns: GroupColumns, parts: Sequence[Fullest]) -> None:
        self.columns = columns
        cost_SX = np.concatenate([part.cost_SW for part in parts], axis=1)
        self.scale = _unit(cost_SX[columns.any_partition].max(axis=0).sum())
        cost_SX /= self.scale
        self.cost_SX = cost_SX
        self.floor_X = np.concatenate([part.floor_W for part in parts]) / self.scale
        self.covers = _Covers(columns)
        self.pool = columns.any_partition
        self.chosen_S = np.full(len(cost_SX), columns.groups.num_groups / len(cost_SX))
        self.rows = np.empty(0, dtype=np.int64)

    def run(self, rounds: int) -> float:
        """Solve some masters, each followed by a bound for weights near its own."""
        seen_EX = self._seen()
        self.rows = _first_rows(seen_EX)
        part_EX = self._softly(seen_EX)
        best = self._bound(part_EX)
        for _ in range(rounds):
            solved = self._master()
            if solved is None or solved[0] - best <= CLOSE * abs(solved[0]):
                break
            _, master_EX, price_E = solved
            reduced_S = self._prices(master_EX) - self.columns.sums(price_E)
            self.pool = np.union1d(self.pool, _varied(self.columns, reduced_S))
            mixed_EX = part_EX + MIXED * (master_EX - part_EX)
            bound = self._bound(mixed_EX)
            if bound > best:
                best, part_EX = bound, mixed_EX
        return best * self.scale

    def follow(self, chosen_S: FloatArray, steps: int) -> float:
        """Bound by weights that answer a choice of sets, which moves towards its own best answers."""
        self.chosen_S = chosen_S.copy()
        best = -np.inf
        for step in range(steps):
            best = max(best, self._bound(self._softly(self._seen())))
            self.chosen_S += (self.covers.chosen_S - self.chosen_S) / (SOFT_START + step)
        return best * self.scale

    def _bound(self, part_EX: FloatArray) -> float:
        """Bound partitions by weights of rows; sets that matter for them join the pool."""
        left_X = np.maximum(1.0 - part_EX.sum(axis=0), 0.0)
        cover = self.covers.bound(self._prices(part_EX), rounds=COVER_ROUNDS)
        self.pool = np.union1d(self.pool, _varied(self.columns, cover.reduced_S))
        floor = float(left_X @ self.floor_X)
        return cover.value + floor * (1.0 - ROUNDING)

    def _prices(self, part_EX: FloatArray) -> FloatArray:
        """Return what each set costs for some weights of rows."""
        demand_E = np.maximum(self.columns.demand_E, 1.0)
        cost_SE = self.cost_SX @ (part_EX / demand_E[:, None]).T
        return np.asarray(np.take_along_axis(cost_SE, self.columns.members_SM, axis=1).sum(axis=1))

    def _seen(self) -> FloatArray:
        """Return the cost of each expert's group in each window, for the sets chosen in parts."""
        used = np.nonzero(self.chosen_S)[0]
        membership = _membership(self.columns, used, all_rows=True)
        return np.asarray(membership @ (self.chosen_S[used, None] * self.cost_SX[used]))

    def _softly(self, seen_EX: FloatArray) -> FloatArray:
        """Return weights of the rows that are the dearest in each window."""
        return soft_maximum(np.concatenate([seen_EX, self.floor_X[None]]))[:-1]

    def _master(self) -> tuple[float, FloatArray, FloatArray] | None:
        """Return value, weights of rows and prices of the program of the columns and rows at hand.

        Rows that its solution breaks join it, for the next time. A program that fails proves nothing.
        """
        from scipy.optimize import linprog
        from scipy.sparse import csr_array, hstack

        columns, pool, rows = self.columns, self.pool, self.rows
        num_windows = self.floor_X.size
        membership = _membership(columns, pool, all_rows=True).toarray()
        expert_R, window_R = np.divmod(rows, num_windows)
        cost_RS = csr_array(membership[expert_R] * self.cost_SX[pool].T[window_R])
        fullest_RX = csr_array(
            (np.ones(rows.size), (np.arange(rows.size), window_R)), shape=(rows.size, num_windows)
        )
        cover_ES = _membership(columns, pool)
        num_covered = cover_ES.shape[0]
        solved = linprog(
            np.concatenate([np.zeros(pool.size), np.ones(num_windows)]),
            A_ub=hstack([cost_RS, -fullest_RX], format="csr"),
            b_ub=np.zeros(rows.size),
            A_eq=hstack([cover_ES, csr_array((num_covered, num_windows))], format="csr"),
            b_eq=_demand(columns),
            bounds=[(0, None)] * pool.size + [(floor, None) for floor in self.floor_X],
            method="highs-ds",
        )
        if not solved.success:
            return None
        part_EX = np.zeros((columns.demand_E.size, num_windows))
        part_EX[expert_R, window_R] = np.maximum(-solved.ineqlin.marginals, 0.0)
        part_EX /= np.maximum(part_EX.sum(axis=0), 1.0)
        self.chosen_S[:] = 0.0
        self.chosen_S[pool] = solved.x[: pool.size]
        self.rows = np.union1d(rows, _broken_rows(self._seen(), solved.x[pool.size :]))
        return float(solved.fun), part_EX, _with_dummy(columns, solved.eqlin.marginals)


def _cover(columns: GroupColumns, cost_S: FloatArray, price_E: FloatArray) -> _Cover:
    """Bound covers by sets from prices of experts, whatever these are."""
    reduced_S = cost_S - columns.sums(price_E)
    groups = columns.groups
    paid_E = columns.demand_E * price_E
    size = float(np.abs(paid_E).sum() + groups.num_groups * (np.abs(price_E).max() + np.abs(cost_S).max()))
    value = float(paid_E.sum()) + groups.num_groups * float(reduced_S.min()) - ROUNDING * size
    return _Cover(value=value, price_E=price_E, reduced_S=reduced_S)


def _unit(size: float) -> float:
    """Return what to divide costs by, so that programs' tolerances are small beside them."""
    return size / PROGRAM_SIZE if size > 0 else 1.0


def _even_prices(columns: GroupColumns, cost_S: FloatArray) -> FloatArray:
    """Return prices at which the cheapest set is worth its members, and dummies nothing."""
    price_E = np.full(columns.demand_E.size, float(cost_S.min()) / columns.groups.slots)
    price_E[-1] = 0.0
    return price_E


def _varied(columns: GroupColumns, reduced_S: FloatArray) -> IntArray:
    """Return the cheapest sets, those left out that bring no expert of which there are enough already."""
    near = _least(reduced_S, SEARCHED_COLUMNS)
    near = near[np.argsort(reduced_S[near], kind="stable")]
    members_SM = columns.members_SM[near]
    held_SE = np.zeros((near.size, columns.demand_E.size), dtype=np.int64)
    np.put_along_axis(held_SE, members_SM, 1, axis=1)
    before_SM = np.take_along_axis(np.cumsum(held_SE, axis=0) - held_SE, members_SM, axis=1)
    return np.asarray(near[before_SM.min(axis=1) < ENOUGH])


def _least(value_S: FloatArray, count: int) -> IntArray:
    """Return where the least values are, however many of them."""
    if value_S.size <= count:
        return np.arange(value_S.size)
    return np.sort(np.argpartition(value_S, count)[:count])


def _membership(columns: GroupColumns, sets: IntArray, *, all_rows: bool = False) -> Any:
    """Return how many of each expert (and dummies, where there are any) sets hold, as a sparse matrix.

    `all_rows` asks for parts of what there is of each, the row of the dummy included in any case.
    """
    from scipy.sparse import csr_array

    members_SM = columns.members_SM[sets]
    num_rows = columns.demand_E.size
    weight_E = 1.0 / np.maximum(columns.demand_E, 1.0) if all_rows else np.ones(num_rows)
    set_SM = np.repeat(np.arange(sets.size), members_SM.shape[1])
    matrix = csr_array(
        (weight_E[members_SM].ravel(), (members_SM.ravel(), set_SM)), shape=(num_rows, sets.size)
    )
    return matrix if all_rows else matrix[: _num_covered(columns)]


def _num_covered(columns: GroupColumns) -> int:
    """Return the rows of a cover: experts, and the dummy where there are any."""
    return columns.groups.num_experts + (columns.num_dummies > 0)


def _demand(columns: GroupColumns) -> FloatArray:
    return columns.demand_E[: _num_covered(columns)]


def _with_dummy(columns: GroupColumns, price_E: FloatArray) -> FloatArray:
    """Return prices with one for the dummy: 0 where there is none."""
    return np.pad(price_E, (0, columns.demand_E.size - price_E.size))


def _first_rows(seen_EX: FloatArray) -> IntArray:
    """Return the rows of the dearest experts of each window."""
    hottest_RX = np.argsort(-seen_EX, axis=0, kind="stable")[:FIRST_ROWS]
    return np.unique(hottest_RX * seen_EX.shape[1] + np.arange(seen_EX.shape[1]))


def _broken_rows(seen_EX: FloatArray, fullest_X: FloatArray) -> IntArray:
    """Return the rows of experts whose groups are dearer than a solution says, the dearest of each window."""
    top_X = seen_EX.max(axis=0)
    broken_EX = (seen_EX > fullest_X * (1 + 1e-6)) & (seen_EX >= top_X * (1 - 1e-3))
    return np.asarray(np.nonzero(broken_EX.ravel())[0])
