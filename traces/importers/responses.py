"""Finds the routed experts in responses of inference servers, native and OpenAI-style.

A response may be one answer or several choices; the ids lie at the top (``sglext``,
``prompt_routed_experts``), in ``meta_info``, or in a choice. One choice is one sequence.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.importers.json_file import JsonRecord, json_records, read_record

__all__ = ["Answer", "AnswerPlace", "AnswerTable", "answers", "read_answers", "walk_answers"]

_KEY = "routed_experts"
_PROMPT_KEY = "prompt_routed_experts"
_EXTENSIONS = ("meta_info", "sglext", "nvext")
_LIMIT_TOKENS = 1 << 31
_UNKNOWN = -1
_PLACE = ("record", "start", "num_bytes", "place")
_NUMBERS = ("num_tokens", "rank", "choice", "is_prompt")

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The expert ids of one sequence, or of its prompt.

    Parameters
    ----------
    value
        The ids as they travel.
    num_tokens
        Tokens of the sequence, prompt and completion; `None` where the response does not say.
    rank
        Data-parallel rank that served it; `None` where unknown.
    choice
        Which choice of the response it is.
    is_prompt
        Whether it is the prompt's alone, of which the choices are the rest.
    model
        Name of the model, as the server has it; `None` where the response does not say.
    """

    value: Any
    num_tokens: int | None
    rank: int | None
    choice: int
    is_prompt: bool = False
    model: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerPlace:
    """Where an answer lies in a file, to be read again."""

    record: int
    start: int
    num_bytes: int
    place: int


def answers(response: Any) -> list[Answer]:
    """Return what a response says of experts; nothing where it says nothing, as for aborted requests.

    Raises
    ------
    InputError
        If it is no response.
    """
    if not isinstance(response, Mapping):
        raise InputError(f"is {type(response).__name__}, not a response")
    if isinstance(response.get("response"), Mapping):
        # Proxies keep the request beside its response.
        response = response["response"]
    choices = response.get("choices")
    choices = (
        [choice for choice in choices if isinstance(choice, Mapping)] if isinstance(choices, list) else []
    )
    name = response.get("model")
    model = name if isinstance(name, str) else None
    prompt, own = response.get(_PROMPT_KEY), _value(response)
    found = []
    if prompt is not None:
        found.append(Answer(value=prompt, num_tokens=None, rank=None, choice=0, is_prompt=True, model=model))
    holders = [(0, response)] if own is not None else list(enumerate(choices))
    for number, holder in holders:
        value = _value(holder)
        if value is None:
            continue
        answer = Answer(
            value=value,
            num_tokens=_num_tokens(holder, 1) or _num_tokens(response, len(choices)),
            rank=_rank(holder),
            choice=number,
            model=model,
        )
        found.append(answer)
    return found


def walk_answers(path: Path) -> Iterator[tuple[AnswerPlace, Answer]]:
    """Yield the answers of a file of responses, one response in memory at a time.

    Raises
    ------
    InputError
        If a record is damaged or no response; the message names its number.
    """
    for record in json_records(path):
        for place, answer in enumerate(_answers_of(record)):
            yield AnswerPlace(record.number, record.start, record.num_bytes, place), answer


def read_answers(path: Path, place: AnswerPlace) -> Sequence[Answer]:
    """Return the answers of a response whose place is known."""
    return answers(read_record(path, place.start, place.num_bytes))


class AnswerTable:
    """What is kept of answers that were looked at: their places and numbers, not their ids.

    Columns of integers, for there may be millions of answers.
    """

    def __init__(self) -> None:
        self._columns = {name: array("q") for name in (*_PLACE, *_NUMBERS)}

    def __len__(self) -> int:
        return len(self._columns["record"])

    def add(self, place: AnswerPlace, answer: Answer) -> None:
        """Take in one answer."""
        for name in _PLACE:
            self._columns[name].append(getattr(place, name))
        for name in _NUMBERS:
            value = getattr(answer, name)
            self._columns[name].append(_UNKNOWN if value is None else int(value))

    def place(self, number: int) -> AnswerPlace:
        """Return where an answer lies."""
        return AnswerPlace(*(self._columns[name][number] for name in _PLACE))

    def is_prompt(self, number: int) -> bool:
        """Tell whether an answer is the ids of a prompt alone."""
        return bool(self._columns["is_prompt"][number])

    def column(self, name: str) -> IntArray | None:
        """Return a number of every answer, or `None` where one is not known."""
        values = np.array(self._columns[name], dtype=np.int64)
        return None if (values == _UNKNOWN).any() else values

    def sequences(self) -> IntArray:
        """Return the sequence of each answer: one per choice; a prompt is of its response's first."""
        record, choice = (np.array(self._columns[name], dtype=np.int64) for name in ("record", "choice"))
        begins = (np.diff(record, prepend=-1) != 0) | (np.diff(choice, prepend=-1) != 0)
        return np.cumsum(begins) - 1


def _answers_of(record: JsonRecord) -> list[Answer]:
    try:
        return answers(record.value)
    except InputError as exc:
        raise InputError(f"record {record.number} {exc}") from exc


def _value(holder: Mapping[str, Any]) -> Any:
    """Return the ids of an answer, wherever servers put them."""
    for key in _EXTENSIONS:
        extension = holder.get(key)
        if isinstance(extension, Mapping) and extension.get(_KEY) is not None:
            return extension[_KEY]
    return holder.get(_KEY)


def _num_tokens(holder: Mapping[str, Any], num_choices: int) -> int | None:
    """Return the tokens of prompt and completion; a usage over several choices does not tell them apart."""
    for key in ("meta_info", "usage"):
        counts = holder.get(key)
        if not isinstance(counts, Mapping) or (key == "usage" and num_choices > 1):
            continue
        parts = [counts.get("prompt_tokens"), counts.get("completion_tokens")]
        if all(type(part) is int and 0 <= part < _LIMIT_TOKENS for part in parts):
            return int(sum(part for part in parts if part is not None))
    return None


def _rank(holder: Mapping[str, Any]) -> int | None:
    about = holder.get("meta_info")
    rank = about.get("dp_rank") if isinstance(about, Mapping) else None
    return rank if type(rank) is int and 0 <= rank < _LIMIT_TOKENS else None
