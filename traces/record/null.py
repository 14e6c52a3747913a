"""The recorder that is off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy.typing as npt
import torch

__all__ = ["NullRecorder"]


class NullRecorder:
    """A recorder that is off: it touches neither the model nor the disk."""

    num_tokens = 0
    num_dropped = 0
    num_sequences = 0
    error = None

    @contextmanager
    def batch(
        self,
        *,
        sequence_ids: npt.ArrayLike | None = None,
        positions: npt.ArrayLike | None = None,
        domains: npt.ArrayLike | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Iterator[None]:
        """Do nothing."""
        yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do nothing."""
        yield

    def pause(self) -> None:
        """Do nothing."""

    def resume(self) -> None:
        """Do nothing."""

    def step(self) -> None:
        """Do nothing."""

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing."""

    def stop_on_signals(self, *numbers: int) -> Self:
        """Do nothing: signals take their usual course."""
        return self

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        """Return the recorder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing."""
