"""Compiled reading of expert ids written as text: what JSON takes most of its time for.

Shape letters: T tokens, K top-k.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy.typing as npt

__all__ = ["parse_ids"]

Array = npt.NDArray[Any]

_OPEN, _CLOSE, _COMMA, _ZERO, _NINE = 91, 93, 44, 48, 57
_MOST = 1 << 30


@nb.njit(cache=True, inline="always")
def _past_space(text: Array, place: int) -> int:
    while place < text.size and (text[place] == 32 or 9 <= text[place] <= 13):
        place += 1
    return place


@nb.njit(cache=True)
def parse_ids(text: Array, out_TK: Array) -> int:
    """Read ``[[3, 1], [0, 2], ...]``: lists of as many plain numbers as `out_TK` has columns.

    Parameters
    ----------
    text
        Bytes, beginning with the outer bracket.
    out_TK
        Numbers, overwritten; every row must be there, and no more.

    Returns
    -------
    int
        Place after the outer bracket's end; -1 if the text is anything else, which JSON may still make sense
        of.
    """
    place = _past_space(text, 0)
    if place >= text.size or text[place] != _OPEN:
        return -1
    for row in range(out_TK.shape[0]):
        place = _past_space(text, place + 1)
        if place >= text.size or text[place] != _OPEN:
            return -1
        for column in range(out_TK.shape[1]):
            place = _past_space(text, place + 1)
            first = place
            number = 0
            while place < text.size and _ZERO <= text[place] <= _NINE and number < _MOST:
                number = 10 * number + (text[place] - _ZERO)
                place += 1
            # Nothing, or a leading zero, is no number of JSON's.
            if place == first or (text[first] == _ZERO and place > first + 1):
                return -1
            out_TK[row, column] = number
            place = _past_space(text, place)
            end = _CLOSE if column == out_TK.shape[1] - 1 else _COMMA
            if place >= text.size or text[place] != end:
                return -1
        place = _past_space(text, place + 1)
        end = _CLOSE if row == out_TK.shape[0] - 1 else _COMMA
        if place >= text.size or text[place] != end:
            return -1
    return place + 1 if out_TK.shape[0] else -1
