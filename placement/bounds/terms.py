"""Terms of the objective as functions of which experts share a group, and lines that lie below them.

A partition is described by its togetherness X: ``X[e, f]`` is 1 where experts e and f share a group, 0 where
they do not. Both terms bound from below what a partition costs, through X alone:

- a token touches a group once for all of its experts there, so an expert with n mates (others of the token's
  experts in its group) pays for ``1 / (1 + n)`` of a touch. That is convex in n, and n is linear in X. For
  whole n it lies above its chord through ``m - 1`` and m, ``(2 m - n) / (m (m + 1))``, for every m >= 1;
  summed over a token's experts this refines Dawson and Sankoff's inequality (Proc. AMS 18, 1967), with an m
  for each of them;
- the device of expert e carries ``sum_f X[e, f] load[f]`` in a window, and the fullest the most of these.

Shape letters: W windows, E experts, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["FullestLoad", "Line", "Term", "Touches", "soft_maximum"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SOFT_MATES = 0.1
"""Two chords are mixed where the mates lie this close to where they meet, lest an ascent jump."""

SOFT_MAXIMUM = 0.02
"""What lies within this part of a window's maximum has a share in it, for the same reason."""

CHUNK_TOKENS = 8192
"""Tokens whose pairs are looked up at a time, to stay within the cache."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """``constant + sum(share_E) + sum_ef matrix_EE[e, f] X[e, f]``: no partition's term is less.

    Parameters
    ----------
    constant
        What holds whatever experts there are.
    share_E
        What holds for each expert, ``[experts]``.
    matrix_EE
        Symmetric, ``[experts, experts]``.
    """

    constant: float
    share_E: FloatArray
    matrix_EE: FloatArray

    def __add__(self, other: Line) -> Line:
        return Line(
            constant=self.constant + other.constant,
            share_E=self.share_E + other.share_E,
            matrix_EE=self.matrix_EE + other.matrix_EE,
        )

    def towards(self, other: Line, part: float) -> Line:
        """Return a mixture of both, a line below the term as well."""
        return Line(
            constant=self.constant + part * (other.constant - self.constant),
            share_E=self.share_E + part * (other.share_E - self.share_E),
            matrix_EE=self.matrix_EE + part * (other.matrix_EE - self.matrix_EE),
        )


class Term(Protocol):
    """A part of the objective that togetherness bounds from below."""

    @property
    def samples(self) -> bool:
        """Whether an estimate differs from the line itself."""

    def below(self, together_EE: FloatArray, *, sampled: bool) -> Line:
        """Return a line below the term for every partition, close to it where X is as given.

        `sampled` asks for an estimate of that line, from part of the tokens, which need not lie below.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Touches:
    """``sum over windows w of max(sum over tokens t of w of weight_T[t] * touches of t, floor_W[w])``.

    Parameters
    ----------
    experts_TK
        Experts of each token, ``[tokens, top_k]``.
    weight_T
        What a touch of each token costs, ``[tokens]``.
    window_T, floor_W
        Window of each token, and what each window costs at least for some other reason.
    num_experts
        Experts.
    most_mates
        Most experts of a token that can share a group with another of its experts, 0 or more.
    sample_tokens
        Tokens that serve for an estimate.
    """

    experts_TK: npt.NDArray[Any]
    weight_T: FloatArray
    window_T: IntArray
    floor_W: FloatArray
    num_experts: int
    most_mates: int
    sample_tokens: int = 4096

    def below(self, together_EE: FloatArray, *, sampled: bool) -> Line:
        """Add up chords below ``1 / (1 + mates)``, chosen for each token's and expert's mates."""
        if sampled and self.samples:
            return self._sample.below(together_EE, sampled=False)
        mates_TK = self._mates(together_EE)
        start_TK, slope_TK = self._chords(mates_TK)
        cost_T = self.weight_T * (start_TK + slope_TK * mates_TK).sum(axis=1)
        cost_W = np.bincount(self.window_T, weights=cost_T, minlength=self.floor_W.size)
        part_W = soft_maximum(np.stack([self.floor_W, cost_W]))
        weight_TK = (self.weight_T * part_W[1, self.window_T])[:, None]
        share_E = np.bincount(
            self.experts_TK.ravel(), weights=(weight_TK * start_TK).ravel(), minlength=self.num_experts
        )
        return Line(
            constant=float(part_W[0] @ self.floor_W),
            share_E=np.asarray(share_E, dtype=np.float64),
            matrix_EE=self._scatter(weight_TK * slope_TK),
        )

    @property
    def samples(self) -> bool:
        """Whether there are more tokens than an estimate takes."""
        return len(self.experts_TK) > self.sample_tokens

    @cached_property
    def _sample(self) -> Touches:
        """Every n-th token, with n times the weight."""
        stride = -(-len(self.experts_TK) // self.sample_tokens)
        weight_T = self.weight_T[::stride]
        return replace(
            self,
            experts_TK=self.experts_TK[::stride],
            weight_T=weight_T * (self.weight_T.sum() / weight_T.sum()),
            window_T=self.window_T[::stride],
        )

    @cached_property
    def _cell_TKK(self) -> IntArray:
        return self._cells(slice(None))

    def _cells(self, tokens: slice) -> IntArray:
        """Places of the pairs of each token's experts in a flat ``[experts, experts]`` matrix."""
        experts_TK = self.experts_TK[tokens].astype(np.int64)
        return np.asarray(experts_TK[:, :, None] * self.num_experts + experts_TK[:, None, :])

    def _chunks(self) -> Iterator[tuple[slice, IntArray]]:
        if not self.samples:
            # A sample is passed again and again.
            yield slice(None), self._cell_TKK
            return
        for first in range(0, len(self.experts_TK), CHUNK_TOKENS):
            tokens = slice(first, first + CHUNK_TOKENS)
            yield tokens, self._cells(tokens)

    def _mates(self, together_EE: FloatArray) -> FloatArray:
        """Return the expected mates of each token's experts."""
        flat = together_EE.ravel()
        sums = [flat.take(cell_TKK).sum(axis=2) for _, cell_TKK in self._chunks()]
        return np.asarray(np.concatenate(sums) - 1.0)

    def _scatter(self, value_TK: FloatArray) -> FloatArray:
        """Add each token's and expert's value to the pairs of that expert with the token's others."""
        size = self.num_experts
        flat = np.zeros(size * size)
        for tokens, cell_TKK in self._chunks():
            values = np.broadcast_to(value_TK[tokens, :, None], cell_TKK.shape)
            flat += np.bincount(cell_TKK.ravel(), weights=values.ravel(), minlength=flat.size)
        matrix_EE = flat.reshape(size, size)
        np.fill_diagonal(matrix_EE, 0.0)
        return np.asarray((matrix_EE + matrix_EE.T) / 2)

    def _chords(self, mates_TK: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return start and slope of mixtures of the two chords next to some mates."""
        most = max(1, self.most_mates)
        m_TK = np.clip(np.floor(mates_TK - SOFT_MATES) + 1.0, 1.0, most)
        next_TK = np.minimum(m_TK + 1.0, most)
        part_TK = np.clip((mates_TK - m_TK + SOFT_MATES) / (2 * SOFT_MATES), 0.0, 1.0)
        start_TK = 2.0 * ((1.0 - part_TK) / (m_TK + 1.0) + part_TK / (next_TK + 1.0))
        slope_TK = -(1.0 - part_TK) / (m_TK * (m_TK + 1.0)) - part_TK / (next_TK * (next_TK + 1.0))
        return start_TK, slope_TK


@dataclass(frozen=True, kw_only=True, eq=False)
class FullestLoad:
    """``sum over windows of max(load of the fullest group, floor_W)``.

    Parameters
    ----------
    load_WE
        What each expert adds to its group's load, weighted as the windows are, ``[windows, experts]``.
    floor_W
        What each window costs at least for some other reason, weighted likewise.
    """

    load_WE: FloatArray
    floor_W: FloatArray
    samples: bool = False

    def below(self, together_EE: FloatArray, *, sampled: bool) -> Line:
        """Name the experts whose groups are the fullest in each window, or the floor."""
        carried_WE = self.load_WE @ together_EE
        part = soft_maximum(np.concatenate([self.floor_W[None], carried_WE.T]))
        matrix_EE = part[1:] @ self.load_WE
        return Line(
            constant=float(part[0] @ self.floor_W),
            share_E=np.zeros(self.load_WE.shape[1]),
            matrix_EE=np.asarray((matrix_EE + matrix_EE.T) / 2),
        )


def soft_maximum(value_XW: FloatArray) -> FloatArray:
    """Return weights that add up to 1 in each column, nearly all on its largest values."""
    top_W = value_XW.max(axis=0)
    scale_W = SOFT_MAXIMUM * np.where(top_W > 0, top_W, 1.0)
    weight_XW = np.exp((value_XW - top_W) / scale_W)
    return np.asarray(weight_XW / weight_XW.sum(axis=0))
