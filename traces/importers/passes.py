"""Traces that engines dump forward pass by forward pass, each of them on several ranks at the same time.

Shape letters: P forward passes, R ranks, T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.model_shape import ModelShape
from traces.files import one_line
from traces.importers.records import PieceReader, PieceSource, TokenFields
from traces.source import TraceHeader

__all__ = ["PassLoader", "few", "model_layers", "naming", "pass_source", "stages"]

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

PassLoader = Callable[[int, int], Array]
"""Reads the expert ids of one pass on one rank (its column), ``[tokens, layers, k]``."""


def pass_source(
    path: Path, header: TraceHeader, tokens_PR: IntArray, ranks: Sequence[int], load: PassLoader
) -> PieceSource:
    """Return the trace of passes; one pass is in memory at a time.

    Within a pass the ranks' tokens are interleaved evenly, as `Trace.interleave_ranks` does: that is the
    order in which a cluster routed them.

    Parameters
    ----------
    path
        What messages name.
    header
        What all tokens have in common.
    tokens_PR
        Tokens of each pass on each rank, ``[passes, ranks]``.
    ranks
        The ranks' numbers.
    load
        Reads a pass.

    Raises
    ------
    InputError
        If there is no token.
    """
    rank_R = np.asarray(ranks, dtype=np.int64)

    def read(index: int) -> TokenFields:
        count_R = tokens_PR[index]
        ids_TLK = np.concatenate([load(index, column) for column in np.nonzero(count_R)[0].tolist()])
        least, most = int(ids_TLK.min()), int(ids_TLK.max())
        if least < 0 or most >= header.num_experts:
            raise InputError(
                f"pass {index} names expert {least if least < 0 else most}, outside "
                f"0..{header.num_experts - 1}; name the right model with --model"
            )
        place_T = _interleaved(count_R)
        return TokenFields(
            experts_TLK=np.ascontiguousarray(ids_TLK[place_T], dtype=header.dtype),
            rank_T=np.repeat(rank_R, count_R)[place_T],
        )

    def open_pieces() -> PieceReader:
        return read

    return PieceSource(
        path=path,
        header=header,
        tokens_N=tokens_PR.sum(axis=1),
        open_pieces=open_pieces,
        name_piece=lambda index: f"pass {index}",
    )


def _interleaved(count_R: IntArray) -> IntArray:
    """Places of tokens listed rank after rank, in the order in which the cluster met them."""
    place_T = np.arange(count_R.sum()) - np.repeat(np.cumsum(count_R) - count_R, count_R)
    return np.argsort((place_T + 0.5) / np.repeat(count_R, count_R), kind="stable")


@contextlib.contextmanager
def naming(path: Path, file: Path, *foreign: type[Exception]) -> Iterator[None]:
    """Name a file of the folder `path` in input errors raised inside, and turn foreign failures into one.

    Raises
    ------
    InputError
        Instead of what was raised inside.
    """
    name = "" if file == path else f"{file.name}: "
    try:
        yield
    except InputError as exc:
        raise InputError(f"{name}{exc}") from exc
    except foreign as exc:
        raise InputError(f"{name}is damaged or incomplete ({one_line(exc)}); restore it from a copy") from exc
    except OSError as exc:
        raise InputError(f"{name}cannot be read ({one_line(exc)}); check its permissions") from exc


def model_layers(found: Collection[int], model: ModelShape | None) -> tuple[int, ...]:
    """Return which of the decoder layers found in a dump are the model's MoE layers.

    Layers of multi-token prediction, which follow the decoder layers, are left out; without a model all are
    kept.

    Raises
    ------
    InputError
        If a layer of the model is missing or a dense one is there.
    """
    if model is None:
        return tuple(sorted(found))
    wanted = model.moe_layer_ids
    missing = sorted(set(wanted) - set(found))
    dense = sorted(layer for layer in set(found) - set(wanted) if layer < model.num_decoder_layers)
    if missing or dense:
        what = f"lacks layer {few(missing)}" if missing else f"routes in dense layer {few(dense)}"
        raise InputError(
            f"{what} of {model.name}: it has layers {few(sorted(found))}, the model routes in "
            f"{few(wanted)}; name the right model with --model"
        )
    return wanted


def stages(layers_of_rank: Sequence[Collection[int]]) -> list[list[int]]:
    """Group ranks by the layers they ran: ranks of one pipeline stage have the same, of two stages no common.

    Returns
    -------
    list of list of int
        Positions of the ranks, by stage, in the order of the layers.

    Raises
    ------
    InputError
        If two ranks' layers overlap and differ.
    """
    groups: dict[frozenset[int], list[int]] = {}
    for position, layers in enumerate(layers_of_rank):
        groups.setdefault(frozenset(layers), []).append(position)
    ordered = sorted(groups.items(), key=lambda item: min(item[0]))
    taken: dict[int, int] = {}
    for layers, members in ordered:
        common = sorted(layer for layer in layers if layer in taken)
        if common:
            raise InputError(
                f"ranks {taken[common[0]]} and {members[0]} both ran layer {common[0]}, but not otherwise "
                "the same layers; a file is incomplete"
            )
        taken |= dict.fromkeys(layers, members[0])
    return [members for _, members in ordered]


def few(numbers: Collection[int]) -> str:
    """Return some numbers as text: ascending runs as ranges, at most four of them."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")
