"""Counts on the device how many tokens select each expert, window by window, at next to no cost.

A pass adds three small kernels (stack the ids, number them, add them up) to the stream that it runs on, and a
window one copy of ``[layers, experts]`` numbers, which leaves by a stream of its own. The host waits for
none of them, so windows are handed over some steps later.

Shape letters: B rows of a batch, N token places of a row (padding included), P places of all rows, L MoE
layers, E experts, K top-k, C columns (experts, and one more for none where a family may lack some).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from placement.errors import InputError
from placement.runtime.families.protocol import ModelFamily, MoELayer
from placement.runtime.families.registry import check_layers
from traces.record.hooks import FAILURES, RouterHooks, stacked_ids
from traces.record.passes import places_kept
from traces.record.pinned import Landing, PinnedRing
from traces.record.recorder import OnError, RecordingStopped, find_family
from traces.record.tally import LoadTally
from traces.record.transfer import Transfer, is_capturing, transfer_from
from traces.record.windows import LoadWindow

__all__ = ["LoadCounter"]

_BUFFERS = 3

_MEMORY_OF_GRAPHS: list[tuple[torch.Tensor, ...]] = []
# A captured graph writes to its tensors' addresses for as long as it is replayed, and keeps none of them
# alive: what it adds to must outlive the counter. A few kilobytes for each capture.


class LoadCounter:
    """Counts load windows of a running model, until closed.

    A step ends when you call `step`, when an optimizer followed steps, or with every pass if
    `step_per_pass`; a window is so many steps. Padding (by the attention mask, on the device) does not count,
    nor does a layer that gradient checkpointing runs again. Ids are those of logical experts, also while a
    placement is applied. A model inside DistributedDataParallel or FSDP is counted as well, each rank its own
    tokens.

    `torch.compile`: compile first and attach before the first compiled pass, as with `Recorder`. Counting
    happens outside of what is compiled, so nothing is compiled anew for it (once more for passes that do
    not count, in a pause say), and ``mode="reduce-overhead"`` is safe. Copies of a model in one process share
    compiled code, hooks included: where only some of them are counted, set
    ``torch._dynamo.config.skip_nnmodule_hook_guards = False``.

    CUDA graphs that you capture: attach first, run the warm-up passes (they count), capture (which counts
    nothing), then call `step` after each step's replays, on the stream that they ran on. Every replay counts,
    with the mask that its static inputs hold then. What asks the host about single passes is refused while
    a graph is captured: `window_tokens`, `step_per_pass`, `every_steps`, and `step` itself. A graph that was
    captured in a pause never counts; one that was captured otherwise counts whenever it is replayed, and
    after `close` adds to memory that is kept for it and never read. ``torch.cuda.make_graphed_callables``
    takes no modules with hooks; capture the whole pass instead.

    Parameters
    ----------
    model
        A transformers model of a supported family, or any model with a `family` that finds its routers.
    family
        As in `Recorder`.
    window_steps
        Steps of a window.
    window_tokens
        Places (padding included) after which a window ends with its step, instead of `window_steps`; ranks
        that see other numbers of tokens then number their windows differently.
    every_steps
        Count one step in so many, the first included; the others still belong to their window.
    step_per_pass
        Whether every forward pass is a step.
    first_window
        Number of the first window.
    on_window
        Called with each finished window, by the thread that steps; a slow one holds the model up. Without
        it, windows wait for `windows`.
    buffers
        Windows that may be on their way at once; the host waits for the oldest before it starts another.
    on_error
        As in `Recorder`.
    transfer
        How counts leave the device; by default pinned memory and a stream of its own on CUDA.

    Raises
    ------
    InputError
        If the family is not supported, the model has no MoE layers, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        family: ModelFamily | str | None = None,
        window_steps: int = 1,
        window_tokens: int | None = None,
        every_steps: int = 1,
        step_per_pass: bool = False,
        first_window: int = 0,
        on_window: Callable[[LoadWindow], None] | None = None,
        buffers: int = _BUFFERS,
        on_error: OnError = "raise",
        transfer: Transfer | None = None,
    ) -> None:
        _check_numbers(window_steps, window_tokens or 1, every_steps, buffers)
        if on_error not in ("raise", "stop-recording"):
            raise InputError(f"on_error {on_error!r} is neither 'raise' nor 'stop-recording'")
        self._window_steps, self._window_tokens, self._every_steps = window_steps, window_tokens, every_steps
        self._step_per_pass, self._on_window, self._on_error = step_per_pass, on_window, on_error
        self._family = find_family(model, family)
        self._layers = check_layers(self._family, self._family.moe_layers(model))
        self._given_transfer, self._buffers = transfer, buffers
        self._counted_steps = self._window_start = self._places = self._pauses = 0
        self._window = first_window
        self._kept_BN: torch.Tensor | None = None
        self._finished: list[LoadWindow] = []
        self._under_way: deque[_Reading] = deque()
        self._closed = False
        self._error: Exception | None = None
        self._followed = ExitStack()
        columns = self._layers[0].num_experts + self._family.may_lack_experts
        self._before_LC = np.zeros((len(self._layers), columns), dtype=np.int64)
        self._tally = LoadTally(len(self._layers), columns, device=_device_of(self._layers[0], model))
        self._ring = self._ring_from(self._tally.device)
        self._hooks = RouterHooks(
            model, self._family, self._layers, begin=self._begin, end=self._end, fail=self._fail
        )

    @property
    def num_experts(self) -> int:
        """Logical experts per layer."""
        return self._layers[0].num_experts

    @property
    def top_k(self) -> int:
        """Experts that each token selects."""
        return self._layers[0].top_k

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Decoder layers that are counted."""
        return tuple(layer.decoder_layer for layer in self._layers)

    @property
    def error(self) -> Exception | None:
        """What ended the counting early, if something did."""
        return self._error

    def step(self) -> None:
        """End a step; call it after each step, or use `follow`.

        Raises
        ------
        InputError
            While a CUDA graph is captured.
        """
        if self._closed:
            return
        if is_capturing():
            raise InputError("step() cannot be captured in a CUDA graph; call it after each replay")
        self._counted_steps += 1
        try:
            if self._window_is_full():
                self._roll()
            self._deliver()
        except FAILURES as exc:
            self._fail(exc)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `step` after each step of an optimizer, however many passes it accumulates."""
        handle = optimizer.register_step_post_hook(lambda *_: self.step())
        self._followed.callback(handle.remove)

    @contextmanager
    def batch(self, *, kept: torch.Tensor) -> Iterator[None]:
        """Say which places of the passes inside are real, where the attention mask does not tell.

        Parameters
        ----------
        kept
            Nonzero for real places, ``[rows, places]`` as the routers see them; on the model's device, or
            the copy holds the pass up (and cannot be captured in a CUDA graph).
        """
        before, self._kept_BN = self._kept_BN, kept
        try:
            yield
        finally:
            self._kept_BN = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside, an evaluation between training steps say; pauses nest."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def windows(self, *, wait: bool = False) -> list[LoadWindow]:
        """Take the windows that are finished; each is handed over once.

        Parameters
        ----------
        wait
            Wait for those that are on their way from the device.
        """
        self._deliver(wait=wait)
        taken, self._finished = self._finished, []
        return taken

    def close(self) -> None:
        """Take the hooks off and finish the last window, unless it is empty; `windows` still has them."""
        if self._closed:
            return
        self._closed = True
        self._detach()
        try:
            self._roll()
            self._deliver(wait=True)
        except FAILURES as exc:
            self._fail(exc)

    def __enter__(self) -> Self:
        """Return the counter."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; what was counted before a failure is kept."""
        self.close()

    def _detach(self) -> None:
        self._followed.close()
        self._hooks.remove()

    def _fail(self, exc: Exception) -> None:
        """Let a failure through, or end the counting with a warning, as the caller chose."""
        if self._on_error == "raise":
            raise exc
        self._closed, self._error = True, exc
        self._detach()
        warnings.warn(
            f"counting stopped, the model goes on: {exc} (windows from number {self._window} on are missing)",
            RecordingStopped,
            stacklevel=2,
        )

    def _begin(self, inputs: Mapping[str, Any], others: tuple[Any, ...]) -> _Pass | None:
        if self._pauses or self._counted_steps % self._every_steps:
            return None
        if is_capturing():
            self._check_capture()
        if self._kept_BN is not None:
            return _Pass(kept_BN=self._kept_BN)
        return _Pass(kept_BN=places_kept(inputs, any_model=self._family.may_lack_experts))

    def _check_capture(self) -> None:
        asked = {
            "window_tokens": self._window_tokens is not None,
            "step_per_pass": self._step_per_pass,
            "every_steps": self._every_steps > 1,
        }
        for name, is_asked in asked.items():
            if is_asked:
                raise InputError(
                    f"{name} cannot be kept for a CUDA graph, whose replays tell the host nothing; use "
                    "window_steps alone and call step() after each replay"
                )
        _MEMORY_OF_GRAPHS.append(self._tally.memory())

    def _end(self, one: _Pass, index_L: list[torch.Tensor], output: Any) -> None:
        ids_LPK = stacked_ids(index_L)
        self._move_to(ids_LPK.device)
        kept_BN = one.kept_BN
        if kept_BN is not None and self._family.sequence_first:
            kept_BN = kept_BN.T
        self._tally.add(ids_LPK, None if kept_BN is None else kept_BN.reshape(-1))
        self._places += ids_LPK.shape[1]
        if self._step_per_pass:
            self.step()

    def _move_to(self, device: torch.device) -> None:
        """Count where the routers run: a model may have been moved since."""
        if device == self._tally.device:
            return
        if is_capturing():
            raise InputError(f"run a pass on {device} before a CUDA graph is captured there")
        self._deliver(wait=True)
        self._tally.move_to(device)
        self._ring = self._ring_from(device)

    def _ring_from(self, device: torch.device) -> PinnedRing:
        transfer = transfer_from(device) if self._given_transfer is None else self._given_transfer
        return PinnedRing(
            transfer, capacity_bytes=self._buffers * PinnedRing.taken_bytes([self._before_LC.nbytes])
        )

    def _window_is_full(self) -> bool:
        if self._window_tokens is not None:
            return self._places >= self._window_tokens
        return self._counted_steps - self._window_start >= self._window_steps

    def _roll(self) -> None:
        """Read the totals, for the window that ends."""
        totals = [self._tally.reading()]
        landing = self._ring.put(totals)
        while landing is None:
            self._deliver_oldest()
            landing = self._ring.put(totals)
        steps = self._counted_steps - self._window_start
        self._under_way.append(_Reading(window=self._window, steps=steps, landing=landing))
        self._window += 1
        self._window_start, self._places = self._counted_steps, 0

    def _deliver(self, *, wait: bool = False) -> None:
        while self._under_way and (wait or self._under_way[0].landing.is_there()):
            self._deliver_oldest()

    def _deliver_oldest(self) -> None:
        one = self._under_way.popleft()
        one.landing.wait()
        total_LC = one.landing.tensors[0].numpy().copy()
        one.landing.release()
        load_LC, self._before_LC = total_LC - self._before_LC, total_LC
        if self._closed and not self._under_way and not load_LC.any():
            return  # what comes after the last step is no window if nothing ran
        found = LoadWindow(
            window=one.window,
            load_LE=load_LC[:, : self.num_experts],
            tokens=int(load_LC[0].sum()) // self.top_k,
            steps=one.steps,
        )
        if self._on_window is None:
            self._finished.append(found)
        else:
            self._on_window(found)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pass:
    """A pass that is counted: its real places, `None` for all."""

    kept_BN: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reading:
    """Totals at the end of a window, on their way to the host."""

    window: int
    steps: int
    landing: Landing


def _check_numbers(*numbers: int) -> None:
    if min(numbers) < 1:
        raise InputError(
            f"window_steps, window_tokens, every_steps and buffers must be at least 1: {numbers}"
        )


def _device_of(layer: MoELayer, model: nn.Module) -> torch.device:
    """Where a layer's router computes, as far as its weights tell."""
    for part in (layer.router, model):
        for parameter in part.parameters():
            if not parameter.is_meta:
                return parameter.device
    return torch.device("cpu")
