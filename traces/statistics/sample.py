"""A sample of tokens with all their experts: as many of every stretch of time, drawn so that samples merge.

Every token has a random priority that follows from the seed and its number alone, and a stratum keeps the
tokens of lowest priority. So the sample of a whole is the same however the whole was cut, and the lowest of
two samples' tokens are a sample of both. Shape letters: T sampled tokens, L MoE layers, K top-k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.source import TraceHeader
from traces.trace import ExpertArray, IntArray

__all__ = ["TOKEN_FIELDS", "TokenSample", "draw", "lowest"]

FloatArray = npt.NDArray[np.float64]

TOKEN_FIELDS = ("sequence_T", "position_T", "rank_T", "domain_T")
"""What may be known of a token beside its experts."""

_PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSample:
    """Sampled tokens, stratum by stratum in time order, each stratum's tokens in their order.

    Parameters
    ----------
    experts_TLK
        Expert ids, as in `Trace`.
    token_T
        Number of each token in the trace that it comes from.
    stratum_T
        Stratum of each token, ascending. One past the last stratum marks tokens that fill no window; they are
        there only if all tokens are.
    priority_T
        Random priority in [0, 1) by which the token was chosen.
    most_per_stratum
        So many tokens of lowest priority are kept of each stratum.
    sequence_T, position_T, rank_T, domain_T
        As in `Trace`; `None` where unknown. Sequences are numbered per rank and trace.
    """

    ARRAYS: ClassVar[tuple[str, ...]] = ("experts_TLK", "token_T", "stratum_T", "priority_T", *TOKEN_FIELDS)

    experts_TLK: ExpertArray
    token_T: IntArray
    stratum_T: IntArray
    priority_T: FloatArray
    most_per_stratum: int
    sequence_T: IntArray | None = None
    position_T: IntArray | None = None
    rank_T: IntArray | None = None
    domain_T: IntArray | None = None

    def __post_init__(self) -> None:
        for name, array in self.arrays().items():
            if array is not None:
                view = array.view()
                view.setflags(write=False)
                object.__setattr__(self, name, view)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return len(self.experts_TLK)

    def arrays(self) -> dict[str, npt.NDArray[Any] | None]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in self.ARRAYS}

    def check(self, header: TraceHeader, *, num_strata: int) -> None:
        """Refuse a sample that is none of such a trace.

        Raises
        ------
        InputError
            If shapes, ids or strata are out of range.
        """
        num_tokens = self.num_tokens
        if self.experts_TLK.shape != (num_tokens, header.num_layers, header.top_k):
            raise InputError(
                f"sampled experts have shape {self.experts_TLK.shape}, not [tokens, {header.num_layers}, "
                f"{header.top_k}]"
            )
        for name, array in self.arrays().items():
            if array is not None and name != "experts_TLK" and array.shape != (num_tokens,):
                raise InputError(f"{name} has shape {array.shape}, the sample {num_tokens} tokens")
        if not num_tokens:
            return
        if int(self.experts_TLK.max()) >= header.num_experts:
            raise InputError(f"the sample names expert {int(self.experts_TLK.max())} of {header.num_experts}")
        if (np.diff(self.stratum_T) < 0).any() or self.stratum_T[0] < 0 or self.stratum_T[-1] > num_strata:
            raise InputError(f"strata of the sample must ascend within 0..{num_strata}")

    def select(self, index: npt.NDArray[Any], **changed: Any) -> TokenSample:
        """Return some of the tokens, in the order given, with other fields changed."""
        kept: dict[str, Any] = {
            name: None if array is None else array[index] for name, array in self.arrays().items()
        }
        return replace(self, **(kept | changed))

    def pairs(
        self,
        layer: int,
        other: int,
        *,
        weight_T: FloatArray,
        num_experts: int,
        choices: int | None = None,
    ) -> FloatArray:
        """Add up the weights of tokens that select e in `layer` and f in `other`, ``[experts, experts]``.

        Parameters
        ----------
        layer, other
            MoE layers.
        weight_T
            Weight of each token.
        num_experts
            Experts per layer.
        choices
            How many of a token's experts count, from the first choice on; all by default.
        """
        count: FloatArray = np.zeros(num_experts * num_experts)
        step = max(1, _PAIRS_AT_ONCE // self.experts_TLK.shape[2] ** 2)
        for start in range(0, self.num_tokens, step):
            piece = slice(start, start + step)
            rows, columns = (
                self.experts_TLK[piece, which, :choices].astype(np.int64) for which in (layer, other)
            )
            cell = rows[:, :, None] * num_experts + columns[:, None, :]
            weight = np.broadcast_to(weight_T[piece, None, None], cell.shape)
            count += np.bincount(cell.ravel(), weights=weight.ravel(), minlength=count.size)
        return count.reshape(num_experts, num_experts)


def draw(
    *, seed: int, first_token: int, num_tokens: int, most: int, window_tokens: int
) -> tuple[IntArray, FloatArray]:
    """Choose the tokens of lowest priority of a stretch of whole windows.

    Parameters
    ----------
    seed
        Seed of the priorities.
    first_token, num_tokens
        The stretch.
    most
        Tokens to choose.
    window_tokens
        Priorities are drawn so many at a time.

    Returns
    -------
    token_T, priority_T
        Numbers of the tokens, ascending, and their priorities.
    """
    bits = np.random.PCG64(seed)
    bits.advance(first_token)
    random = np.random.Generator(bits)
    token_T, priority_T = np.zeros(0, dtype=np.int64), np.zeros(0)
    for start in range(0, num_tokens, window_tokens):
        stop = min(start + window_tokens, num_tokens)
        token_T = np.concatenate([token_T, np.arange(first_token + start, first_token + stop)])
        priority_T = np.concatenate([priority_T, random.random(stop - start)])
        token_T, priority_T = _lowest(token_T, priority_T, most)
    return token_T, priority_T


def _lowest(token_T: IntArray, priority_T: FloatArray, most: int) -> tuple[IntArray, FloatArray]:
    kept = lowest(priority_T, most)
    return token_T[kept], priority_T[kept]


def lowest(priority_T: FloatArray, most: int) -> IntArray:
    """Return the places of the lowest priorities, ascending."""
    if len(priority_T) <= most:
        return np.arange(len(priority_T))
    return np.sort(np.argpartition(priority_T, most - 1)[:most])
