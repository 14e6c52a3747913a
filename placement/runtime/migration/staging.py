"""Memory in which experts wait for the switch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Staging"]


class Staging:
    """A buffer that grows to the largest need and is used again.

    Parameters
    ----------
    device
        Where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._content = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._content.numel()

    def take(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Return pieces of these sizes in bytes; they take the place of those that were taken before."""
        if sum(sizes) > self._content.numel():
            # The old content goes first: both at once would be more than was promised.
            self._content = torch.empty(0, dtype=torch.uint8, device=self._device)
            self._content = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        pieces, start = [], 0
        for size in sizes:
            pieces.append(self._content[start : start + size])
            start += size
        return pieces

    def free(self) -> None:
        """Give the memory back."""
        self._content = torch.empty(0, dtype=torch.uint8, device=self._device)
