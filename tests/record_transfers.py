"""A stand-in for a busy device: copies that end when they are told to, or waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from traces.record.transfer import HostTransfer

__all__ = ["SlowTransfer"]


class SlowTransfer(HostTransfer):
    """Copies nothing before it is told to; `waits` counts who had to wait."""

    def __init__(self) -> None:
        self.under_way: list[_Copy] = []
        self.waits = 0

    def start(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> _Copy:
        """Remember what to copy, and scribble where it will go."""
        for target in targets:
            target.fill_(1)
        copy = _Copy(self, sources, targets)
        self.under_way.append(copy)
        return copy

    def finish(self) -> None:
        """Let every copy end."""
        while self.under_way:
            self.under_way[0].end()


class _Copy:
    def __init__(
        self, owner: SlowTransfer, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> None:
        self._owner, self._sources, self._targets = owner, sources, targets

    def end(self) -> None:
        if self in self._owner.under_way:
            for source, target in zip(self._sources, self._targets, strict=True):
                target.copy_(source)
            self._owner.under_way.remove(self)

    def query(self) -> bool:
        return self not in self._owner.under_way

    def synchronize(self) -> None:
        self._owner.waits += not self.query()
        self.end()
