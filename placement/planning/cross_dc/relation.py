"""Who gathers experts from whom and who exchanges tokens with whom: HybridEP's Algorithm 1.

Source: arXiv 2510.19470. Two devices talk at level l only if that is the one level where they differ: what
is bound for a device that differs at several levels goes level by level. At that level devices of one
domain gather each other's experts; devices with the same offset in different domains exchange tokens.

Shape letter: G devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from placement.planning.cross_dc.level import Level, location, num_devices

__all__ = ["MessageCount", "Relation", "message_counts", "relation", "relation_GG"]


class Relation(IntEnum):
    """What two devices have to do with each other."""

    NONE = 0
    GATHER = 1
    """They fetch each other's experts."""
    EXCHANGE = 2
    """They send each other tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageCount:
    """Messages of one level, per gather or per exchange, over all devices.

    Parameters
    ----------
    gather, exchange
        Ordered pairs of devices that fetch experts, and that send tokens.
    """

    gather: int
    exchange: int


def relation(first: int, second: int, *, levels: Sequence[Level], sizes: Sequence[int]) -> Relation:
    """Return what two devices have to do with each other, with domains of `sizes` per level."""
    places = zip(location(first, levels), location(second, levels), sizes, strict=True)
    differing = [(a, b, size) for a, b, size in places if a != b]
    if len(differing) != 1:
        return Relation.NONE
    a, b, size = differing[0]
    if a // size == b // size:
        return Relation.GATHER
    return Relation.EXCHANGE if a % size == b % size else Relation.NONE


def relation_GG(levels: Sequence[Level], sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the relation of every pair, ``[devices, devices]``; `Relation` values."""
    place_GL = np.array([location(device, levels) for device in range(num_devices(levels))])
    size_L = np.asarray(sizes)
    a, b = place_GL[:, None], place_GL[None, :]
    differs = a != b
    gathers = differs & (a // size_L == b // size_L)
    exchanges = differs & (a // size_L != b // size_L) & (a % size_L == b % size_L)
    alone = differs.sum(axis=2) == 1
    found = np.where(gathers.any(axis=2), Relation.GATHER, Relation.NONE)
    found = np.where(exchanges.any(axis=2), Relation.EXCHANGE, found)
    return np.where(alone, found, Relation.NONE).astype(np.int64)


def message_counts(levels: Sequence[Level], sizes: Sequence[int]) -> tuple[MessageCount, ...]:
    """Return the messages of every level: ``G (S - 1)`` gathers and ``G (SF / S - 1)`` exchanges.

    On one level these are the frequencies of the paper's table VII.
    """
    devices = num_devices(levels)
    return tuple(
        MessageCount(gather=devices * (size - 1), exchange=devices * (level.size // size - 1))
        for level, size in zip(levels, sizes, strict=True)
    )
