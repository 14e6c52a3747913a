"""Forward hooks on a model's routers, and on what runs them, that collect the ids of whole passes.

During a forward pass the hooks only keep references: no kernel runs, and the host waits for nothing.

Shape letters: P places of all rows of a batch (padding included), L MoE layers, K top-k.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from placement.errors import InputError, PlacementError
from placement.runtime.families.protocol import ModelFamily, MoELayer
from placement.runtime.families.unwrap import compiled_part, unwrapped

__all__ = ["FAILURES", "Begin", "End", "RouterHooks", "stacked_ids"]

FAILURES = (PlacementError, OSError, RuntimeError, ValueError, MemoryError)
"""What a full disk, a lost device or a foreign model makes of a recording.

Not every exception: a mistake of ours, a `KeyError` say, is no reason to carry on.
"""

Begin = Callable[[Mapping[str, Any], tuple[Any, ...]], Any]
"""Given a pass's inputs by name and those without one, returns what to know of it; `None` leaves it out."""

End = Callable[[Any, list[torch.Tensor], Any], None]
"""Given what `Begin` returned, the ids of each MoE layer ``[places, k]``, and what the pass returned."""


class RouterHooks:
    """Collects the expert ids of each forward pass, from its begin to its end.

    Begin and end run outside of what `torch.compile` compiles. Routers that run outside of a pass (layers
    that gradient checkpointing runs again) are not collected.

    Parameters
    ----------
    model, family, layers
        The model, how to read its routers, and its MoE layers.
    begin, end
        Called when a pass begins and when it ends.
    fail
        Given what went wrong, raises it or ends the recording.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        layers: Sequence[MoELayer],
        *,
        begin: Begin,
        end: End,
        fail: Callable[[Exception], None],
    ) -> None:
        self._family, self._num_layers = family, len(layers)
        self._begin_pass, self._end_pass, self._fail = begin, end, fail
        self._running: Any = None
        self._index_L: list[torch.Tensor | None] | None = None
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
        self._running = self._index_L = None
        for handle in self._handles:
            handle.remove()

    def _begin(self, runs: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running = self._index_L = None
        inputs = {**dict(zip(self._input_names, args, strict=False)), **kwargs} if args else kwargs
        try:
            self._running = self._begin_pass(inputs, args[len(self._input_names) :])
        except FAILURES as exc:
            self._fail(exc)
        if self._running is not None:
            self._index_L = [None] * self._num_layers

    def _capture(
        self, index: int, layer: MoELayer, router: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        # None outside a forward pass of the model: gradient checkpointing runs layers again on their own.
        index_L = self._index_L
        if index_L is None:
            return
        try:
            index_L[index] = self._family.read_top_k(output, layer)
        except FAILURES as exc:
            self._fail(exc)

    def _end(self, runs: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        done, found_L = self._running, self._index_L
        self._running = self._index_L = None
        if done is None or found_L is None:
            return
        try:
            self._end_pass(done, self._whole(found_L), output)
        except FAILURES as exc:
            self._fail(exc)

    def _whole(self, found_L: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        index_L = [index for index in found_L if index is not None]
        if len(index_L) < self._num_layers:
            raise InputError(
                f"{len(index_L)} of the {self._num_layers} MoE layers ran, so no token can be recorded (a "
                "compiled model: attach the recorder before its first pass, or after torch.compiler.reset())"
            )
        return index_L


def stacked_ids(index_L: Sequence[torch.Tensor]) -> torch.Tensor:
    """Ids of all layers on one device, ``[layers, places, k]``.

    Raises
    ------
    InputError
        If layers ran different numbers of tokens.
    """
    tokens_L = {len(index) for index in index_L}
    if len(tokens_L) > 1:
        raise InputError(f"the MoE layers ran different numbers of tokens: {sorted(tokens_L)}")
    return torch.stack([index.to(index_L[0].device) for index in index_L])
