"""A routing trace: which experts every token selected in every MoE layer, in recorded order.

Shape letters: T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["MAX_EXPERTS", "UNKNOWN_DOMAIN", "Trace", "joined"]

MAX_EXPERTS = 1 << 16
"""Expert ids are kept in at most two bytes."""

UNKNOWN_DOMAIN = -1
"""Domain id of a token whose domain was not recorded."""

ExpertArray = npt.NDArray[np.unsignedinteger[Any]]
IntArray = npt.NDArray[np.int64]

_CHECKED_AT_ONCE = 1 << 20
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_TOKEN_FIELDS = ("sequence_T", "position_T", "rank_T", "domain_T")


def _read_only(array: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    view = np.ascontiguousarray(array, dtype=dtype).view()
    view.setflags(write=False)
    return view


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Expert choices of consecutive tokens, with what is known about where each token came from.

    Parameters
    ----------
    experts_TLK
        Expert ids, ``[tokens, layers, k]``, tokens in recorded order, a token's experts in the router's
        order (first choice first). Kept as ``uint8``, or ``uint16`` above 256 experts.
    num_experts
        Logical experts per layer; some may never be selected.
    sequence_T, position_T
        Sequence of each token, numbered per rank, and its position in it; `None` when unknown.
    rank_T
        Process rank that recorded each token, which is where the token lives before dispatch; `None`
        when unknown.
    domain_T
        Index into `domain_names`; `UNKNOWN_DOMAIN` (-1) where a token has none. `None` when no token has.
    domain_names
        Names of the kinds of traffic (languages, tasks).
    model_name, moe_layer_ids
        What the layers are: `moe_layer_ids[i]` is the decoder layer of MoE layer `i`.

    Raises
    ------
    InputError
        If the trace is empty, shapes disagree, ids are not integers or out of range, or a token names
        the same expert twice in a layer.
    """

    experts_TLK: ExpertArray
    num_experts: int
    sequence_T: IntArray | None = None
    position_T: IntArray | None = None
    rank_T: IntArray | None = None
    domain_T: IntArray | None = None
    domain_names: tuple[str, ...] = ()
    model_name: str | None = None
    moe_layer_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        num_experts = int(self.num_experts)
        set_(self, "num_experts", num_experts)
        experts = _checked_experts(np.asarray(self.experts_TLK), num_experts)
        set_(self, "experts_TLK", _read_only(experts, np.uint8 if num_experts <= 256 else np.uint16))
        _check_distinct(self.experts_TLK)
        set_(self, "domain_names", tuple(str(name) for name in self.domain_names))
        _check_names(self.domain_names, self.model_name)
        for name in _TOKEN_FIELDS:
            if getattr(self, name) is not None:
                set_(self, name, self._checked_field(name))
        if self.domain_T is not None and int(self.domain_T.max()) == UNKNOWN_DOMAIN:
            set_(self, "domain_T", None)
        if self.moe_layer_ids is not None:
            set_(self, "moe_layer_ids", tuple(int(layer) for layer in self.moe_layer_ids))
            self._check_layer_ids(self.moe_layer_ids)

    @classmethod
    def trusted(cls, *, experts_TLK: ExpertArray, num_experts: int, **fields: Any) -> Trace:
        """Make a trace of what was checked before: no pass over the ids is made.

        Parameters
        ----------
        experts_TLK
            Valid expert ids, of the type that the trace keeps.
        num_experts, **fields
            As the constructor takes them, valid too.

        Raises
        ------
        InputError
            If there are no tokens.
        """
        if 0 in experts_TLK.shape:
            raise InputError(f"the trace is empty: {experts_TLK.shape} is its number of [tokens, layers, k]")
        trace = object.__new__(cls)
        given = {"experts_TLK": experts_TLK, "num_experts": num_experts, **fields}
        for field in dataclasses.fields(cls):
            value = given.pop(field.name, field.default)
            if field.name in ("experts_TLK", *_TOKEN_FIELDS) and value is not None:
                value = _read_only(value, value.dtype)
            object.__setattr__(trace, field.name, value)
        if given:
            raise TypeError(f"a trace has no {', '.join(given)}")
        if trace.domain_T is not None and int(trace.domain_T.max()) == UNKNOWN_DOMAIN:
            object.__setattr__(trace, "domain_T", None)
        return trace

    def _checked_field(self, name: str) -> IntArray:
        """One number per token; only domains may be unknown (-1), and they have an upper end."""
        values = np.asarray(getattr(self, name))
        if values.shape != (self.num_tokens,):
            raise InputError(f"{name} has shape {values.shape}, the trace {self.num_tokens} tokens")
        if values.dtype.kind not in "iu":
            raise InputError(f"{name} holds {values.dtype} values, not integers")
        is_domain = name == "domain_T"
        least = UNKNOWN_DOMAIN if is_domain else 0
        most = len(self.domain_names) - 1 if is_domain else np.iinfo(np.int64).max
        if int(values.min()) < least or int(values.max()) > most:
            token = int(np.nonzero((values < least) | (values > most))[0][0])
            raise InputError(f"token {token} has {name} {values[token]}, outside {least}..{most}")
        return _read_only(values, np.int64)

    def _check_layer_ids(self, layer_ids: tuple[int, ...]) -> None:
        if len(layer_ids) != self.num_layers:
            raise InputError(f"moe_layer_ids names {len(layer_ids)} layers, the trace has {self.num_layers}")
        if any(b <= a for a, b in zip((-1, *layer_ids), layer_ids, strict=False)):
            raise InputError(f"moe_layer_ids {list(layer_ids)} do not ascend from 0")

    @property
    def num_tokens(self) -> int:
        """Tokens."""
        return int(self.experts_TLK.shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.experts_TLK.shape[1])

    @property
    def top_k(self) -> int:
        """Experts that each token selects in each layer."""
        return int(self.experts_TLK.shape[2])

    @property
    def size_bytes(self) -> int:
        """Memory that the arrays take, in bytes."""
        fields = (getattr(self, name) for name in _TOKEN_FIELDS)
        return int(self.experts_TLK.nbytes + sum(field.nbytes for field in fields if field is not None))

    @cached_property
    def digest(self) -> str:
        """``"sha256:..."`` of the content, the same whatever file format it was read from."""
        fields = {name: getattr(self, name) is not None for name in _TOKEN_FIELDS}
        header = {
            "shape": self.experts_TLK.shape,
            "num_experts": self.num_experts,
            "domain_names": self.domain_names,
            "model_name": self.model_name,
            "moe_layer_ids": self.moe_layer_ids,
            "fields": fields,
        }
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for array in (self.experts_TLK, *(getattr(self, name) for name, given in fields.items() if given)):
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return f"sha256:{digest.hexdigest()}"

    def select_tokens(self, index: npt.ArrayLike | slice) -> Trace:
        """Return the trace of some tokens, in the order given.

        Parameters
        ----------
        index
            Token numbers, a mask ``[tokens]`` or a slice.

        Raises
        ------
        InputError
            If no token is selected or a number is out of range.
        """
        chosen = index if isinstance(index, slice) else self._checked_index(np.asarray(index))
        fields = {name: getattr(self, name) for name in ("experts_TLK", *_TOKEN_FIELDS)}
        kept: dict[str, Any] = {name: all_T[chosen] for name, all_T in fields.items() if all_T is not None}
        return Trace.trusted(
            num_experts=self.num_experts,
            domain_names=self.domain_names,
            model_name=self.model_name,
            moe_layer_ids=self.moe_layer_ids,
            **kept,
        )

    def _checked_index(self, index: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if index.dtype == np.bool_ and index.shape == (self.num_tokens,):
            return index
        if index.dtype.kind not in "iu" or index.ndim != 1 or not index.size:
            raise InputError(
                f"tokens are selected by a list of numbers or a mask of {self.num_tokens}, "
                f"not by {index.dtype} values of shape {index.shape}"
            )
        if int(index.min()) < 0 or int(index.max()) >= self.num_tokens:
            raise InputError(
                f"tokens {int(index.min())}..{int(index.max())} are selected of a trace of {self.num_tokens}"
            )
        return index

    def count_windows(self, window_tokens: int) -> int:
        """Return how many whole windows of consecutive tokens the trace holds.

        Raises
        ------
        InputError
            If it does not hold one.
        """
        if window_tokens < 1:
            raise InputError(f"a window of {window_tokens} tokens is impossible; use at least 1")
        if self.num_tokens < window_tokens:
            raise InputError(
                f"the trace has {self.num_tokens} tokens, less than one window of {window_tokens}; "
                f"use a longer trace or a window of at most {self.num_tokens} tokens"
            )
        return self.num_tokens // window_tokens

    def split_alternate(self, window_tokens: int) -> tuple[Trace, Trace]:
        """Split into the tokens of even windows (to fit on) and of odd windows (to score on).

        The trailing remainder that fills no window is dropped, so windows of the same size cut both
        parts where they were cut here.

        Parameters
        ----------
        window_tokens
            Consecutive tokens per window.

        Raises
        ------
        InputError
            If the trace holds fewer than two windows.
        """
        num_windows = self.count_windows(window_tokens)
        if num_windows < 2:
            raise InputError(
                f"the trace has {self.num_tokens} tokens, less than two windows of {window_tokens} to fit "
                f"and to score on; use a longer trace or a window of at most {self.num_tokens // 2} tokens"
            )
        window_T = np.arange(self.num_tokens) // window_tokens
        whole_T = window_T < num_windows
        return self.select_tokens(whole_T & (window_T % 2 == 0)), self.select_tokens(
            whole_T & (window_T % 2 == 1)
        )

    def interleave_ranks(self) -> Trace:
        """Return the tokens in the order in which parallel ranks met them, as far as that is known.

        A data set lists rank after rank, yet ranks run at the same time: a step's load is the sum over
        ranks. Each rank's tokens keep their order and are spread evenly over the whole trace, so that
        every window holds the ranks' shares of the same stretch of time. Without ranks, or with one,
        the trace is returned as it is.
        """
        if self.rank_T is None or (self.rank_T == self.rank_T[0]).all():
            return self
        by_rank = np.argsort(self.rank_T, kind="stable")
        _, first, count = np.unique(self.rank_T[by_rank], return_index=True, return_counts=True)
        place_T = np.arange(self.num_tokens) - np.repeat(first, count)
        progress_T = (place_T + 0.5) / np.repeat(count, count)
        return self.select_tokens(by_rank[np.argsort(progress_T, kind="stable")])


def joined(traces: Sequence[Trace]) -> Trace:
    """Return consecutive parts of one trace as one trace.

    A part without domains among parts that have some gets unknown ones.

    Raises
    ------
    InputError
        If there is no part, or the parts differ in shape, model, domain names or in what is known of tokens.
    """
    if not traces:
        raise InputError("the trace is empty: it holds no token")
    first = traces[0]
    if len(traces) == 1:
        return first
    for other in traces[1:]:
        for name in ("num_layers", "top_k", "num_experts", "domain_names", "model_name", "moe_layer_ids"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                raise InputError(f"parts of a trace differ in {name}: {mine!r} and {theirs!r}")
    fields: dict[str, Any] = {"experts_TLK": np.concatenate([part.experts_TLK for part in traces])}
    for name in _TOKEN_FIELDS:
        parts = [getattr(part, name) for part in traces]
        if all(part is None for part in parts):
            continue
        if name == "domain_T":
            unknown = (np.full(part.num_tokens, UNKNOWN_DOMAIN) for part in traces)
            parts = [given if given is not None else none for given, none in zip(parts, unknown, strict=True)]
        elif any(part is None for part in parts):
            raise InputError(f"some parts of a trace have {name}, others have none")
        fields[name] = np.concatenate(parts)
    kept = {
        name: getattr(first, name) for name in ("num_experts", "domain_names", "model_name", "moe_layer_ids")
    }
    return Trace.trusted(**kept, **fields)


def _checked_experts(experts: npt.NDArray[Any], num_experts: int) -> npt.NDArray[Any]:
    if experts.ndim != 3:
        raise InputError(f"expert ids have shape {experts.shape}, not [tokens, layers, k]")
    if 0 in experts.shape:
        raise InputError(f"the trace is empty: {experts.shape} is its number of [tokens, layers, k]")
    if experts.dtype.kind not in "iu":
        raise InputError(f"expert ids are {experts.dtype} values, not integers")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise InputError(f"{num_experts} experts per layer; 1 to {MAX_EXPERTS} are possible")
    if int(experts.min()) < 0 or int(experts.max()) >= num_experts:
        outside = (experts < 0) | (experts >= num_experts)
        token, layer, choice = (int(i) for i in np.unravel_index(int(outside.argmax()), experts.shape))
        raise InputError(
            f"token {token} layer {layer} names expert {experts[token, layer, choice]}, "
            f"outside 0..{num_experts - 1}"
        )
    return experts


def _check_distinct(experts_TLK: ExpertArray) -> None:
    """Refuse a token that names an expert twice in a layer; pairwise, in pieces that fit the cache."""
    num_tokens, num_layers, top_k = experts_TLK.shape
    step = max(1, _CHECKED_AT_ONCE // (num_layers * top_k))
    for start in range(0, num_tokens, step):
        piece = experts_TLK[start : start + step].reshape(-1, top_k)
        choice_K = np.ascontiguousarray(piece.T)
        for k in range(1, top_k):
            same = choice_K[:k] == choice_K[k]
            if same.any():
                record = int(same.any(axis=0).argmax())
                raise InputError(
                    f"token {start + record // num_layers} layer {record % num_layers} names expert "
                    f"{piece[record, k]} twice; a token's experts are distinct"
                )


def _check_names(domain_names: tuple[str, ...], model_name: str | None) -> None:
    for name in (*domain_names, *([] if model_name is None else [model_name])):
        if _UNPRINTABLE.search(name):
            raise InputError(f"the name {name!a} contains control characters")
    if len(set(domain_names)) < len(domain_names):
        twice = next(name for name in domain_names if domain_names.count(name) > 1)
        raise InputError(f"two domains have the name {twice!a}; names are distinct")
