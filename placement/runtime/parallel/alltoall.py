"""An all-to-all of rows that gradients travel back through.

Shape letters: N rows sent, R rows received.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from placement.errors import ExchangeError

__all__ = ["exchange_equal", "exchange_rows", "naming_lost_ranks"]


@contextmanager
def naming_lost_ranks(what: str) -> Iterator[None]:
    """Turn what torch.distributed raises when a rank is lost into one clear line.

    Raises
    ------
    ExchangeError
        If the block fails so.
    """
    try:
        yield
    except RuntimeError as exc:
        if isinstance(exc, torch.OutOfMemoryError):
            raise
        reason = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise ExchangeError(
            f"{what} failed on rank {dist.get_rank()}: a rank is lost or did not answer in time ({reason}); "
            "start the job again"
        ) from exc


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row_N: torch.Tensor,
        sent_D: Sequence[int],
        received_D: Sequence[int],
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        ctx.sent_D, ctx.received_D, ctx.group = sent_D, received_D, group
        return _moved(row_N, sent_D, received_D, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _moved(gradients[0], ctx.received_D, ctx.sent_D, ctx.group), None, None, None


def exchange_rows(
    row_N: torch.Tensor, sent_D: Sequence[int], received_D: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Send rows to the ranks of a group, and return what came from them in rank order.

    Parameters
    ----------
    row_N
        Rows in the order of the ranks they go to, ``[N, ...]``.
    sent_D, received_D
        Rows to and from each rank.
    """
    if not (row_N.requires_grad and torch.is_grad_enabled()):
        return _moved(row_N, sent_D, received_D, group)
    moved: torch.Tensor = _ExchangeRows.apply(row_N, sent_D, received_D, group)  # type: ignore[no-untyped-call]
    return moved


def exchange_equal(message_D: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send one row to each rank, ``[ranks, ...]``; return the rows that came."""
    received_D = torch.empty_like(message_D)
    with naming_lost_ranks("an exchange of counts"):
        dist.all_to_all_single(received_D, message_D, group=group)
    return received_D


def _moved(
    row_N: torch.Tensor, sent_D: Sequence[int], received_D: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    row_R = row_N.new_empty(sum(received_D), *row_N.shape[1:])
    with naming_lost_ranks("an exchange of tokens"):
        dist.all_to_all_single(row_R, row_N.contiguous(), list(received_D), list(sent_D), group=group)
    return row_R
