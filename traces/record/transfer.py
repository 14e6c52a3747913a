"""How bytes leave a device without anybody waiting: a side stream into pinned memory, told done by events.

On the CPU a copy is done when it returns; everything above this seam is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

__all__ = ["CudaTransfer", "HostTransfer", "Marker", "Transfer", "is_capturing", "transfer_from"]


_cuda: Any = torch.cuda  # its streams and events carry no types in all versions


class Marker(Protocol):
    """The end of some copies; a `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether they are done."""
        ...

    def synchronize(self) -> None:
        """Wait until they are."""
        ...


class Transfer(Protocol):
    """Copies tensors into host memory of its own kind."""

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Host memory to copy to, ``uint8 [num_bytes]``."""
        ...

    def start(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> Marker:
        """Copy each source to its target, after the work queued so far and beside the work queued later.

        The sources must not be written to until then; they may be let go.
        """
        ...


class CudaTransfer:
    """Copies on a stream of its own, which the device's compute does not wait for.

    Parameters
    ----------
    device
        CUDA device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device)

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Pinned memory, which the device writes to by itself."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> Marker:
        """See `Transfer.start`."""
        # What sits on another of several devices comes over first, in the order of both compute streams.
        near = [source.to(self._device) if source.is_cuda else source for source in sources]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Its waiter sleeps, not spins: it may be a thread beside the one that feeds the device.
        done: Marker = _cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            for source, target in zip(near, targets, strict=True):
                target.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)
            self._stream.record_event(done)
        return done


class HostTransfer:
    """Copies at once."""

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Plain memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> Marker:
        """See `Transfer.start`."""
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return _Done()


class _Done:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def transfer_from(device: torch.device) -> Transfer:
    """Return the way off a device."""
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer()


def is_capturing() -> bool:
    """Whether what runs now is being captured as a CUDA graph instead of being run."""
    return bool(_cuda.is_initialized() and _cuda.is_current_stream_capturing())
