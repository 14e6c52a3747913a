"""What the hook works with: where placements come from, who counts, and what a placement is applied to.

Shape letters: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from placement.plan import Placement

__all__ = ["Change", "Counter", "Found", "PlacementSource", "Target", "Window"]

IntArray = npt.NDArray[np.int64]


class Found(Protocol):
    """A placement, and its number in the history of its deployment."""

    @property
    def placement(self) -> Placement:
        """The placement."""
        ...

    @property
    def version(self) -> int | None:
        """Its number; None where nobody gave one."""
        ...


class PlacementSource(Protocol):
    """Where placements come from and windows go to; `service.client.PlacementClient` is one.

    No method waits for a network.
    """

    def poll(self) -> Found | None:
        """Return a placement that is newer than the last one; asked on rank 0 alone."""
        ...

    def post(self, window: int, load_LE: Any, tokens: float | None, *, version: int | None) -> None:
        """Take a window that this rank counted."""
        ...

    def close(self) -> None:
        """End."""
        ...


class Window(Protocol):
    """What one rank counted in some steps."""

    @property
    def window(self) -> int:
        """Its number, from 0; the same on all ranks."""
        ...

    @property
    def load_LE(self) -> IntArray:
        """Token-expert pairs of logical experts."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens that were routed."""
        ...


class Counter(Protocol):
    """Counts windows; `traces.record.LoadCounter` is one.

    All ranks step together, so that windows of the same number are of the same steps.
    """

    def step(self) -> None:
        """Note the end of a step."""
        ...

    def windows(self) -> Iterable[Window]:
        """Return the windows that are finished, each once; does not wait."""
        ...

    def close(self) -> None:
        """Count no more, and finish the last window."""
        ...


class Change(Protocol):
    """A change of placement under way; every rank advances it once a step."""

    @property
    def done(self) -> bool:
        """Whether the new placement runs, on all ranks from the same step on."""
        ...

    @property
    def failed(self) -> bool:
        """Whether it was given up, and the old placement runs on."""
        ...

    @property
    def failure(self) -> str:
        """Why it was given up."""
        ...

    def advance(self) -> None:
        """Go on with it, between two steps.

        Raises
        ------
        PlacementError
            If the ranks cannot agree any more; it has failed then.
        """
        ...


class Target(Protocol):
    """A model whose placement can be changed while it runs."""

    @property
    def placement(self) -> Placement:
        """What runs."""
        ...

    def check(self, placement: Placement) -> None:
        """Check that a placement can take the place of the one that runs.

        Raises
        ------
        InputError
            If it cannot.
        """
        ...

    def start(self, placement: Placement, *, version: int | None) -> Change:
        """Begin to change over; called on all ranks after the same step.

        Raises
        ------
        PlacementError
            If it cannot be begun; what runs goes on.
        """
        ...

    def close(self) -> None:
        """Leave the model as it is."""
        ...
