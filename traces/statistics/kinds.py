"""How routing differs between kinds of traffic (domains, ranks, or stretches of time), against chance.

Distances are total variation: the share of token-expert pairs that would have to go to other experts. As few
tokens differ from many by chance, and the tokens of a sequence are alike, the kinds are also dealt out to
whole sequences at random: what distance is left then is chance.

Shape letters: T sampled tokens, L MoE layers, K top-k, E experts, C kinds, S shuffles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.statistics.routing import RoutingStatistics, total_variation
from traces.statistics.sample import TokenSample
from traces.trace import UNKNOWN_DOMAIN

__all__ = ["KindLoads", "kind_loads"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NUM_SHUFFLES = 20
_STRETCHES = 8
_MOST_RANKS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class KindLoads:
    """Loads by kind of traffic.

    Parameters
    ----------
    what
        What the kinds are: ``"domain"``, ``"rank"`` or ``"stretch"``.
    names
        Their names.
    load_CLE
        Sampled token-expert pairs.
    distance_CL
        Total variation distance of each kind's expert shares from those of all other kinds together.
    null_SCL
        The same with the kinds dealt out to sequences at random.
    """

    what: str
    names: tuple[str, ...]
    load_CLE: FloatArray
    distance_CL: FloatArray
    null_SCL: FloatArray

    @property
    def distance_C(self) -> FloatArray:
        """Distance of each kind, mean over layers."""
        return np.asarray(self.distance_CL.mean(axis=1))

    @property
    def null_C(self) -> FloatArray:
        """Distance that chance makes, mean over layers and shuffles."""
        return np.asarray(self.null_SCL.mean(axis=(0, 2)))

    @property
    def null_high_C(self) -> FloatArray:
        """Largest distance, mean over layers, of any shuffle."""
        return np.asarray(self.null_SCL.mean(axis=2).max(axis=0))

    @property
    def differ_C(self) -> npt.NDArray[np.bool_]:
        """Kinds that differ from the others more than any kind does in any shuffle."""
        return np.asarray(self.distance_C > self.null_high_C.max())

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each kind: its distance from the others, and what chance makes."""
        return [
            {
                self.what: name,
                "sampled pairs in a layer": int(self.load_CLE[kind, 0].sum()),
                "at other experts": float(self.distance_C[kind]),
                "by chance, mean": float(self.null_C[kind]),
                "by chance, largest": float(self.null_high_C[kind]),
            }
            for kind, name in enumerate(self.names)
        ]

    @property
    def layer(self) -> int:
        """Layer in which kinds differ most."""
        return int(self.distance_CL.mean(axis=0).argmax())


def kind_loads(
    statistics: RoutingStatistics, *, num_shuffles: int = NUM_SHUFFLES, seed: int = 0
) -> KindLoads | None:
    """Compare the loads of domains; where none are known, of ranks; failing these, of stretches of time.

    Parameters
    ----------
    statistics
        With a sample of tokens.
    num_shuffles
        Shuffles to know chance by.
    seed
        Seed of the shuffles.

    Returns
    -------
    KindLoads or None
        `None` where all sampled tokens are of one kind.

    Raises
    ------
    InputError
        If there are no sampled tokens.
    """
    sample = statistics.sample
    if sample is None or not sample.num_tokens:
        raise InputError("these statistics have no sampled tokens; collect them again from the trace")
    what, names, kind_T = _kinds(statistics, sample)
    known_T = kind_T != UNKNOWN_DOMAIN
    present, kind_T = np.unique(kind_T[known_T], return_inverse=True)
    if len(present) < 2:
        return None
    _, first_B, block_T = np.unique(_blocks(sample)[known_T], return_index=True, return_inverse=True)
    # A block is of the kind of its first token; sequences are of one kind, stretches may cut them.
    kind_B = kind_T[first_B]
    rng = np.random.default_rng(seed)
    experts_TLK = sample.experts_TLK[known_T]
    count = len(present), statistics.header.num_experts
    load_CLE = _loads(experts_TLK, kind_T, *count)
    shuffled = (_loads(experts_TLK, rng.permutation(kind_B)[block_T], *count) for _ in range(num_shuffles))
    return KindLoads(
        what=what,
        names=tuple(names[kind] for kind in present.tolist()),
        load_CLE=load_CLE,
        distance_CL=_distances(load_CLE),
        null_SCL=np.stack([_distances(null_CLE) for null_CLE in shuffled]),
    )


def _kinds(statistics: RoutingStatistics, sample: TokenSample) -> tuple[str, tuple[str, ...], IntArray]:
    if sample.domain_T is not None:
        return "domain", statistics.header.domain_names, sample.domain_T
    if sample.rank_T is not None:
        ranks, rank_T = np.unique(sample.rank_T, return_inverse=True)
        if 2 <= len(ranks) <= _MOST_RANKS:
            return "rank", tuple(f"rank {rank}" for rank in ranks.tolist()), rank_T
    stretch_T = np.arange(sample.num_tokens) * _STRETCHES // sample.num_tokens
    return "stretch", tuple(f"stretch {stretch + 1}" for stretch in range(_STRETCHES)), stretch_T


def _blocks(sample: TokenSample) -> IntArray:
    """Return a number of each token's sequence; of its window where sequences are unknown."""
    if sample.sequence_T is None:
        return sample.stratum_T
    if sample.rank_T is None:
        return sample.sequence_T
    return np.asarray(sample.rank_T * (int(sample.sequence_T.max()) + 1) + sample.sequence_T)


def _loads(
    experts_TLK: npt.NDArray[np.integer[Any]], kind_T: IntArray, kinds: int, experts: int
) -> FloatArray:
    load_CLE = np.empty((kinds, experts_TLK.shape[1], experts))
    for layer in range(experts_TLK.shape[1]):
        pair = kind_T[:, np.newaxis] * experts + experts_TLK[:, layer]
        load_CLE[:, layer] = np.bincount(pair.ravel(), minlength=kinds * experts).reshape(kinds, experts)
    return load_CLE


def _distances(load_CLE: FloatArray) -> FloatArray:
    return total_variation(load_CLE, load_CLE.sum(axis=0) - load_CLE)
