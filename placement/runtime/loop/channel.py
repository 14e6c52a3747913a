"""From rank 0 to all ranks without anybody waiting: each broadcast has until the next beat to arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from placement.errors import BackendError

__all__ = ["TIMEOUT_S", "Channel", "broadcaster"]

TIMEOUT_S = 1800.0
"""Rank 0 may be late by as much as a checkpoint takes to write."""

CLOSE_S = 5.0


class Channel:
    """Hands messages of rank 0 to all ranks at the same beat.

    A beat starts a broadcast in the background, over memory of the CPU, and the next beat takes what came:
    first the size of a message, which mostly is none at all, then its bytes.

    Parameters
    ----------
    group
        The ranks; default: all. Every one of them has to make its channel and to call `beat` equally often.
    timeout_s
        Seconds after which rank 0 counts as lost.
    """

    def __init__(self, *, group: dist.ProcessGroup | None = None, timeout_s: float = TIMEOUT_S) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if ready else 0
        self._group = _own_group(group, timeout_s) if ready else None
        self._offered = b""
        self._size: _Broadcast | None = None
        self._body: _Broadcast | None = None

    def share(self, number: int) -> int:
        """Return rank 0's number on every rank; waits for rank 0.

        Raises
        ------
        BackendError
            If rank 0 is lost.
        """
        return _Broadcast(torch.tensor([number]), self._group).number()

    def beat(self, offer: Callable[[], bytes | None]) -> bytes | None:
        """Return a message once it is there: on every rank at the same beat.

        Parameters
        ----------
        offer
            Asked on rank 0 for the next message, when the last one is through.

        Raises
        ------
        BackendError
            If rank 0 is lost. Nothing more comes through this channel then.
        """
        body, self._body = self._body, None
        if body is not None:
            # Nothing else is offered before this has been taken in.
            self._send(b"")
            return body.content()
        size = 0 if self._size is None else self._size.number()
        if size:
            self._size, self._body = None, _Broadcast(_memory(self._offered, size), self._group)
        else:
            self._send((offer() or b"") if self.rank == 0 else b"")
        return None

    def close(self) -> None:
        """Let go of what is under way."""
        for broadcast in (self._size, self._body):
            if broadcast is not None:
                broadcast.leave()
        self._size = self._body = None

    def _send(self, message: bytes) -> None:
        self._offered = message
        self._size = _Broadcast(torch.tensor([len(message)]), self._group)


class _Broadcast:
    """A tensor of rank 0 on its way into the same tensor of all others."""

    def __init__(self, memory: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        self._memory = memory
        self._work: Any = None
        if group is not None:
            with _translated():
                self._work = dist.broadcast(memory, group_src=0, group=group, async_op=True)

    def number(self) -> int:
        """Return the number that it is, once it is there."""
        self._wait()
        return int(self._memory[0])

    def content(self) -> bytes:
        """Return the bytes that it is, once they are there."""
        self._wait()
        return self._memory.numpy().tobytes()

    def leave(self) -> None:
        """Wait no longer than it takes where all ranks end together."""
        if self._work is not None:
            try:
                self._work.wait(timedelta(seconds=CLOSE_S))
            except RuntimeError:
                # Others ended earlier: nobody is left to talk to.
                self._work = None

    def _wait(self) -> None:
        if self._work is not None:
            with _translated():
                self._work.wait()


def broadcaster(group: dist.ProcessGroup | None = None) -> Callable[[bytes | None], bytes]:
    """Return what hands bytes of rank 0 to all ranks: ``client.fetch(broadcast=broadcaster())``."""

    def broadcast(payload: bytes | None) -> bytes:
        box = [payload]
        dist.broadcast_object_list(box, group_src=0, group=group)
        if box[0] is None:
            raise BackendError("rank 0 of the process group sent nothing; is it the launcher's rank 0?")
        return box[0]

    return broadcast


def _own_group(group: dist.ProcessGroup | None, timeout_s: float) -> dist.ProcessGroup | None:
    """Return a group over memory of the CPU, so that the accelerator's queue is never waited for."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if len(ranks) == 1:
        return None
    limit = timedelta(seconds=timeout_s)
    # Names of groups that their members make alone repeat once one was given up: only parts do that.
    alone = len(ranks) < dist.get_world_size()
    own: dist.ProcessGroup = dist.new_group(
        ranks, timeout=limit, backend="gloo", use_local_synchronization=alone
    )
    return own


def _memory(offered: bytes, size: int) -> torch.Tensor:
    """Return bytes as they are sent, or memory to receive as many."""
    return torch.frombuffer(bytearray(offered or bytes(size)), dtype=torch.uint8)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what torch.distributed raises into errors of ours.

    Raises
    ------
    BackendError
        If a rank is lost.
    """
    try:
        yield
    except RuntimeError as exc:
        raise BackendError(f"a rank is lost, or the network: {str(exc).splitlines()[0][:200]}") from exc
