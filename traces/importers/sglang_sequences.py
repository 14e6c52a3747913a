"""Finds out which tokens of SGLang's forward passes belong to one request; the dump does not say.

A prefill pass lists whole stretches of requests. A decode pass has one token per running request: the batch
keeps its order, requests that ended drop out, new ones come last, and each token's position is one past the
last. Where two requests of the same length stand side by side and one of them ends, nobody can tell which:
what goes on does so under a new number, so that tokens of one number are always of one request.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

__all__ = ["DECODE", "EXTEND", "SequenceFollower"]

EXTEND = 1
DECODE = 2
"""SGLang's ``ForwardMode`` values; others mix or draft tokens and cannot be followed."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Running:
    """A request under way: its number and the position of its next token."""

    number: int
    next_position: int


@dataclass(slots=True)
class SequenceFollower:
    """Numbers the requests of one rank, pass by pass.

    Parameters
    ----------
    known
        Whether every pass so far could be followed.
    """

    known: bool = True
    _running: list[_Running] = field(default_factory=list)
    _chunked: _Running | None = None
    _numbered: int = 0

    def copy(self) -> SequenceFollower:
        """Return a follower that goes on from here on its own."""
        return replace(self, _running=list(self._running))

    def follow(
        self, position_T: IntArray, *, mode: int, lengths: IntArray | None, valid_T: npt.NDArray[np.bool_]
    ) -> IntArray:
        """Return the request of each token of the next pass.

        Parameters
        ----------
        position_T
            Position of each token in its request.
        mode
            ``forward_mode`` of the pass.
        lengths
            ``extend_seq_lens`` of the pass: consecutive tokens of each request; None in decode passes.
        valid_T
            False for rows that are padding.

        Returns
        -------
        array
            Numbers of requests; those of padding are without meaning, and so are all once `known` is False.
        """
        numbers_T = np.zeros(len(position_T), dtype=np.int64)
        if not valid_T.any():
            return numbers_T
        if mode == DECODE:
            numbers_T[valid_T] = self._decode(position_T[valid_T].tolist())
        elif mode == EXTEND and lengths is not None and _are_stretches(position_T, lengths):
            starts = np.cumsum(lengths) - lengths
            stretches = zip(
                position_T[starts[lengths > 0]].tolist(), lengths[lengths > 0].tolist(), strict=True
            )
            numbers = self._extend(list(stretches))
            numbers_T[: int(lengths.sum())] = np.repeat(numbers, lengths[lengths > 0])
        else:
            self.known = False
        return numbers_T

    def _extend(self, stretches: list[tuple[int, int]]) -> list[int]:
        """Take in a prefill pass of stretches (first position, length)."""
        numbers: list[int] = []
        for place, (first, length) in enumerate(stretches):
            chunked = self._chunked
            # A prompt cut in chunks ends one pass and begins the next; only one prompt is cut at a time.
            if place == 0 and first > 0 and chunked is not None and chunked.next_position == first:
                self._running = [running for running in self._running if running.number != chunked.number]
                number = chunked.number
            else:
                number = self._new_number()
            numbers.append(number)
            self._running.append(_Running(number, first + length))
        self._chunked = self._running[-1]
        return numbers

    def _decode(self, positions: list[int]) -> list[int]:
        """Take in a decode pass: the running requests in order, less those that ended, then new ones."""
        earliest = _embed([running.next_position for running in self._running], positions)
        old = positions[: len(earliest)]
        backwards = _embed([running.next_position for running in reversed(self._running)], old[::-1])
        latest = [len(self._running) - 1 - place for place in reversed(backwards)]
        numbers = [
            self._running[place].number if place == last else self._new_number()
            for place, last in zip(earliest, latest, strict=True)
        ]
        numbers += [self._new_number() for _ in positions[len(old) :]]
        self._running = [_Running(*pair) for pair in zip(numbers, (p + 1 for p in positions), strict=True)]
        if self._chunked is not None and self._chunked.number in numbers:
            self._chunked = None
        return numbers

    def _new_number(self) -> int:
        self._numbered += 1
        return self._numbered - 1


def _are_stretches(position_T: IntArray, lengths: IntArray) -> bool:
    """Tell whether positions run on within each stretch; rows beyond the stretches are padding."""
    total = int(lengths.sum())
    if int(lengths.min(initial=0)) < 0 or total > len(position_T) or not total:
        return False
    starts = np.cumsum(lengths) - lengths
    inside = np.ones(total - 1, dtype=bool)
    inside[starts[(starts > 0) & (starts < total)] - 1] = False
    return bool((np.diff(position_T[:total])[inside] == 1).all())


def _embed(whole: list[int], part: list[int]) -> list[int]:
    """Return the earliest places of `part` in `whole`, in order, of as much of `part` as there is."""
    places: list[int] = []
    place = 0
    for wanted in part:
        while place < len(whole) and whole[place] != wanted:
            place += 1
        if place == len(whole):
            break
        places.append(place)
        place += 1
    return places
