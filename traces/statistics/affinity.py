r"""Which experts go together more than their loads explain: lift and mutual information against chance.

Of a table of pairs, :math:`n_{ef}` tokens by expert e (row) and f (column), the *lift* is
:math:`n_{ef} / E[n_{ef}]`, where the expectation is that of shuffled routing with the same loads. The *mutual
information* :math:`\sum p_{ef} \log_2 (p_{ef} / (p_e p_f))` of a pair drawn from the table says in bits what
one expert tells about the other. Estimated from a sample it is too large, by about as much as it is for
shuffled routing (Panzeri and Treves, 1996), so the shuffles' mean is taken off.

A pair *exceeds chance* where it stands further from its expectation, in standard deviations, than any pair of
any shuffle does: the maximum over pairs answers for looking at many of them (Westfall and Young, 1993).

Shape letters: T tokens, L MoE layers, K top-k, E experts, S shuffles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.statistics.routing import RoutingStatistics
from traces.statistics.shuffle import partner_shuffles

__all__ = [
    "Affinity",
    "coactivation",
    "coactivations",
    "entropy_bits",
    "mutual_information_bits",
    "strongest",
    "transition",
    "transitions",
]

ExpertArray = npt.NDArray[np.unsignedinteger[Any]]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

NUM_SHUFFLES = 20
_LEAST_EXPECTED = 5.0
"""Pairs expected less often are too rare to judge."""
_COUNTED_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Affinity:
    """Pairs of experts of one layer, or of two, against chance.

    Parameters
    ----------
    layer, other
        MoE layer of the rows and of the columns; the same for co-activation.
    num_tokens
        Tokens counted.
    observed_EE
        Tokens that select both experts of a pair, ``[experts, experts]``.
    null_SEE
        The same of shuffled routing, ``[shuffles, experts, experts]``.
    """

    layer: int
    other: int
    num_tokens: int
    observed_EE: FloatArray
    null_SEE: npt.NDArray[np.float32]

    @property
    def is_coactivation(self) -> bool:
        """Whether both experts of a pair are of the same layer."""
        return self.layer == self.other

    @property
    def num_shuffles(self) -> int:
        """Shuffles that chance is known from."""
        return len(self.null_SEE)

    @cached_property
    def expected_EE(self) -> FloatArray:
        """Tokens by pair that the loads alone make.

        Two layers are independent when one's tokens are shuffled, so there it is :math:`n_e n_f / N`; within
        a layer, where a token's experts differ, it is the mean over the shuffles.
        """
        if self.is_coactivation:
            return np.asarray(self.null_SEE.mean(axis=0, dtype=np.float64))
        total = self.observed_EE.sum() or 1.0
        return np.asarray(np.outer(self.observed_EE.sum(axis=1), self.observed_EE.sum(axis=0)) / total)

    @cached_property
    def lift_EE(self) -> FloatArray:
        """Observed over expected; NaN where fewer than five tokens are expected."""
        expected = np.where(self.judged_EE, self.expected_EE, np.nan)
        return np.asarray(self.observed_EE / expected)

    @cached_property
    def judged_EE(self) -> BoolArray:
        """Pairs that are expected often enough to be judged; never an expert with itself in a layer."""
        return np.asarray(self.expected_EE >= _LEAST_EXPECTED)

    @cached_property
    def limit(self) -> float:
        """Largest distance of any judged pair of any shuffle from its expectation, in standard deviations."""
        return max((float(self._scores(null_EE).max(initial=0.0)) for null_EE in self.null_SEE), default=0.0)

    @cached_property
    def exceeds_EE(self) -> BoolArray:
        """Pairs that are further from their expectation than chance takes any pair."""
        exceeds_EE = np.zeros(self.observed_EE.shape, dtype=np.bool_)
        exceeds_EE[self.judged_EE] = self._scores(self.observed_EE) > self.limit
        return exceeds_EE

    def _scores(self, count_EE: npt.NDArray[Any]) -> FloatArray:
        """Distance of each judged pair from its expectation in (pooled) standard deviations."""
        judged = self.judged_EE
        expected = self.expected_EE[judged]
        return np.asarray(np.abs(count_EE[judged] - expected) / (self._spread * np.sqrt(expected)))

    @cached_property
    def _spread(self) -> float:
        """Standard deviation over the square root of the expectation: one number, as shuffles are few."""
        judged = self.judged_EE
        variance = self.null_SEE.var(axis=0, ddof=min(1, self.num_shuffles - 1), dtype=np.float64)[judged]
        return float(np.sqrt((variance / self.expected_EE[judged]).mean())) if variance.any() else 1.0

    @cached_property
    def bits(self) -> float:
        """Mutual information of a pair, in bits, as counted: too large by about `null_bits`."""
        return mutual_information_bits(self.observed_EE)

    @cached_property
    def null_bits_S(self) -> FloatArray:
        """The same of each shuffle."""
        return np.array([mutual_information_bits(null_EE) for null_EE in self.null_SEE])

    @property
    def null_bits(self) -> float:
        """Mean over the shuffles: the bias of `bits`, and what distinct experts in a layer make."""
        return float(self.null_bits_S.mean())

    @property
    def null_deviation_bits(self) -> float:
        """Standard deviation over the shuffles."""
        return float(self.null_bits_S.std(ddof=min(1, self.num_shuffles - 1)))

    @property
    def excess_bits(self) -> float:
        """What one expert tells about the other beyond chance, in bits; may fall below 0 by chance."""
        return self.bits - self.null_bits

    @property
    def is_above_chance(self) -> bool:
        """Whether the mutual information is larger than that of every shuffle."""
        return self.bits > float(self.null_bits_S.max())

    @cached_property
    def entropy_bits(self) -> float:
        """Entropy of the column's expert: the most that there is to tell, in bits."""
        return entropy_bits(self.observed_EE.sum(axis=0))

    def to_dict(self) -> dict[str, Any]:
        """Return a row of a table: what is counted, in bits, and the highest lift."""
        known = self.lift_EE[self.exceeds_EE]
        return {
            "pairs": "in a layer" if self.is_coactivation else "to the next layer",
            "layers": f"{self.layer}" if self.is_coactivation else f"{self.layer} to {self.other}",
            "mutual information (bits)": self.bits,
            "shuffled (bits)": self.null_bits,
            "deviation (bits)": self.null_deviation_bits,
            "entropy (bits)": self.entropy_bits,
            "pairs beyond chance": float(known.size / max(1, int(self.judged_EE.sum()))),
            "highest lift": float(known.max(initial=1.0)),
        }


def entropy_bits(count_E: npt.ArrayLike) -> float:
    r"""Entropy of shares, :math:`-\sum p_e \log_2 p_e`, in bits; 0 of nothing counted."""
    count = np.asarray(count_E, dtype=np.float64)
    share = count[count > 0] / (count.sum() or 1.0)
    return float(-(share * np.log2(share)).sum()) + 0.0


def mutual_information_bits(pairs_EE: npt.ArrayLike) -> float:
    """Mutual information of row and column of a table of counts, in bits, as counted (not corrected)."""
    pairs = np.asarray(pairs_EE, dtype=np.float64)
    together = entropy_bits(pairs.ravel())
    return max(0.0, entropy_bits(pairs.sum(axis=1)) + entropy_bits(pairs.sum(axis=0)) - together)


def coactivation(
    experts_TLK: ExpertArray,
    layer: int,
    *,
    num_experts: int,
    num_shuffles: int = NUM_SHUFFLES,
    seed: int = 0,
) -> Affinity:
    """Count the pairs of experts that tokens select together in a layer, and those of shuffled partners.

    Shuffles keep every expert's load, and that a token's experts differ.

    Parameters
    ----------
    experts_TLK
        Expert ids of (sampled) tokens.
    layer
        MoE layer.
    num_experts
        Experts of the layer.
    num_shuffles
        Shuffles to know chance by: with 20 the limit of chance is passed by chance once in 21 times.
    seed
        Seed of the shuffles.

    Raises
    ------
    InputError
        If a token selects one expert only, or there is no shuffle.
    """
    _check(experts_TLK, num_shuffles)
    if experts_TLK.shape[2] < 2:
        raise InputError("each token selects one expert, so no two are selected together")
    ids_TK = np.ascontiguousarray(experts_TLK[:, layer])
    rng = np.random.default_rng([seed, layer])
    shuffled = partner_shuffles(ids_TK, num_shuffles=num_shuffles, rng=rng)
    return Affinity(
        layer=layer,
        other=layer,
        num_tokens=len(ids_TK),
        observed_EE=_partners(ids_TK, num_experts),
        null_SEE=_stacked(_partners(null_TK, num_experts) for null_TK in shuffled),
    )


def transition(
    experts_TLK: ExpertArray,
    layer: int,
    *,
    num_experts: int,
    num_shuffles: int = NUM_SHUFFLES,
    seed: int = 0,
) -> Affinity:
    """Count the experts of a layer by those of the next, any selected with any, and of shuffled tokens.

    A shuffle gives every token the next layer's experts of another: loads of both layers are kept, and who
    is selected together in each.

    Parameters
    ----------
    experts_TLK, num_experts, num_shuffles, seed
        As for `coactivation`.
    layer
        MoE layer of the rows; the next one is that of the columns.

    Raises
    ------
    InputError
        If there is no next layer, or no shuffle.
    """
    _check(experts_TLK, num_shuffles)
    if not 0 <= layer < experts_TLK.shape[1] - 1:
        raise InputError(f"no layer follows layer {layer} of {experts_TLK.shape[1]}")
    here_TK, next_TK = (np.ascontiguousarray(experts_TLK[:, at]) for at in (layer, layer + 1))
    rng = np.random.default_rng([seed, layer])
    return Affinity(
        layer=layer,
        other=layer + 1,
        num_tokens=len(here_TK),
        observed_EE=_pairs(here_TK, next_TK, num_experts),
        null_SEE=_stacked(
            _pairs(here_TK, next_TK[rng.permutation(len(next_TK))], num_experts) for _ in range(num_shuffles)
        ),
    )


def coactivations(
    statistics: RoutingStatistics, *, num_shuffles: int = NUM_SHUFFLES, seed: int = 0
) -> tuple[Affinity, ...]:
    """Return the co-activation of every layer, from the sampled tokens; none of top-1.

    Raises
    ------
    InputError
        If there are no sampled tokens.
    """
    experts_TLK, num_experts = _sampled(statistics)
    if statistics.header.top_k < 2:
        return ()
    return tuple(
        coactivation(experts_TLK, layer, num_experts=num_experts, num_shuffles=num_shuffles, seed=seed)
        for layer in range(statistics.header.num_layers)
    )


def transitions(
    statistics: RoutingStatistics, *, num_shuffles: int = NUM_SHUFFLES, seed: int = 0
) -> tuple[Affinity, ...]:
    """Return the transitions between consecutive layers, from the sampled tokens; none of one layer.

    Raises
    ------
    InputError
        If there are no sampled tokens.
    """
    experts_TLK, num_experts = _sampled(statistics)
    return tuple(
        transition(experts_TLK, layer, num_experts=num_experts, num_shuffles=num_shuffles, seed=seed)
        for layer in range(statistics.header.num_layers - 1)
    )


def strongest(affinities: Sequence[Affinity]) -> Affinity:
    """Return the one with the most information beyond chance."""
    return max(affinities, key=lambda each: each.excess_bits)


def _sampled(statistics: RoutingStatistics) -> tuple[ExpertArray, int]:
    if statistics.sample is None:
        raise InputError("these statistics have no sampled tokens; collect them again from the trace")
    return statistics.sample.experts_TLK, statistics.header.num_experts


def _check(experts_TLK: ExpertArray, num_shuffles: int) -> None:
    if not len(experts_TLK):
        raise InputError("there are no sampled tokens to count pairs of experts in")
    if num_shuffles < 1:
        raise InputError(f"{num_shuffles} shuffles cannot tell what chance does; use at least 1")


def _stacked(tables: Iterable[FloatArray]) -> npt.NDArray[np.float32]:
    return np.stack([table.astype(np.float32) for table in tables])


def _pairs(here_TK: ExpertArray, next_TK: ExpertArray, num_experts: int) -> FloatArray:
    """Count every choice of one layer with every choice of another."""
    top_k = here_TK.shape[1]
    count = np.zeros(num_experts * num_experts)
    step = max(1, _COUNTED_AT_ONCE // top_k**2)
    for start in range(0, len(here_TK), step):
        row = here_TK[start : start + step, :, np.newaxis].astype(np.int64) * num_experts
        pair = row + next_TK[start : start + step, np.newaxis]
        count += np.bincount(pair.ravel(), minlength=count.size)
    return count.reshape(num_experts, num_experts)


def _partners(ids_TK: ExpertArray, num_experts: int) -> FloatArray:
    """Count every two choices of a layer, both ways; the diagonal is empty, as a token's experts differ."""
    pairs_EE = _pairs(ids_TK, ids_TK, num_experts)
    np.fill_diagonal(pairs_EE, 0)
    return pairs_EE
