"""Memory that is used again and again: fresh pages would cost more than what is put into them."""

from __future__ import annotations

import numpy as np

__all__ = ["Scratch"]


class Scratch:
    """Room for bytes on their way from or to a file, for one thread."""

    def __init__(self) -> None:
        self._room = memoryview(bytearray())

    def take(self, size: int) -> memoryview:
        """Return room for `size` bytes; what was taken before may be overwritten."""
        if len(self._room) < size:
            self._room = np.empty(size, dtype=np.uint8).data
        return self._room[:size]
