"""Reads responses of SGLang servers that return routed experts, as JSON, a JSON array or JSON Lines.

``meta_info["routed_experts"]`` (in OpenAI-style responses also ``sglext``) is base64 of bare 32-bit logical
ids, ``[tokens - 1 - start, all decoder layers, k]``: the last token generated was not routed, and those
before `start` were not asked for. Layers and k are not said: the model tells them. One answer is one
sequence, its home the data-parallel rank where the server names it; answers come in the order of the file.
Shape letters: T tokens, L layers, K top-k.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import reading
from traces.importers.json_file import json_head
from traces.importers.records import PieceReader, PieceSource, TokenFields
from traces.importers.responses import Answer, AnswerPlace, AnswerTable, read_answers, walk_answers
from traces.importers.routed_values import NPY_IN_BASE64, raw_ids, raw_size
from traces.importers.shapes import choose_layers, likely_model, named_model, tell
from traces.source import TraceHeader, TraceSource

if TYPE_CHECKING:
    from placement.model_shape import ModelShape
    from traces.readers import ReadOptions

__all__ = ["HEAD_BYTES", "open", "routed_value", "sniff"]

HEAD_BYTES = 1 << 22
"""Texts and token ids come before the experts in a response, so a sniff looks far."""

_VALUE = re.compile(rb'"(?:prompt_)?routed_experts"\s*:\s*(?:null|(")(.{0,8})|(\[)|(\{))', re.DOTALL)


def routed_value(path: Path) -> str | None:
    """Tell how the first routed experts of a JSON file travel: ``"raw"``, ``"npy"`` or ``"lists"``."""
    for found in _VALUE.finditer(json_head(path, HEAD_BYTES)):
        if found.group(1):
            return "npy" if found.group(2).decode("latin-1").startswith(NPY_IN_BASE64) else "raw"
        if found.group(3) or found.group(4):
            return "lists"
    return None


def sniff(path: Path) -> bool:
    """Tell whether a JSON file holds routed experts as bare ids."""
    return routed_value(path) == "raw"


def open(path: Path, options: ReadOptions) -> TraceSource:
    """Open a file of responses; every response is looked at once, few are kept in memory.

    Raises
    ------
    InputError
        If a response is damaged, ids are not a whole number of tokens of the model, or no model is named and
        none is known by their number.
    """
    with reading(path):
        survey = _Survey(options.model)
        for place, answer in walk_answers(path):
            survey.add(place, answer)
        return survey.source(path, options.domain)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """How the ids of a token lie: layers times k."""

    num_layers: int
    model: ModelShape

    @property
    def ids_per_token(self) -> int:
        return self.num_layers * self.model.top_k


class _Survey:
    """Goes through the answers once: counts their tokens, learns how ids lie."""

    def __init__(self, model: ModelShape | None) -> None:
        self._model = model
        self._layout: _Layout | None = None
        self._table = AnswerTable()
        self._tokens = array("q")

    def add(self, place: AnswerPlace, answer: Answer) -> None:
        """Take in one answer."""
        try:
            if not isinstance(answer.value, str) or answer.value.startswith(NPY_IN_BASE64):
                raise InputError("routed_experts is no base64 of bare ids, as that of other answers is")
            size = raw_size(answer.value)
            if not size:
                return
            if self._layout is None:
                self._layout = self._learn(answer, size)
            self._tokens.append(_num_rows(size, answer, self._layout))
        except InputError as exc:
            raise InputError(f"record {place.record}: {exc}") from exc
        self._table.add(place, answer)

    def _learn(self, answer: Answer, size: int) -> _Layout:
        """Find out how many layers are listed, and of which model where none was named."""
        model = self._model or named_model(answer.model)
        if model is None:
            routed = (answer.num_tokens or 0) - 1
            if routed > 0 and size % routed == 0:
                least = int(raw_ids(answer.value).max()) + 1
                model = likely_model(ids_per_token=size // routed, least_experts=least)
            if model is None:
                raise InputError(
                    "does not say how many layers and experts there are; name the model with --model"
                )
            tell(f"assuming {model.name}, which routes each token to {size // routed} experts in all")
        for num_layers in (model.num_decoder_layers, model.num_layers):
            rows, rest = divmod(size, num_layers * model.top_k)
            if not rest and (answer.num_tokens is None or rows <= answer.num_tokens):
                return _Layout(num_layers=num_layers, model=model)
        raise InputError(
            f"routed_experts holds {size} ids, which is no number of tokens that select top-{model.top_k} in "
            f"each of {model.num_decoder_layers} layers of {model.name}; name the right model with --model"
        )

    def source(self, path: Path, domain: str | None) -> TraceSource:
        """Return the trace of the answers looked at."""
        layout = self._layout
        if layout is None:
            raise InputError(
                "holds no routed experts: start the server with --enable-return-routed-experts and ask with "
                "return_routed_experts"
            )
        choice = choose_layers(layout.num_layers, model=layout.model)
        header = TraceHeader(
            num_layers=len(choice.rows),
            num_experts=layout.model.num_experts,
            top_k=layout.model.top_k,
            model_name=layout.model.name,
            moe_layer_ids=choice.moe_layer_ids,
            domain_names=() if domain is None else (domain,),
        )
        return PieceSource(
            path=path,
            header=header,
            tokens_N=self._tokens,
            open_pieces=self._reader(path, layout, list(choice.rows)),
            name_piece=lambda piece: f"record {self._table.place(piece).record}",
            advice="are the layers those of the model that is named?",
        )

    def _reader(self, path: Path, layout: _Layout, rows: list[int]) -> Callable[[], PieceReader]:
        sequences, starts = self._table.sequences(), self._starts()
        ranks = self._table.column("rank")

        def read(piece: int) -> TokenFields:
            place = self._table.place(piece)
            ids = raw_ids(read_answers(path, place)[place.place].value)
            experts_TLK = ids.reshape(-1, layout.num_layers, layout.model.top_k)[:, rows]
            num_tokens = len(experts_TLK)
            return TokenFields(
                experts_TLK=experts_TLK,
                sequence_T=np.full(num_tokens, sequences[piece]),
                position_T=None if starts is None else starts[piece] + np.arange(num_tokens),
                rank_T=None if ranks is None else np.full(num_tokens, ranks[piece]),
            )

        return lambda: read

    def _starts(self) -> npt.NDArray[np.int64] | None:
        """Return the position of each answer's first token, or `None` where one does not tell."""
        lengths = self._table.column("num_tokens")
        return None if lengths is None else np.maximum(lengths - 1 - np.array(self._tokens), 0)


def _num_rows(size: int, answer: Answer, layout: _Layout) -> int:
    rows, rest = divmod(size, layout.ids_per_token)
    if rest or (answer.num_tokens is not None and rows > answer.num_tokens):
        said = "" if answer.num_tokens is None else f" of {answer.num_tokens} tokens"
        raise InputError(
            f"routed_experts holds {size} ids{said}, {layout.ids_per_token} belong to a token of "
            f"{layout.model.name}; keep responses of different models apart"
        )
    return rows
