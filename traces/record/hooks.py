"""Forward hooks on a model's routers, and on what runs them, that collect the ids of whole passes.

During a forward pass the hooks only keep references.

Shape letters: B rows of a batch, N token places of a row (padding included), P places of all rows,
L MoE layers, K top-k.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from placement.errors import InputError, PlacementError
from placement.runtime.families.protocol import ModelFamily, MoELayer
from placement.runtime.families.unwrap import compiled_part, unwrapped
from traces.record.labels import Labeller, no_labels
from traces.record.numbering import Numbering
from traces.record.passes import ForwardPass, begun_pass, cache_in, shape_of_tokens

__all__ = ["FAILURES", "RouterHooks"]

FAILURES = (PlacementError, OSError, RuntimeError, ValueError, MemoryError)
"""What a full disk, a lost device or a foreign model makes of a recording.

Not every exception: a mistake of ours, a `KeyError` say, is no reason to carry on.
"""


class RouterHooks:
    """Collects the expert ids of each forward pass, from its begin to its end.

    Parameters
    ----------
    model, family, layers
        The model, how to read its routers, and its MoE layers.
    numbering
        Knows which sequences the rows of a pass continue.
    due
        Asked when a pass begins: whether it is recorded.
    take
        Given a pass that ended, with its ids, and its number of places.
    fail
        Given what went wrong, raises it or ends the recording.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        layers: Sequence[MoELayer],
        *,
        numbering: Numbering,
        due: Callable[[], bool],
        take: Callable[[ForwardPass, int], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self._family, self._num_layers = family, len(layers)
        num_ids = layers[0].num_experts + family.may_lack_experts
        self._id_dtype = torch.uint8 if num_ids <= 256 else torch.int16
        self._numbering = numbering
        self._due, self._take, self._fail = due, take, fail
        self._label: Labeller = no_labels
        self._shape: tuple[int, int] | None = None
        self._running: ForwardPass | None = None
        self._handles = self._attach(model, layers)

    def _attach(self, model: nn.Module, layers: Sequence[MoELayer]) -> list[Any]:
        # A compiled model's passes begin and end outside of what is compiled; only captures are inside.
        compiled = compiled_part(model)
        runs = self._family.decoder(model) if compiled is None else compiled
        self._input_names = tuple(inspect.signature(unwrapped(runs).forward).parameters)
        # Python that numbers batches is no work for a compiler: it would compile anew for every number.
        disable: Any = torch.compiler.disable
        handles: list[Any] = [
            runs.register_forward_pre_hook(disable(self._begin), with_kwargs=True),
            runs.register_forward_hook(disable(self._end)),
        ]
        # First in line: a placement's hook turns expert ids into slots, and those are not recorded.
        for index, layer in enumerate(layers):
            capture = partial(self._capture, index, layer)
            handles.append(layer.router.register_forward_hook(capture, prepend=True))
        return handles

    def remove(self) -> None:
        """Take the hooks off; a pass that runs is dropped."""
        self._running = None
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def saying(self, label: Labeller, shape: tuple[int, int] | None) -> Iterator[None]:
        """Take the caller's word for the labels, and the shape, of the passes inside."""
        before = self._label, self._shape
        self._label, self._shape = label, shape
        try:
            yield
        finally:
            self._label, self._shape = before

    def _begin(self, runs: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running = None
        if not self._due():
            return
        try:
            self._running = self._begun(args, kwargs)
        except FAILURES as exc:
            self._fail(exc)

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardPass:
        if self._shape is not None:
            return ForwardPass(shape=None, index_L=[None] * self._num_layers, shapes=[self._shape])
        inputs = {**dict(zip(self._input_names, args, strict=False)), **kwargs} if args else kwargs
        others = args[len(self._input_names) :]
        any_model = self._family.may_lack_experts
        one = begun_pass(inputs, others, self._num_layers, self._label, any_model=any_model)
        if one.shape is not None:
            one.rows = self._numbering.rows(one)
        return one

    def _capture(
        self, index: int, layer: MoELayer, router: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        # None outside a forward pass of the model: gradient checkpointing runs layers again on their own.
        running = self._running
        if running is None:
            return
        try:
            running.index_L[index] = self._family.read_top_k(output, layer)
        except FAILURES as exc:
            self._fail(exc)

    def _end(self, runs: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        done, self._running = self._running, None
        if done is None:
            return
        try:
            self._finish(done, output)
        except FAILURES as exc:
            self._fail(exc)

    def _finish(self, done: ForwardPass, output: Any) -> None:
        index_L = [index for index in done.index_L if index is not None]
        if len(index_L) < self._num_layers:
            raise InputError(
                f"{len(index_L)} of the {self._num_layers} MoE layers ran, so no token can be recorded (a "
                "compiled model: attach the recorder before its first pass, or after torch.compiler.reset())"
            )
        done.index_L = []
        done.experts_LPK = self._stacked(done, index_L)
        cache = done.cache if done.cache is not None else cache_in(output)
        done.cache = None
        if cache is not None and done.rows is not None:
            self._numbering.follow(cache, done.rows)
        self._take(done, done.experts_LPK.shape[1])

    def _stacked(self, done: ForwardPass, index_L: Sequence[torch.Tensor]) -> torch.Tensor:
        """Expert ids of a pass in the order of its rows, ``[layers, places, k]``; its shape is known then."""
        tokens_L = {len(index) for index in index_L}
        if len(tokens_L) > 1:
            raise InputError(f"the MoE layers ran different numbers of tokens: {sorted(tokens_L)}")
        shape = shape_of_tokens(done, len(index_L[0]))
        if done.shape is None:
            done.shape = shape
            done.labels, done.rows = self._label(shape), self._numbering.rows(done)
        ids_LPK = torch.stack([index.to(index_L[0].device) for index in index_L]).to(self._id_dtype)
        if not self._family.sequence_first:
            return ids_LPK
        rows, places = shape
        ids_LNBK = ids_LPK.view(len(index_L), places, rows, -1)
        return ids_LNBK.transpose(1, 2).reshape(ids_LPK.shape)
