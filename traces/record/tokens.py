"""Makes a named pass of what the hooks collect: its ids in as few bytes as they need, its rows numbered.

Shape letters: B rows of a batch, N token places of a row (padding included), P places of all rows,
L MoE layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from placement.errors import InputError
from placement.runtime.families.protocol import ModelFamily, MoELayer
from traces.record.hooks import stacked_ids
from traces.record.labels import Labeller, no_labels
from traces.record.numbering import Numbering
from traces.record.passes import ForwardPass, begun_pass, cache_in, shape_of_tokens
from traces.record.transfer import is_capturing

__all__ = ["TokenPasses"]


class TokenPasses:
    """Begins and ends token-level passes; what `RouterHooks` calls.

    Parameters
    ----------
    family, layers
        How the routers are read, and the MoE layers.
    numbering
        Knows which sequences the rows of a pass continue.
    due
        Asked when a pass begins: whether it is recorded.
    take
        Given a pass that ended, with its ids, and its number of places.
    """

    def __init__(
        self,
        family: ModelFamily,
        layers: Sequence[MoELayer],
        *,
        numbering: Numbering,
        due: Callable[[], bool],
        take: Callable[[ForwardPass, int], None],
    ) -> None:
        self._family = family
        num_ids = layers[0].num_experts + family.may_lack_experts
        self._id_dtype = torch.uint8 if num_ids <= 256 else torch.int16
        self._numbering = numbering
        self._due, self._take = due, take
        self._label: Labeller = no_labels
        self._shape: tuple[int, int] | None = None

    @contextmanager
    def saying(self, label: Labeller, shape: tuple[int, int] | None) -> Iterator[None]:
        """Take the caller's word for the labels, and the shape, of the passes inside."""
        before = self._label, self._shape
        self._label, self._shape = label, shape
        try:
            yield
        finally:
            self._label, self._shape = before

    def begin(self, inputs: Mapping[str, Any], others: tuple[Any, ...]) -> ForwardPass | None:
        """Describe a pass by its inputs, if it is to be recorded.

        Raises
        ------
        InputError
            If it cannot be: it is being captured as a CUDA graph, or its inputs do not fit.
        """
        if not self._due():
            return None
        if is_capturing():
            raise InputError(
                "replays of a CUDA graph run no Python, so their tokens cannot be recorded one by one; count "
                "them with LoadCounter, or capture the graph while the recorder is paused"
            )
        if self._shape is not None:
            return ForwardPass(shape=None, shapes=[self._shape])
        one = begun_pass(inputs, others, self._label, any_model=self._family.may_lack_experts)
        if one.shape is not None:
            one.rows = self._numbering.rows(one)
        return one

    def end(self, done: ForwardPass, index_L: list[torch.Tensor], output: Any) -> None:
        """Hand a pass over with its ids.

        Raises
        ------
        InputError
            If the layers, or the batch, disagree about the number of tokens.
        """
        done.experts_LPK = self._ids(done, index_L)
        cache = done.cache if done.cache is not None else cache_in(output)
        done.cache = None
        if cache is not None and done.rows is not None:
            self._numbering.follow(cache, done.rows)
        self._take(done, done.experts_LPK.shape[1])

    def _ids(self, done: ForwardPass, index_L: Sequence[torch.Tensor]) -> torch.Tensor:
        """Expert ids of a pass in the order of its rows, ``[layers, places, k]``; its shape is known then."""
        stacked_LPK = stacked_ids(index_L)
        shape = shape_of_tokens(done, stacked_LPK.shape[1])
        if done.shape is None:
            done.shape = shape
            done.labels, done.rows = self._label(shape), self._numbering.rows(done)
        ids_LPK = stacked_LPK.to(self._id_dtype)
        if not self._family.sequence_first:
            return ids_LPK
        rows, places = shape
        ids_LNBK = ids_LPK.view(len(index_L), places, rows, -1)
        return ids_LNBK.transpose(1, 2).reshape(ids_LPK.shape)
