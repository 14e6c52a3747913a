"""The least total of some terms over all partitions of experts into equal groups, bounded from below.

A partition's togetherness X lies in two sets: it has the eigenvalue ``slots``, once along the constant vector
and ``groups - 1`` times across it, and no other but 0; and it has a diagonal of 1 and entries between 0
and 1. Minimising a line over both at once is the semidefinite relaxation of equipartition with
Donath and Hoffman's bound inside (IBM J. Res. Dev. 17, 1973). A method of multipliers alternates between the
sets (Boyd et al., Found. Trends Mach. Learn. 3, 2011), while the line follows its term. Whatever it has
come to, splitting the line between the two sets by the multipliers gives a valid bound:

    min over both of <C, X>  >=  min over spectra of <C + U, X> + min over boxes of <-U, X>,

each in closed form. Experts that do not fill the groups are joined by dummies that cost nothing.

Where spare slots hold replicas, let X count the groups that hold both of two experts. A token's expert still
has at most ``sum_f X[e, f]`` mates where it is read, so the lines below tokens' touches hold, as they fall
with X (those below loads do not). X has no negative eigenvalue or entry, a diagonal of the replicas, and rows
that add up to at most `slots` times the replicas. Multipliers of these put a price on each replica, and the
spare slots go where they save most. Between its multipliers and theirs the ascent is the same, in units in
which the diagonal is 1.

Shape letters: E experts, P experts and dummies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.bounds.terms import Line, Term

__all__ = ["Groups", "relax"]

FloatArray = npt.NDArray[np.float64]

LINE_PERIOD = 5
"""Steps between two lines."""

PENALTY = 8.0
"""The multipliers' penalty, in units of the first line's mean entry."""

UNBALANCED = 3.0
"""Ratio of the two residuals of a step at which the penalty is corrected."""

CORRECTION = 1.1
"""What the penalty is multiplied or divided by."""

CHECK_PERIOD = 20
"""Steps between two looks at the bound."""

SLOWEST = 0.05
"""Least part of a new line in the mixture of lines."""

ROUNDING = 1e-9
"""What bounds are stepped back by, against the sum of the magnitudes in them; doubles err by far less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Equal groups for some experts, in places that may stay empty.

    Parameters
    ----------
    num_groups, slots
        Groups, and the most experts that one holds.
    num_experts
        Experts; at most as many as there are places.
    spare_slots
        Places for replicas, beyond one place for each expert.
    """

    num_groups: int
    slots: int
    num_experts: int
    spare_slots: int = 0

    @property
    def num_places(self) -> int:
        """Places in all groups."""
        return self.num_groups * self.slots

    @property
    def num_members(self) -> int:
        """Experts, and dummies for the places that neither they nor replicas fill."""
        return self.num_places - self.spare_slots

    def pad(self, matrix_EE: FloatArray) -> FloatArray:
        """Return a matrix with zeros for the dummies."""
        return np.pad(matrix_EE, (0, self.num_members - self.num_experts))


def relax(terms: Sequence[Term], groups: Groups, *, steps: int) -> float:
    """Bound the sum of some terms over all partitions of experts into groups.

    Parameters
    ----------
    terms
        What to minimise; with spare slots, touches of tokens alone.
    groups
        Equal groups.
    steps
        Eigenvalue decompositions to spend.
    """
    from threadpoolctl import threadpool_limits

    # The matrices are small: threads would only wait for each other, and change the rounding.
    with threadpool_limits(limits=1, user_api="blas"):
        ascent = _Ascent(terms, groups)
        return ascent.run(steps)


class _Ascent:
    """The method of multipliers, in units in which the line's matrix is of order 1.

    Parameters
    ----------
    terms, groups
        As for `relax`.
    """

    def __init__(self, terms: Sequence[Term], groups: Groups) -> None:
        self.terms, self.groups = terms, groups
        size = groups.num_members
        self.replicas_P = np.ones(size)
        self.replicas_P[: groups.num_experts] += groups.spare_slots / groups.num_experts
        self.box_PP = np.full((size, size), (groups.slots - 1) / max(1, size - 1))
        np.fill_diagonal(self.box_PP, 1.0)
        self.price_PP = np.zeros((size, size))
        self.lines = [term.below(self._together(), sampled=True) for term in terms]
        self.num_lines = 1
        across_PP = _across(groups.pad(self._line().matrix_EE), _constant(size))
        self.penalty = PENALTY * float(np.abs(across_PP).mean()) or 1.0

    def run(self, steps: int) -> float:
        """Follow sampled lines for most of the steps, then settle on lines of all tokens."""
        settle = max(1, steps // 4)
        for step in range(steps - settle):
            if step and step % LINE_PERIOD == 0:
                self._follow(self.terms)
                self._place_replicas()
            self._step()
        together_EE = self._together()
        for index, term in enumerate(self.terms):
            if term.samples:
                self.lines[index] = term.below(together_EE, sampled=False)
        best = self._bound()
        for step in range(settle):
            self._step()
            if step % LINE_PERIOD == LINE_PERIOD - 1:
                self._follow([term for term in self.terms if not term.samples])
            if step % CHECK_PERIOD == CHECK_PERIOD - 1 or step == settle - 1:
                best = max(best, self._bound())
        return best

    @property
    def _scale_PP(self) -> FloatArray:
        """What X is in units of the matrices kept: those of a partition."""
        return np.asarray(np.sqrt(np.outer(self.replicas_P, self.replicas_P)))

    def _together(self) -> FloatArray:
        experts = slice(0, self.groups.num_experts)
        together_EE = (self.box_PP * self._scale_PP)[experts, experts]
        np.fill_diagonal(together_EE, 1.0)
        return np.ascontiguousarray(together_EE)

    def _line(self) -> Line:
        first, *others = self.lines
        return sum(others, first)

    def _follow(self, terms: Sequence[Term]) -> None:
        """Move lines towards those below the terms at the present X, ever more slowly."""
        self.num_lines += 1
        part = max(SLOWEST, 2.0 / (self.num_lines + 1))
        together_EE = self._together()
        for index, term in enumerate(self.terms):
            if term in terms:
                new = term.below(together_EE, sampled=True)
                self.lines[index] = self.lines[index].towards(new, part)

    def _step(self) -> None:
        cost_PP = self.groups.pad(self._line().matrix_EE) * self._scale_PP
        target_PP = self.box_PP - (self.price_PP + cost_PP) / self.penalty
        spectral_PP = _nearest_spectral(target_PP, self.groups, np.sqrt(self.replicas_P))
        box_PP = np.clip(spectral_PP + self.price_PP / self.penalty, 0.0, 1.0)
        np.fill_diagonal(box_PP, 1.0)
        apart_PP = spectral_PP - box_PP
        moved = float(np.linalg.norm(box_PP - self.box_PP))
        self.price_PP, self.box_PP = self.price_PP + self.penalty * apart_PP, box_PP
        self._balance(float(np.linalg.norm(apart_PP)), moved)

    def _balance(self, apart: float, moved: float) -> None:
        """Raise the penalty while the sets are far apart, lower it while X still moves."""
        if apart > UNBALANCED * moved:
            self.penalty *= CORRECTION
        elif moved > UNBALANCED * apart:
            self.penalty /= CORRECTION

    def _place_replicas(self) -> None:
        """Move the replicas towards where they would save most at the present prices."""
        if self.groups.spare_slots == 0:
            return
        line, groups = self._line(), self.groups
        _, loss_EX = _worths(line, self._savings(), groups)
        dearest = np.argsort(loss_EX, axis=None)[max(0, loss_EX.size - groups.spare_slots) :]
        used_E = np.bincount(dearest // loss_EX.shape[1], minlength=groups.num_experts)
        scale_PP = self._scale_PP
        part = 2.0 / (self.num_lines + 1)
        replicas_E = self.replicas_P[: groups.num_experts]
        replicas_E += part * (1.0 + used_E - replicas_E)
        self.price_PP = self.price_PP * (self._scale_PP / scale_PP)

    def _savings(self) -> FloatArray:
        """Return what a replica of each expert saves at most, by the present prices, ``[experts]``.

        The multipliers of entries at least 0, of the diagonal and of the rows' sums make the line's matrix
        one without negative eigenvalues; what the last two cost for an expert is in proportion to its
        replicas.
        """
        experts = slice(0, self.groups.num_experts)
        price_EE = ((self.price_PP + self.price_PP.T) / 2 / self._scale_PP)[experts, experts]
        line, replicas_E = self._line(), self.replicas_P[experts]
        matrix_EE = line.matrix_EE + np.minimum(price_EE, 0.0)
        np.fill_diagonal(matrix_EE, np.diag(line.matrix_EE) + np.diag(price_EE))
        # Rows' multipliers such that the replicas themselves are in the matrix's kernel.
        sum_E, total = matrix_EE @ replicas_E, replicas_E.sum()
        row_E = np.maximum((replicas_E @ sum_E / total - 2.0 * sum_E) / total, 0.0)
        matrix_EE = matrix_EE + (row_E[:, None] + row_E[None, :]) / 2
        scaled_EE = matrix_EE * np.sqrt(np.outer(replicas_E, replicas_E))
        lowest = float(np.linalg.eigvalsh(scaled_EE)[0]) - ROUNDING * float(np.linalg.norm(scaled_EE))
        return np.asarray(np.diag(price_EE) - lowest / replicas_E + self.groups.slots * row_E)

    def _bound(self) -> float:
        """Bound the terms by the present lines and prices."""
        line = self._line()
        if self.groups.spare_slots:
            worth_E, loss_EX = _worths(line, self._savings(), self.groups)
            dearest = np.sort(loss_EX, axis=None)[max(0, loss_EX.size - self.groups.spare_slots) :]
            value = line.constant + float(worth_E.sum()) - float(dearest.sum())
            return value - ROUNDING * float(np.abs(line.share_E).sum())
        price_PP = (self.price_PP + self.price_PP.T) / 2
        spectral, error = _least_spectral(self.groups.pad(line.matrix_EE) + price_PP, self.groups)
        box_PP = np.minimum(-price_PP, 0.0)
        np.fill_diagonal(box_PP, -np.diag(price_PP))
        value = line.constant + float(line.share_E.sum()) + spectral + float(box_PP.sum())
        size = abs(line.constant) + float(np.abs(line.share_E).sum() + np.abs(box_PP).sum())
        return value - error - ROUNDING * size


def _worths(line: Line, saved_E: FloatArray, groups: Groups) -> tuple[FloatArray, FloatArray]:
    """Return what experts of one replica are worth at least, and what each further replica takes away.

    All replicas together take away no more than the expert is worth: tokens touch no less than their other
    experts need.
    """
    worth_E = line.share_E - saved_E
    further_X = np.arange(groups.num_groups - 1)
    left_EX = np.maximum(worth_E[:, None] - saved_E[:, None] * further_X, 0.0)
    return worth_E, np.clip(saved_E[:, None], 0.0, left_EX)


def _across(matrix_PP: FloatArray, unit_P: FloatArray) -> FloatArray:
    """Project rows and columns across a unit vector."""
    along_P = matrix_PP @ unit_P
    outer_PP = np.outer(along_P, unit_P)
    return np.asarray(matrix_PP - outer_PP - outer_PP.T + (along_P @ unit_P) * np.outer(unit_P, unit_P))


def _constant(size: int) -> FloatArray:
    """Return the constant unit vector."""
    return np.full(size, 1.0 / math.sqrt(size))


def _least_spectral(cost_PP: FloatArray, groups: Groups) -> tuple[float, float]:
    """Return the least of ``<cost, X>`` over X with a partition's spectrum, and what rounding may err."""
    size, slots = groups.num_places, groups.slots
    across_PP = _across(cost_PP, _constant(size))
    norm = float(np.linalg.norm(across_PP))
    # Lift the constant vector above all others, so that it is not among the least; by no more than costs
    # of this size ask for, lest rounding be that of a larger matrix.
    values = np.linalg.eigvalsh(across_PP + 2.0 * norm / size)
    across = slots * float(values[: groups.num_groups - 1].sum())
    along = slots * float(cost_PP.sum()) / size
    error = ROUNDING * slots * (groups.num_groups * norm + float(np.abs(cost_PP).sum()) / size)
    return across + along, error


def _nearest_spectral(matrix_PP: FloatArray, groups: Groups, root_P: FloatArray) -> FloatArray:
    """Project on the hull of the matrices with a partition's spectrum.

    `root_P` is the eigenvector of the eigenvalue `slots`: constant, or the root of the replicas.
    """
    size, slots = groups.num_members, groups.slots
    unit_P = root_P / np.linalg.norm(root_P)
    across_PP = _across((matrix_PP + matrix_PP.T) / 2, unit_P)
    lift = 2.0 * float(np.linalg.norm(across_PP)) + 2.0 * slots
    along_PP = np.outer(unit_P, unit_P)
    values, vectors = np.linalg.eigh(across_PP - lift * along_PP)
    kept = _capped(values[1:], cap=float(slots), total=float(max(0, size - slots)))
    across = vectors[:, 1:]
    return np.asarray((across * kept) @ across.T + slots * along_PP)


def _capped(values: FloatArray, *, cap: float, total: float) -> FloatArray:
    """Project on the values between 0 and `cap` with a given sum, at most ``cap * values.size``."""
    shifts = np.sort(np.concatenate([values, values - cap]))
    sums = np.clip(values - shifts[:, None], 0.0, cap).sum(axis=1)
    # The sum falls piecewise linearly with the shift.
    shift = np.interp(-total, -sums, shifts)
    return np.asarray(np.clip(values - shift, 0.0, cap))
