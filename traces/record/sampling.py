"""Which of the tokens that ran are recorded: whole sequences, every n-th token, every n-th step.

Shape letter: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["Sampling", "kept_sequences"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What to record of everything that runs; by default all of it.

    Parameters
    ----------
    every_tokens
        One token in so many, all its layers, counted over the tokens that are recorded otherwise.
    sequences
        Share of the sequences, over 0 and at most 1: a sequence is recorded whole or not at all, decided by
        a hash of rank and sequence number, so that a repeated run chooses the same.
    every_steps
        One step in so many, the first included.

    Raises
    ------
    InputError
        If a number is out of range.
    """

    every_tokens: int = 1
    sequences: float = 1.0
    every_steps: int = 1

    def __post_init__(self) -> None:
        if self.every_tokens < 1 or self.every_steps < 1:
            raise InputError(
                f"sample_every {self.every_tokens} and every_steps {self.every_steps} must be at least 1"
            )
        if not 0 < self.sequences <= 1:
            raise InputError(f"sample_sequences {self.sequences} is no share over 0 and up to 1")


def kept_sequences(sequence_T: IntArray, share: float, *, rank: int) -> npt.NDArray[np.bool_]:
    """Tell which tokens belong to sequences that are recorded, ``[tokens]``.

    Parameters
    ----------
    sequence_T
        Sequence of each token.
    share
        Share of the sequences to record.
    rank
        Process rank, whose sequences are numbered on their own.
    """
    if share >= 1:
        return np.ones(sequence_T.shape, dtype=bool)
    own = _mixed(np.array([rank], dtype=np.uint64))
    kept: npt.NDArray[np.bool_] = _mixed(sequence_T.astype(np.uint64) ^ own) < np.uint64(int(share * 2**64))
    return kept


def _mixed(values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Scatter numbers evenly over 64 bits (the finaliser of SplitMix64)."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
