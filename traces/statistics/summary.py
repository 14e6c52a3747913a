"""A summary of traffic for people: sizes, and per layer how uneven, drifting and co-active it is.

Shape letters: L MoE layers, E experts, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from traces.source import MemorySource, TraceHeader, TraceSource
from traces.statistics.collector import columns
from traces.statistics.routing import RoutingStatistics, total_variation
from traces.statistics.sequences import SequenceCount
from traces.trace import UNKNOWN_DOMAIN, IntArray, Trace

if TYPE_CHECKING:
    from traces.store import ColumnBlock

__all__ = ["LayerSummary", "TraceSummary", "describe"]

FloatArray = npt.NDArray[np.float64]

_COACTIVATION_TOKENS = 1 << 16
_BLOCK_BYTES = 1 << 26
_COUNTED_AT_ONCE = 1 << 15
_FIT_ROUNDS = 100
_TOKEN_FIELDS = ("sequence_T", "position_T", "rank_T", "domain_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """How one MoE layer's routing looks.

    Parameters
    ----------
    layer
        Index of the MoE layer.
    busiest_over_mean
        Load of the busiest expert over the mean load of all experts; 1 is even.
    coefficient_of_variation
        Standard deviation of the experts' loads over their mean; 0 is even.
    active_experts
        Experts that were selected at all.
    drift
        Total variation distance between the expert shares of the first and of the last half of the
        tokens, ``0.5 * sum |p - q|``; 0 is the same traffic, 1 disjoint.
    coactivation
        Total variation distance between the pairs of experts that tokens select together and the pairs
        that the experts' popularity alone would make; 0 means partners are chosen by popularity, 1 that
        only few of the possible pairs occur. What placement can save in traffic grows with it. `None`
        for top-1, and where pairs are not known. A short trace shows some by chance.
    """

    layer: int
    busiest_over_mean: float
    coefficient_of_variation: float
    active_experts: int
    drift: float
    coactivation: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSummary:
    """What a trace holds, in numbers; `None` where it does not say.

    Parameters
    ----------
    num_tokens, num_sequences, num_layers, num_experts, top_k, num_ranks
        Sizes; sequences are counted per rank.
    domain_tokens
        Tokens of every named domain.
    model_name, moe_layer_ids
        As in `Trace`.
    size_bytes
        Memory that the trace takes, in bytes.
    digest
        Digest of the content.
    layers
        One summary per MoE layer.
    """

    num_tokens: int
    num_sequences: int | None
    num_layers: int
    num_experts: int
    top_k: int
    num_ranks: int | None
    domain_tokens: Mapping[str, int]
    model_name: str | None
    moe_layer_ids: tuple[int, ...] | None
    size_bytes: int
    digest: str
    layers: tuple[LayerSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `json.dumps` accepts."""
        return asdict(self)


def describe(traffic: Trace | TraceSource) -> TraceSummary:
    """Summarise a trace in one pass, or statistics of one.

    Loads and drift count every token; co-activation counts up to 65,536 tokens, evenly spaced. Statistics
    know neither sequences nor halves to the token: drift is then between halves of their stretches of time,
    and co-activation counts every token if they do.

    Parameters
    ----------
    traffic
        A trace, whose tokens are taken in the order in which it lists them; a source, in the order in which
        they were routed; or statistics.

    Raises
    ------
    InputError
        If the source is damaged.
    """
    if isinstance(traffic, RoutingStatistics):
        return _of_statistics(traffic)
    source = _AsListed(traffic) if isinstance(traffic, Trace) else traffic
    return _Summing(source).summary()


class _AsListed(MemorySource):
    """A trace as a source, its tokens in its own order."""

    @property
    def _in_order(self) -> Trace:
        return self.trace


def _of_statistics(statistics: RoutingStatistics) -> TraceSummary:
    header = statistics.header
    domain_tokens_C = statistics.domain_tokens_C
    pairs = statistics.coactivation_LEE is not None or statistics.sample is not None
    return TraceSummary(
        num_tokens=statistics.num_tokens,
        num_sequences=None,
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        top_k=header.top_k,
        num_ranks=None if statistics.rank_R is None else len(statistics.rank_R),
        domain_tokens={}
        if domain_tokens_C is None
        else dict(zip(header.domain_names, domain_tokens_C.tolist(), strict=True)),
        model_name=header.model_name,
        moe_layer_ids=header.moe_layer_ids,
        size_bytes=statistics.size_bytes,
        digest=statistics.digest,
        layers=tuple(
            _layer_summary(
                layer,
                statistics.load_LE[layer],
                drift=float(statistics.drift_L[layer]),
                coactivation=coactivation_of(statistics.coactivation(layer))
                if pairs and header.top_k > 1
                else None,
            )
            for layer in range(header.num_layers)
        ),
    )


def _layer_summary(
    layer: int, load_E: npt.NDArray[Any], *, drift: float, coactivation: float | None
) -> LayerSummary:
    mean = load_E.mean() or 1.0
    return LayerSummary(
        layer=layer,
        busiest_over_mean=float(load_E.max() / mean),
        coefficient_of_variation=float(load_E.std() / mean),
        active_experts=int(np.count_nonzero(load_E)),
        drift=drift,
        coactivation=coactivation,
    )


class _Summing:
    """One pass over a source: loads of both halves, evenly spaced tokens, and who they are."""

    def __init__(self, source: TraceSource) -> None:
        self._source, header = source, source.header
        loads = header.num_layers, header.num_experts
        num_tokens = source.num_tokens
        self._half = num_tokens // 2
        self._half_load = np.zeros((2, *loads), dtype=np.uint64)
        self._middle_LE = np.zeros(loads, dtype=np.uint64)
        self._no_windows = np.zeros((0, *loads), dtype=np.uint16)
        spaced = min(num_tokens, _COACTIVATION_TOKENS) if header.top_k > 1 else 0
        self._spaced_T = np.arange(spaced) * num_tokens // max(1, spaced)
        self._experts_LTK = np.empty((header.num_layers, spaced, header.top_k), dtype=header.dtype)
        self._domain_tokens_C = np.zeros(len(header.domain_names), dtype=np.int64)
        self._sequences = SequenceCount()
        self._known: set[str] = set()
        self._ranks: set[int] = set()

    def summary(self) -> TraceSummary:
        source, header = self._source, self._source.header
        token = 0
        for block in columns(source, 0, source.num_tokens, max_tokens=_block_tokens(header)):
            self._add(block, token)
            token += block.num_tokens
        load_LE = self._half_load.sum(axis=0) + self._middle_LE
        drift_L = total_variation(*self._half_load)
        domains = dict(zip(header.domain_names, self._domain_tokens_C.tolist(), strict=True))
        return TraceSummary(
            num_tokens=source.num_tokens,
            num_sequences=self._sequences.count if "sequence_T" in self._known else None,
            num_layers=header.num_layers,
            num_experts=header.num_experts,
            top_k=header.top_k,
            num_ranks=len(self._ranks) if "rank_T" in self._known else None,
            domain_tokens=domains if "domain_T" in self._known else {},
            model_name=header.model_name,
            moe_layer_ids=header.moe_layer_ids,
            size_bytes=source.num_tokens * (_record_bytes(header) + 8 * len(self._known)),
            digest=source.digest,
            layers=tuple(
                _layer_summary(
                    layer,
                    load_LE[layer],
                    drift=float(drift_L[layer]),
                    coactivation=None if header.top_k < 2 else self._coactivation(layer),
                )
                for layer in range(header.num_layers)
            ),
        )

    def _add(self, block: ColumnBlock, first_token: int) -> None:
        from traces.statistics.kernels import count_loads

        stop_P, half_P = self._pieces(first_token, block.num_tokens)
        no_P = np.full(len(stop_P), -1)
        first, stop = np.searchsorted(self._spaced_T, (first_token, first_token + block.num_tokens))
        place_T = self._spaced_T[first:stop] - first_token
        for layer, ids_TK in enumerate(block.ids_LTK):
            count_loads(
                ids_TK, layer, stop_P, no_P, half_P, self._no_windows, self._half_load, self._middle_LE
            )
            self._experts_LTK[layer, first:stop] = ids_TK[place_T]
        self._known |= {name for name in _TOKEN_FIELDS if getattr(block, name) is not None}
        if block.domain_T is not None:
            known = block.domain_T[block.domain_T != UNKNOWN_DOMAIN]
            self._domain_tokens_C += np.bincount(known, minlength=len(self._domain_tokens_C))
        if block.rank_T is not None:
            self._ranks.update(np.unique(block.rank_T).tolist())
        if block.sequence_T is not None:
            self._sequences.add(block.sequence_T, block.rank_T)

    def _pieces(self, first_token: int, num_tokens: int) -> tuple[IntArray, IntArray]:
        """Cut a block where the first half ends and where the last one begins."""
        ends = np.array([self._half, self._source.num_tokens - self._half, self._source.num_tokens])
        return np.clip(ends - first_token, 0, num_tokens), np.array([0, -1, 1])

    def _coactivation(self, layer: int) -> float:
        from traces.statistics.kernels import count_coactivation

        experts = self._source.header.num_experts
        table, count = np.empty((experts, experts), np.uint16), np.zeros((experts, experts), np.uint32)
        ids_TK = self._experts_LTK[layer]
        for start in range(0, len(ids_TK), _COUNTED_AT_ONCE):
            count_coactivation(ids_TK[start : start + _COUNTED_AT_ONCE], table, count)
        return coactivation_of((count + count.T).astype(np.float64))


def _record_bytes(header: TraceHeader) -> int:
    return header.num_layers * header.top_k * header.dtype.itemsize


def _block_tokens(header: TraceHeader) -> int:
    return int(np.clip(_BLOCK_BYTES // _record_bytes(header), 1, _COUNTED_AT_ONCE))


def coactivation_of(pairs_EE: FloatArray) -> float:
    """Total variation distance between pairs selected together and those that popularity alone would make."""
    total = pairs_EE.sum()
    if not total:
        return 0.0
    chance_EE = _chance_pairs_EE(pairs_EE.sum(axis=1))
    return float(0.5 * np.abs(pairs_EE - chance_EE).sum() / total)


def _chance_pairs_EE(pairs_E: FloatArray) -> FloatArray:
    """Pairs of different experts that popularity alone makes, ``x_e * x_f``, with the given row sums.

    Fitted by Sinkhorn's iteration in its symmetric form, damped by a square root.
    """
    x_E = pairs_E / np.sqrt(max(pairs_E.sum(), 1))
    for _ in range(_FIT_ROUNDS):
        others_E = x_E.sum() - x_E
        x_E = np.sqrt(x_E * np.divide(pairs_E, others_E, out=np.zeros_like(x_E), where=others_E > 0))
    chance = np.outer(x_E, x_E)
    np.fill_diagonal(chance, 0)
    return chance
