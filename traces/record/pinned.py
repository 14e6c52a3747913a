"""A ring of host memory that tensors land in while the device computes on.

Who puts tensors in gets a `Landing`; who reads them waits for it and gives the room back, from any thread.
Room is given back in the order in which it was taken.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch

from placement.errors import InputError
from traces.record.transfer import Marker, Transfer

__all__ = ["RING_BYTES", "Landing", "PinnedRing"]

RING_BYTES = 64 << 20
"""Room of a ring of token-level passes, in bytes."""

_ALIGN_BYTES = 64


class Landing:
    """Tensors on their way to the host.

    Parameters
    ----------
    tensors
        Host tensors, shaped as what was put in; they hold it once `wait` has returned, until `release`.
    marker
        The end of the copies.
    start, end
        Bytes of the ring that it takes.
    ring
        Where it landed.
    """

    def __init__(
        self, tensors: tuple[torch.Tensor, ...], marker: Marker, *, start: int, end: int, ring: PinnedRing
    ) -> None:
        self.tensors, self.start, self.end = tensors, start, end
        self.released = False
        self._marker, self._ring = marker, ring

    def is_there(self) -> bool:
        """Whether the copies are done; asking waits for nothing."""
        return self._marker.query()

    def wait(self) -> None:
        """Wait for the copies."""
        self._marker.synchronize()

    def release(self) -> None:
        """Give the room back; `tensors` mean nothing from here on. Again does nothing."""
        self.released = True
        self._ring.trim()


class PinnedRing:
    """Host memory of a fixed size, used round and round.

    It is allocated when first needed. Tensors that do not fit into an empty ring make it grow, to twice
    what they take; what is in the old memory stays valid.

    Parameters
    ----------
    transfer
        How tensors get there.
    capacity_bytes
        Size.

    Raises
    ------
    InputError
        If the size is not positive.
    """

    def __init__(self, transfer: Transfer, *, capacity_bytes: int = RING_BYTES) -> None:
        if capacity_bytes < 1:
            raise InputError(f"a ring of {capacity_bytes} bytes holds nothing; give it at least 1")
        self._transfer = transfer
        self._capacity = capacity_bytes
        self._memory: torch.Tensor | None = None
        self._landings: deque[Landing] = deque()
        self._lock = threading.Lock()

    @property
    def capacity_bytes(self) -> int:
        """Size."""
        return self._capacity

    @staticmethod
    def taken_bytes(sizes: Sequence[int]) -> int:
        """Room that tensors of these many bytes take together."""
        return max(sum(map(_aligned, sizes)), _ALIGN_BYTES)

    def put(self, tensors: Sequence[torch.Tensor]) -> Landing | None:
        """Start copying tensors in; `None`, and nothing done, while there is no room for them."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        num_bytes = self.taken_bytes(sizes)
        # A ring made or used first within inference mode must serve outside of it too.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if num_bytes > self._capacity:
                self._capacity, self._memory = 2 * num_bytes, None
                self._landings.clear()
            start = self._room_for(num_bytes)
            if start is None:
                return None
            if self._memory is None:
                self._memory = self._transfer.memory(self._capacity)
            targets = _views(self._memory, start, sizes, tensors)
            marker = self._transfer.start(tensors, targets)
            landing = Landing(targets, marker, start=start, end=start + num_bytes, ring=self)
            self._landings.append(landing)
        return landing

    def trim(self) -> None:
        """Take back what was released, oldest first."""
        with self._lock:
            while self._landings and self._landings[0].released:
                self._landings.popleft()

    def _room_for(self, num_bytes: int) -> int | None:
        """Where so many bytes in a row are free."""
        if not self._landings:
            return 0
        head, tail = self._landings[0].start, self._landings[-1].end
        if self._landings[-1].start < head:  # the newest lies before the oldest: free is what is between
            return tail if tail + num_bytes <= head else None
        if tail + num_bytes <= self._capacity:
            return tail
        return 0 if num_bytes <= head else None


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _views(
    memory: torch.Tensor, start: int, sizes: Sequence[int], tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Pieces of the memory, shaped like the tensors."""
    views = []
    for size, tensor in zip(sizes, tensors, strict=True):
        views.append(memory[start : start + size].view(tensor.dtype).view(tensor.shape))
        start += _aligned(size)
    return tuple(views)
