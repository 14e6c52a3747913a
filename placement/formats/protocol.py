"""What a placement format is, and what its functions are told and tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from placement.formats.layers import ModelLayers
from placement.plan import Placement

__all__ = ["FormatOptions", "PlacementFormat", "Usage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatOptions:
    """What a file may not say itself.

    Parameters
    ----------
    layers
        The model's layers, for engines that count other layers than the MoE layers.
    num_devices
        Devices that share the slots, for files that list slots alone; a file that knows it pays no heed.
    """

    layers: ModelLayers | None = None
    num_devices: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How an engine is told to load a file.

    Parameters
    ----------
    arguments
        Words of the engine's command line.
    settings
        Configuration entries by their path.
    notes
        What else to know: what was added, what the engine does not check.
    """

    arguments: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


class PlacementFormat(Protocol):
    """One engine's placement file; a module with these functions and `SUFFIXES` is one.

    A document is what the file's JSON or YAML parses to.
    """

    SUFFIXES: tuple[str, ...]
    """Endings that the engine insists on; empty where any name will do."""

    def check(self, placement: Placement, options: FormatOptions) -> None:
        """Verify that the engine can load the placement.

        Raises
        ------
        InputError
            If it cannot, with the numbers and what to do.
        """
        ...

    def encode(self, placement: Placement, options: FormatOptions) -> str:
        """Return the text of the file; checks first."""
        ...

    def recognise(self, document: object) -> bool:
        """Tell whether a document is of this format, complete or not; looks at little."""
        ...

    def decode(self, document: object, options: FormatOptions) -> Placement:
        """Read a document back.

        Raises
        ------
        InputError
            If it breaks the engine's own rules, or lacks what only `options` can tell.
        """
        ...

    def usage(self, placement: Placement, options: FormatOptions, path: Path) -> Usage:
        """Say how the engine is told to load the file."""
        ...
