"""Times what happens to rows between exchanges and experts: put in order, copied, summed.

Shape letters: R rows, H hidden, K pairs of a row at most, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from placement.runtime.measure.bench import Bench
from placement.runtime.measure.timing import pooled
from placement.runtime.parallel.rows import combine_rows, expand_rows

__all__ = ["ROW_STEPS", "Pairs", "pairs_in_order", "row_curves"]

ROW_STEPS = ("prepare_ms", "unpermute_ms", "expand_ms", "reduce_ms")
"""At the tokens' home: order and copy rows to send, weigh and sum what came back. At the experts: order and
copy what arrived, weigh and sum what goes back."""

_ARRIVED_SHARE = 4
"""A row that arrived wants one in so many of its token's experts here, the rest elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Where each row's pairs are, in the order of what they go to.

    Parameters
    ----------
    row_P
        Row of each pair.
    pair_RK
        Pairs of each row, -1 where there is none.
    """

    row_P: torch.Tensor
    pair_RK: torch.Tensor


def pairs_in_order(key_RK: torch.Tensor, *, num_keys: int, num_pairs: int) -> Pairs:
    """Order pairs by key, on the device alone, as the exchanges do.

    Parameters
    ----------
    key_RK
        What each pair goes to; `num_keys` for no pair.
    num_pairs
        How many are pairs.
    """
    key_Q = key_RK.flatten()
    order_P = torch.argsort(key_Q, stable=True)[:num_pairs]
    pair_Q = torch.full_like(key_Q, -1)
    pair_Q[order_P] = torch.arange(num_pairs, device=key_Q.device)
    counts = torch.zeros(num_keys + 1, dtype=torch.int64, device=key_Q.device)
    counts.scatter_add_(0, key_Q, torch.ones_like(key_Q))
    return Pairs(row_P=order_P // key_RK.shape[1], pair_RK=pair_Q.view(key_RK.shape))


class _Rows:
    """Random rows, and random keys for their pairs."""

    def __init__(self, bench: Bench, *, num_pairs: int, hidden: int, pairs_per_row: int) -> None:
        top_k, device = bench.sizes.top_k, bench.mesh.device
        num_rows = max(1, num_pairs // pairs_per_row)
        self.num_keys = 8 * top_k
        self.num_pairs = num_rows * pairs_per_row
        key_RK = torch.randint(0, self.num_keys, (num_rows, top_k), device=device)
        key_RK[:, pairs_per_row:] = self.num_keys
        self.key_RK = key_RK
        self.x_RH = bench.random(num_rows, hidden)
        self.weight_RK = torch.rand(num_rows, top_k, device=device)

    def ordered(self) -> Pairs:
        return pairs_in_order(self.key_RK, num_keys=self.num_keys, num_pairs=self.num_pairs)

    def expand(self) -> torch.Tensor:
        pairs = self.ordered()
        return expand_rows(self.x_RH, pairs.row_P, pairs.pair_RK)

    def combine(self) -> Callable[[], torch.Tensor]:
        """Return a call that sums the pairs' rows, made before."""
        pairs, y_PH = self.ordered(), self.expand()
        return lambda: combine_rows(y_PH, pairs.row_P, pairs.pair_RK, self.weight_RK)


def row_curves(bench: Bench, hidden_sizes: Sequence[int]) -> dict[str, list[dict[str, object]]]:
    """Return ``{rows, hidden, top_k, ms, spread}`` for each of `ROW_STEPS`; `rows` counts pairs."""
    bench.tell("rows on their way")
    wanted = [
        (pairs, hidden)
        for hidden in sorted(set(hidden_sizes))
        for pairs in sorted(bench.sizes.pairs)
        # Rows before and after.
        if 2 * pairs * hidden * bench.dtype.itemsize <= bench.sizes.activation_bytes
    ]
    curves = {step: _curve(bench, step, wanted) for step in ROW_STEPS}
    return {step: curve for step, curve in curves.items() if curve}


def _curve(bench: Bench, step: str, wanted: Sequence[tuple[int, int]]) -> list[dict[str, object]]:
    done = bench.sweep(
        wanted,
        what=f"sizes of {step}",
        amount=lambda size: size[0] * size[1],
        measure=lambda size: bench.alone(_call(bench, step, *size)),
    )
    return [
        {
            "rows": pairs,
            "hidden": hidden,
            "top_k": bench.sizes.top_k,
            "ms": timing.ms,
            "spread": timing.spread,
        }
        for (pairs, hidden), timing in bench.over_ranks(done, pooled)
    ]


def _call(bench: Bench, step: str, num_pairs: int, hidden: int) -> Callable[[], torch.Tensor]:
    """Return what a step does to so many pairs."""
    top_k = bench.sizes.top_k
    at_home = step in ("prepare_ms", "unpermute_ms")
    pairs_per_row = top_k if at_home else max(1, top_k // _ARRIVED_SHARE)
    rows = _Rows(bench, num_pairs=num_pairs, hidden=hidden, pairs_per_row=pairs_per_row)
    return rows.expand if step in ("prepare_ms", "expand_ms") else rows.combine()
