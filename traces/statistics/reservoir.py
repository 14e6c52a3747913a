"""Takes the sampled tokens out of a stream of blocks: they are drawn before they come.

Shape letters: T sampled tokens, S strata.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from traces.source import TraceHeader
from traces.statistics.plan import MemoryPlan
from traces.statistics.sample import TOKEN_FIELDS, TokenSample, draw
from traces.trace import UNKNOWN_DOMAIN, IntArray

if TYPE_CHECKING:
    from traces.statistics.segment import Segment
    from traces.store import ColumnBlock

__all__ = ["Reservoir"]

FloatArray = npt.NDArray[np.float64]


class Reservoir:
    """Room for the sample of one segment, filled as the segment's blocks pass.

    Parameters
    ----------
    header
        Shape of the trace.
    plan
        How many tokens of how many windows are sampled.
    segment
        What will pass.
    window_tokens
        Consecutive tokens per window.
    seed
        Seed of the sample.
    """

    def __init__(
        self, header: TraceHeader, plan: MemoryPlan, segment: Segment, *, window_tokens: int, seed: int
    ) -> None:
        self._segment, self._seed = segment, seed
        self._window_tokens, self._stride = window_tokens, plan.window_stride
        self._most = plan.most_per_stratum
        self._whole = self._most >= plan.window_stride * window_tokens
        tokens_S = segment.group_windows(plan.window_stride) * window_tokens
        room = int(np.minimum(tokens_S, self._most).sum())
        if self._whole:
            room += segment.tail_tokens
        self._experts_TLK = np.empty((room, header.num_layers, header.top_k), dtype=header.dtype)
        self._token_T, self._stratum_T = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
        self._priority_T = np.empty(room)
        self._fields: dict[str, IntArray] | None = None
        self._filled = 0
        self._strata = self._draws()
        self._drawn: tuple[int, IntArray, FloatArray] | None = None
        self._taken = 0

    def _draws(self) -> Iterator[tuple[int, IntArray, FloatArray]]:
        """Draw stratum by stratum: its number, the tokens chosen, their priorities."""
        if not self._most:
            return
        segment, wide = self._segment, self._stride * self._window_tokens
        begin = segment.first_window * self._window_tokens
        end = begin + segment.num_windows * self._window_tokens
        groups = segment.groups(self._stride)
        for stratum, group in enumerate(groups.tolist()):
            first, stop = max(group * wide, begin), min((group + 1) * wide, end)
            yield stratum, *self._draw(first, stop - first, self._most)
        if self._whole and segment.tail_tokens:
            yield len(groups), *self._draw(end, segment.tail_tokens, segment.tail_tokens)

    def _draw(self, first_token: int, num_tokens: int, most: int) -> tuple[IntArray, FloatArray]:
        return draw(
            seed=self._seed,
            first_token=first_token,
            num_tokens=num_tokens,
            most=most,
            window_tokens=self._window_tokens,
        )

    def take(self, block: ColumnBlock, first_token: int) -> None:
        """Take the sampled tokens of the next block, which begins with token `first_token`."""
        stop_token = first_token + block.num_tokens
        tokens, strata, priorities = [], [], []
        while True:
            if self._drawn is None:
                self._drawn, self._taken = next(self._strata, None), 0
            if self._drawn is None:
                break
            stratum, token_T, priority_T = self._drawn
            upto = int(np.searchsorted(token_T, stop_token))
            piece = slice(self._taken, upto)
            tokens.append(token_T[piece])
            strata.append(np.full(upto - self._taken, stratum))
            priorities.append(priority_T[piece])
            self._taken = upto
            if upto < len(token_T):
                break
            self._drawn = None
        if any(map(len, tokens)):
            self._store(
                block,
                first_token,
                np.concatenate(tokens),
                np.concatenate(strata),
                np.concatenate(priorities),
            )

    def _store(
        self,
        block: ColumnBlock,
        first_token: int,
        token_T: IntArray,
        stratum_T: IntArray,
        priority_T: FloatArray,
    ) -> None:
        place_T = token_T - first_token
        rows = slice(self._filled, self._filled + len(place_T))
        for layer, ids_TK in enumerate(block.ids_LTK):
            self._experts_TLK[rows, layer] = ids_TK[place_T]
        self._token_T[rows], self._stratum_T[rows], self._priority_T[rows] = token_T, stratum_T, priority_T
        known = {name: getattr(block, name) for name in TOKEN_FIELDS}
        if self._fields is None:
            room = len(self._token_T)
            self._fields = {n: np.empty(room, np.int64) for n, a in known.items() if a is not None}
            self._fields.setdefault("domain_T", np.full(room, UNKNOWN_DOMAIN))
        for name in list(self._fields):
            if known[name] is not None:
                self._fields[name][rows] = known[name][place_T]
            elif name == "domain_T":
                self._fields[name][rows] = UNKNOWN_DOMAIN
            else:
                # Known of some tokens alone is as good as unknown.
                del self._fields[name]
        self._filled += len(place_T)

    def sample(self) -> TokenSample | None:
        """Return what was taken, or `None` if nothing was to be."""
        if not self._most:
            return None
        fields = dict(self._fields or {})
        if "domain_T" in fields and not (fields["domain_T"] != UNKNOWN_DOMAIN).any():
            del fields["domain_T"]
        filled = slice(0, self._filled)
        return TokenSample(
            experts_TLK=self._experts_TLK[filled],
            token_T=self._token_T[filled],
            stratum_T=self._stratum_T[filled],
            priority_T=self._priority_T[filled],
            most_per_stratum=self._most,
            **{name: array[filled] for name, array in fields.items()},
        )
