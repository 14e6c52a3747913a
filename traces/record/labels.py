"""What the caller says about the tokens of a batch: sequences, positions, domains.

Shape letters: B rows of a batch, N token places of a row (padding included).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["Labeller", "Labels", "given_labels", "no_labels"]

IntArray = npt.NDArray[np.int64]


@dataclass(kw_only=True, slots=True, eq=False)
class Labels:
    """What the caller said about the tokens of a batch, each ``[rows, places]`` or `None`."""

    sequence_BN: IntArray | None
    position_BN: IntArray | None
    domain_BN: IntArray | None


Labeller = Callable[[tuple[int, int]], Labels]
"""Fits what the caller said to the shape of a batch."""


def no_labels(shape: tuple[int, int]) -> Labels:
    """Nothing was said."""
    return Labels(sequence_BN=None, position_BN=None, domain_BN=None)


def given_labels(
    sequence_ids: npt.ArrayLike | None,
    positions: npt.ArrayLike | None,
    domains: npt.ArrayLike | None,
    shape: tuple[int, int],
) -> Labels:
    """Labels of a batch of this shape.

    Raises
    ------
    InputError
        If one has another shape, or holds no integers.
    """
    return Labels(
        sequence_BN=_fitted("sequence_ids", sequence_ids, shape),
        position_BN=_fitted("positions", positions, shape, per_row=False),
        domain_BN=_fitted("domains", domains, shape),
    )


def _fitted(
    name: str, values: npt.ArrayLike | None, shape: tuple[int, int], *, per_row: bool = True
) -> IntArray | None:
    """Labels as ``[rows, places]``, given so or, where that makes sense, one per row."""
    if values is None:
        return None
    given = np.asarray(values)
    if given.dtype.kind not in "iu":
        raise InputError(f"{name} holds {given.dtype} values, not integers")
    if per_row and given.shape == shape[:1]:
        given = given[:, None]
    elif given.shape != shape:
        raise InputError(f"{name} has shape {given.shape}, the batch {shape[0]} rows of {shape[1]} places")
    return np.broadcast_to(given.astype(np.int64), shape)
