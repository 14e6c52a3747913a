"""One forward pass: how many rows of how many places it runs, which are padding, where they stand.

Everything stays on the device until the pass is named (`traces.record.numbering`), or leaves it through a
ring of host memory while the model runs on.

Shape letters: B rows of a batch, N token places of a row (padding included), P places of all rows, L MoE
layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from placement.errors import InputError
from traces.record.labels import Labeller, Labels
from traces.record.numbering import Rows
from traces.record.pinned import Landing, PinnedRing

__all__ = ["ForwardPass", "begun_pass", "cache_in", "places_kept", "shape_of_tokens"]

IntArray = npt.NDArray[np.int64]


@dataclass(kw_only=True, slots=True, eq=False)
class ForwardPass:
    """One forward pass: everything needed to name its tokens later, still on the device.

    `shape` is that of the batch, `None` until the routers have said how many tokens there are.
    """

    shape: tuple[int, int] | None
    past_tokens: int = 0
    rows: Rows | None = None
    kept_BN: torch.Tensor | None = None
    position_BN: torch.Tensor | None = None
    labels: Labels | None = None
    cache: Any = None
    shapes: list[tuple[int, int]] = field(default_factory=list)
    experts_LPK: torch.Tensor | None = None
    landing: Landing | None = None

    def leave(self, ring: PinnedRing) -> bool:
        """Start to leave the device through a ring; `False`, and nothing done, while it has no room.

        The pass may be read after `arrive`, and until `let_go`.
        """
        there = (self.experts_LPK, self.kept_BN, self.position_BN)
        self.landing = ring.put([tensor for tensor in there if tensor is not None])
        if self.landing is None:
            return False
        landed = iter(self.landing.tensors)
        self.experts_LPK, self.kept_BN, self.position_BN = (
            None if tensor is None else next(landed) for tensor in there
        )
        return True

    def arrive(self) -> None:
        """Wait until what left the device is on the host."""
        if self.landing is not None:
            self.landing.wait()

    def let_go(self) -> None:
        """Give back the host memory that the pass took."""
        if self.landing is not None:
            self.landing.release()

    def positions(self) -> IntArray:
        """Position of every place in its sequence, ``[rows, places]``."""
        if self.labels is not None and self.labels.position_BN is not None:
            return self.labels.position_BN
        if self.position_BN is not None:
            position_BN: IntArray = self.position_BN.cpu().numpy()
            return position_BN
        rows, places = self.shape or (0, 0)
        return np.broadcast_to(self.past_tokens + np.arange(places), (rows, places))


def begun_pass(
    inputs: Mapping[str, Any], others: Iterable[Any], label: Labeller, *, any_model: bool
) -> ForwardPass:
    """Describe a pass by the inputs of the module that runs it.

    Parameters
    ----------
    inputs, others
        Arguments by name, and those without one.
    label
        What the caller says about the batch.
    any_model
        Whether the model may take other inputs than those of transformers, and other attention masks: then
        the routers tell how many tokens there are, and a mask that does not tell padding apart is left aside.

    Raises
    ------
    InputError
        If there are no tokens, or the caller's labels or the mask do not fit.
    """
    shape = _batch_shape(inputs)
    if shape is None and not any_model:
        raise InputError("a forward pass without input_ids or inputs_embeds cannot be recorded")
    if shape is None:
        found = sorted(_shapes((*inputs.values(), *others)))
        return ForwardPass(shape=None, shapes=[shape for _, shape in found])
    cache = inputs.get("past_key_values")
    past_tokens = _length(cache)
    labels = label(shape)
    # A decode step feeds one real token to every row, whatever its mask looks like (static caches').
    decodes = past_tokens > 0 and shape[1] == 1
    known = labels.sequence_BN is not None or any_model or decodes
    counted_BN = _mask_of_places(inputs.get("attention_mask"), past_tokens, shape, known=known)
    return ForwardPass(
        shape=shape,
        past_tokens=past_tokens,
        kept_BN=None if counted_BN is None else counted_BN[:, past_tokens:].clone(),
        position_BN=_positions(inputs.get("position_ids"), counted_BN, past_tokens, shape),
        labels=labels,
        cache=cache,
    )


def shape_of_tokens(one: ForwardPass, num_tokens: int) -> tuple[int, int]:
    """Rows and places of a pass whose routers saw so many tokens.

    Raises
    ------
    InputError
        If nothing that the module was given has so many tokens.
    """
    if one.shape is not None and one.shape[0] * one.shape[1] == num_tokens:
        return one.shape
    fitting = [shape for shape in one.shapes if shape[0] * shape[1] == num_tokens]
    if one.shape is None and fitting:
        return fitting[0]
    seen = one.shape or (one.shapes[0] if one.shapes else None)
    given = "nothing the model was given tells rows and places" if seen is None else f"the batch is {seen}"
    raise InputError(
        f"the routers saw {num_tokens} tokens, but {given} (parallel ranks may each see a part); "
        f"record around that, or say recorder.batch(shape=(rows, places))"
    )


def places_kept(inputs: Mapping[str, Any], *, any_model: bool) -> torch.Tensor | None:
    """Real (not padded) places of a pass, bool ``[rows, places]`` on the mask's device; `None` for all.

    Nothing here waits for a device. A decode step feeds one real token to every row where its mask cannot be
    read, or where the length of the past is known on the device alone (a static cache).

    Parameters
    ----------
    inputs
        Arguments of the module that runs the pass, by name.
    any_model
        As for `begun_pass`.

    Raises
    ------
    InputError
        If the mask does not tell padding apart.
    """
    shape, mask = _batch_shape(inputs), inputs.get("attention_mask")
    if shape is None or mask is None:
        return None
    flat = isinstance(mask, torch.Tensor) and mask.ndim == 2
    if flat and tuple(mask.shape) == shape:  # it covers the past as well, so there is none
        return torch.ne(mask, 0)
    cache = inputs.get("past_key_values")
    past_tokens = _length(cache) if _tells_length(cache) else None
    if flat and past_tokens is not None and mask.shape[1] >= past_tokens + shape[1]:
        return torch.ne(mask[:, past_tokens : past_tokens + shape[1]], 0)
    decodes = shape[1] == 1 and past_tokens != 0
    if decodes or any_model:
        return None
    described = f"of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
    raise InputError(
        f"padding cannot be read from an attention mask {described} without waiting for the device; say "
        "which places are real with batch(kept=...)"
    )


def cache_in(output: Any) -> Any:
    """Return the cache that the model made itself and returns, in an object or a plain tuple."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def _length(cache: Any) -> int:
    """Tokens that a cache holds; none where it does not say (a cache of recurrent states alone)."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # transformers: it "can only be called on Attention layers"
        return 0


def _tells_length(cache: Any) -> bool:
    """Whether a cache knows on the host how many tokens it holds."""
    layers = getattr(cache, "layers", ())
    lengths = (getattr(layer, "cumulative_length", None) for layer in layers)
    return not any(isinstance(length, torch.Tensor) and length.device.type != "cpu" for length in lengths)


def _batch_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    for name in ("input_ids", "inputs_embeds"):
        tokens = inputs.get(name)
        if isinstance(tokens, torch.Tensor) and tokens.ndim >= 2:
            return int(tokens.shape[0]), int(tokens.shape[1])
    return None


def _shapes(values: Iterable[Any]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Batch shapes that arguments suggest, most likely first: token ids, then activations, then one row."""
    for value in values:
        if isinstance(value, torch.Tensor):
            integer = not value.is_floating_point() and value.dtype != torch.bool
            if value.ndim >= 2:
                yield (0 if integer and value.ndim == 2 else 1), (int(value.shape[0]), int(value.shape[1]))
            elif value.ndim == 1:
                yield 2, (1, int(value.shape[0]))
        elif isinstance(value, (tuple, list)):
            yield from _shapes(value)
        elif isinstance(value, Mapping):
            yield from _shapes(value.values())


def _mask_of_places(
    mask: Any, past_tokens: int, shape: tuple[int, int], *, known: bool
) -> torch.Tensor | None:
    """Real (not padded) places of the past and this pass, bool ``[rows, past + places]``."""
    rows, places = shape
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= past_tokens + places:
        return mask[:, : past_tokens + places] != 0
    if known:
        return None
    described = (
        f"of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"({type(mask).__name__})"
    )
    raise InputError(
        f"padding cannot be read from an attention mask {described}: pass one of shape "
        f"{(rows, past_tokens + places)}, or name the tokens with recorder.batch(sequence_ids=...)"
    )


def _positions(
    position_ids: Any, counted_BN: torch.Tensor | None, past_tokens: int, shape: tuple[int, int]
) -> torch.Tensor | None:
    """Positions that the pass itself tells; `None` when they just count on from the past."""
    if isinstance(position_ids, torch.Tensor) and position_ids.ndim == 2:
        return position_ids.clone().expand(shape)
    if counted_BN is not None:
        return (counted_BN.cumsum(dim=1) - 1)[:, past_tokens:].clone()
    return None
