"""A 64-bit sum over a message's bytes in which every place has a weight of its own.

Computed on the device, without synchronisation and without copies of the data. Bytes are read as 64-bit
words in lines of `LINE`; the word in line b at place j counts ``line_weight[b] + place_weight[j]`` times,
all modulo 2**64, so that two plain sums of the words, along lines and along places, are enough. Weights are
even for lines and odd for places: a flipped bit always changes the sum; blocks that change places change it
but for accidents (about one in 2**60).
"""

from __future__ import annotations

import torch

__all__ = ["LINE", "RowChecksum"]

LINE = 1024
"""Words in a line."""

_WORD_BYTES = 8
_MULTIPLIERS = (-7046029254386353131, -4658895280553007687)
"""Odd numbers whose bits look random (of the SplitMix64 generator), as signed 64-bit integers."""


class RowChecksum:
    """Computes checksums on one device.

    Parameters
    ----------
    device
        Where the bytes are.
    """

    def __init__(self, device: torch.device) -> None:
        # Of the places, then of the lines.
        self._weight = 2 * _hashed(torch.arange(LINE, dtype=torch.int64, device=device)) + 1

    def prepare(self, num_bytes: int) -> None:
        """Make weights for so many bytes now, not while something is computed with the old ones."""
        lines = -(-num_bytes // (LINE * _WORD_BYTES))
        if LINE + lines > self._weight.numel():
            line = torch.arange(LINE, LINE + lines, dtype=torch.int64, device=self._weight.device)
            self._weight = torch.cat([self._weight[:LINE], 2 * _hashed(line)])

    def of(self, words: torch.Tensor) -> torch.Tensor:
        """Return the checksum of 64-bit words, whole lines of them: one number, int64."""
        words = words.view(-1, LINE)
        lines = words.shape[0]
        self.prepare(lines * LINE * _WORD_BYTES)
        sums = words.new_empty(LINE + lines)
        torch.sum(words, 0, out=sums[:LINE])
        torch.sum(words, 1, out=sums[LINE:])
        return sums.mul_(self._weight[: LINE + lines]).sum()


def _hashed(index: torch.Tensor) -> torch.Tensor:
    """Numbers that look random, one for each index (wrapping modulo 2**64)."""
    mixed = (index + 1) * _MULTIPLIERS[0]
    mixed = (mixed ^ (mixed >> 30)) * _MULTIPLIERS[1]
    return mixed ^ (mixed >> 27)
