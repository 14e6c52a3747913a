"""What a data set holds, told from its manifests and footers: a second for a billion records.

Shape letters: F fragments, L MoE layers, E experts, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.source import TraceSource
from traces.statistics.summary import LayerSummary, TraceSummary, coactivation_of, describe
from traces.store.columns import ColumnBlock
from traces.store.footer import FragmentContent
from traces.store.manifest import Fragment
from traces.store.source import DatasetSource
from traces.trace import IntArray

__all__ = ["DatasetSummary", "summarise"]

_READ_WHOLE_RECORDS = 1 << 21
_SAMPLED_TOKENS = 1 << 15
_STRETCHES = 8

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """A summary, and how each of its figures was found.

    Parameters
    ----------
    summary
        The figures.
    found
        For ``loads``, ``drift``, ``coactivation`` and ``sequences``: ``"exact"``, or what was taken instead.
    stored
        Fragments, bytes and shards on the disk; `None` if the trace is no data set.
    """

    summary: TraceSummary
    found: Mapping[str, str]
    stored: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `json.dumps` accepts."""
        return {
            **self.summary.to_json(),
            "found": dict(self.found),
            "stored": None if self.stored is None else dict(self.stored),
        }


def summarise(source: TraceSource) -> DatasetSummary:
    """Summarise a trace without reading more of it than a second allows, where it is a data set.

    Loads are exact either way. Of a large data set drift is that between whole fragments, and co-activation
    is that of some tokens evenly spread over it; small ones, and other sources, are read.

    Raises
    ------
    InputError
        If what is read is damaged.
    """
    if not isinstance(source, DatasetSource):
        return DatasetSummary(summary=describe(source), found=_EXACT)
    stored = {
        "fragments": len(source.fragments),
        "shards": len(source.manifests),
        "bytes": source.size_bytes,
        "bytes_per_record": source.size_bytes / (source.num_tokens * source.header.num_layers),
    }
    records = source.num_tokens * source.header.num_layers
    contents = [source.content_of(fragment) for fragment in source.fragments]
    known = [content for content in contents if content is not None]
    if records <= _READ_WHOLE_RECORDS or len(known) < len(contents):
        return DatasetSummary(summary=describe(source), found=_EXACT, stored=stored)
    return _from_footers(source, known, stored)


_EXACT = dict.fromkeys(("loads", "drift", "coactivation", "sequences"), "exact")


def _from_footers(
    source: DatasetSource, contents: Sequence[FragmentContent], stored: Mapping[str, Any]
) -> DatasetSummary:
    header = source.header
    load_LE = np.sum([content.load_LE for content in contents], axis=0)
    sample = list(source.sample(_STRETCHES, max(1, _SAMPLED_TOKENS // _STRETCHES)))
    drift_L, drift_found = _drift(source, contents, sample)
    sequences, sequences_found = _sequences(source, contents)
    tokens = sum(block.num_tokens for _, block in sample)
    ranks = {share.shown for fragment in source.fragments for share in fragment.ranks or ()} - {None}
    ids_bytes = header.num_layers * header.top_k * header.dtype.itemsize
    summary = TraceSummary(
        num_tokens=source.num_tokens,
        num_sequences=sequences,
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        top_k=header.top_k,
        num_ranks=len(ranks) or None,
        domain_tokens=_domain_tokens(source, contents),
        model_name=header.model_name,
        moe_layer_ids=header.moe_layer_ids,
        size_bytes=source.num_tokens * (ids_bytes + 8 * len(source.recorded)),
        digest=source.digest,
        layers=tuple(
            LayerSummary(
                layer=layer,
                busiest_over_mean=float(load_E.max() / load_E.mean()),
                coefficient_of_variation=float(load_E.std() / load_E.mean()),
                active_experts=int(np.count_nonzero(load_E)),
                drift=float(drift_L[layer]),
                coactivation=None
                if header.top_k < 2
                else coactivation_of(
                    _pairs_EE([block.ids_LTK[layer] for _, block in sample], header.num_experts)
                ),
            )
            for layer, load_E in enumerate(load_LE)
        ),
    )
    found = {
        "loads": "exact",
        "drift": drift_found,
        "coactivation": f"{tokens} tokens, evenly spread",
        "sequences": sequences_found,
    }
    return DatasetSummary(summary=summary, found=found, stored=stored)


def _pairs_EE(pieces: Sequence[npt.NDArray[Any]], num_experts: int) -> FloatArray:
    """Count the tokens that select each ordered pair of different experts, ``[experts, experts]``."""
    choice_KT = np.ascontiguousarray(np.concatenate(pieces).T.astype(np.int32))
    count = np.zeros(num_experts * num_experts)
    for k in range(1, len(choice_KT)):
        count += np.bincount((choice_KT[:k] * num_experts + choice_KT[k]).ravel(), minlength=count.size)
    half = count.reshape(num_experts, num_experts)
    return half + half.T


def _drift(
    source: DatasetSource,
    contents: Sequence[FragmentContent],
    sample: Sequence[tuple[FloatArray, ColumnBlock]],
) -> tuple[FloatArray, str]:
    """Compare the loads of fragments that lie in the first half of their rank's tokens with those behind."""
    shape = contents[0].load_LE.shape
    half_LE = np.zeros((2, *shape), dtype=np.int64)
    fragment = 0
    for manifest in source.manifests:
        middle, start = manifest.num_tokens / 2, 0
        for entry in manifest.fragments:
            stop = start + entry.tokens
            if stop <= middle or start >= middle:
                half_LE[int(start >= middle)] += contents[fragment].load_LE
            start, fragment = stop, fragment + 1
    if half_LE.any(axis=(1, 2)).all():
        # Fragments across the middle count for neither half.
        return _total_variation(*half_LE), "whole fragments of either half"
    half_LE[:] = 0
    for progress_T, block in sample:
        middle = int(np.searchsorted(progress_T, 0.5))
        for layer, ids_TK in enumerate(block.ids_LTK):
            half_LE[0, layer] += np.bincount(ids_TK[:middle].ravel(), minlength=shape[1])
            half_LE[1, layer] += np.bincount(ids_TK[middle:].ravel(), minlength=shape[1])
    tokens = sum(block.num_tokens for _, block in sample)
    return _total_variation(*half_LE), f"{tokens} tokens, evenly spread"


def _total_variation(first_LE: IntArray, last_LE: IntArray) -> FloatArray:
    first, last = (load / np.maximum(load.sum(axis=1, keepdims=True), 1) for load in (first_LE, last_LE))
    distance_L: FloatArray = 0.5 * np.abs(first - last).sum(axis=1)
    return distance_L


def _sequences(source: DatasetSource, contents: Sequence[FragmentContent]) -> tuple[int | None, str]:
    """Add up the fragments' sequences; one that goes on in the next fragment counts once."""
    if any(content.sequences is None for content in contents):
        return None, "exact"
    of_rank: dict[int | None, list[tuple[int, int, int]]] = {}
    exact = True
    for fragment, content in zip(source.fragments, contents, strict=True):
        least, greatest, count = content.sequences or (0, 0, 0)
        shares = fragment.ranks or ()
        exact = exact and len(shares) == 1
        rank = shares[0].shown if len(shares) == 1 else None
        offset = fragment.sequence_offset
        of_rank.setdefault(rank, []).append((least + offset, greatest + offset, count))
    total = 0
    for ranges in of_rank.values():
        ranges.sort()
        total += sum(count for _, _, count in ranges)
        for (_, greatest, _), (least, _, _) in pairwise(ranges):
            total -= least == greatest
            exact = exact and least >= greatest
    return total, "exact" if exact else "at most"


def _domain_tokens(source: DatasetSource, contents: Sequence[FragmentContent]) -> dict[str, int]:
    names = source.header.domain_names
    tokens = [0] * len(names)
    for fragment, content in zip(source.fragments, contents, strict=True):
        for stored, number in enumerate(content.domain_tokens):
            tokens[_shown(fragment, stored)] += number
    return dict(zip(names, tokens, strict=True)) if any(tokens) else {}


def _shown(fragment: Fragment, domain: int) -> int:
    return domain if fragment.domain_of is None else fragment.domain_of[domain]
