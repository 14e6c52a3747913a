"""Records every token's expert ids into a sink: what to keep, when to write, how to end.

Ids are one or two bytes each. Off a GPU they go pass by pass, by a stream of their own through pinned memory,
and a thread of their own names and writes them: no step waits for either. On the CPU they are named and
written in whole batches, when the buffer is full.

Shape letters: P places of all rows of a batch (padding included), T recorded tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import atexit
import os
import signal as signals
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from placement.errors import InputError
from placement.runtime.families.protocol import ModelFamily
from placement.runtime.families.registry import check_layers, family_named, family_of
from traces.record.background import BackgroundWriter
from traces.record.hooks import FAILURES, RouterHooks
from traces.record.labels import given_labels
from traces.record.numbering import Numbering
from traces.record.passes import ForwardPass
from traces.record.pinned import PinnedRing
from traces.record.sampling import Sampling, kept_sequences
from traces.record.signals import SignalGuard
from traces.record.sinks import TraceSink
from traces.record.tokens import TokenPasses
from traces.record.transfer import transfer_from
from traces.trace import UNKNOWN_DOMAIN

__all__ = ["FLUSH_TOKENS", "OnError", "Recorder", "RecordingStopped", "WhenFull", "find_family"]

IntArray = npt.NDArray[np.int64]
ExpertArray = npt.NDArray[np.unsignedinteger[Any]]

OnError = Literal["raise", "stop-recording"]
WhenFull = Literal["wait", "drop"]

FLUSH_TOKENS = 1 << 14
"""Tokens after which what was recorded is handed to the sink."""


class RecordingStopped(UserWarning):
    """A recording failed and has ended, while the model goes on."""


class Recorder:
    """Records which experts every token of a model selects, until closed.

    Each row of a prefill is a new sequence; later passes with the same cache continue their rows'
    sequences; packed rows are cut where their positions start again. Padding (by a 2-D attention mask) is
    dropped. Ids are those of logical experts, also while a placement is applied. Layers that gradient
    checkpointing runs again are not recorded again. What really ran is recorded: where speculative decoding
    takes tokens back, positions repeat; where beam search swaps beams, a sequence is a row.

    A model inside DistributedDataParallel, FSDP or `torch.compile` is recorded as well. Compile first and
    attach before the first compiled pass: the compiler does not look at hooks that come later. Compiled with
    CUDA graphs inside (``mode="reduce-overhead"``) it is recorded too: ids are copied after each pass, before
    the next one reuses their memory. A CUDA graph that you capture yourself is refused, for its replays run
    no Python: count those with `LoadCounter`, or pause and `flush` before you capture (a capture tolerates no
    other thread's use of the device). A static cache keeps its length on the device; asking for it at each
    pass waits for the device, with or without a ring.

    Parameters
    ----------
    model
        A transformers model of a supported family (it may be the bare decoder), or any model with a
        `family` that finds its routers.
    sink
        Takes the tokens; closed with the recorder.
    family
        How to find and read the routers, or the name of a supported family; by default found out from the
        model.
    sample_every
        Record one token in so many, all its layers; 1 records every token.
    sample_sequences
        Share of sequences to record, each whole or not at all, by a hash of rank and number.
    every_steps
        Record one step in so many. Steps are forward passes until `step` is called or an optimizer followed.
    rank
        Process rank, for `sample_sequences`.
    first_sequence
        Number of the first new sequence, where a recording is continued.
    flush_tokens
        Tokens after which the buffer is handed over.
    on_error
        What a failure of the recording itself does: ``raise``, or ``stop-recording``, which warns once,
        takes the hooks off, leaves what is written valid and lets the model go on.
    when_full
        What to do with a pass on a GPU while the ring is full, because the sink is slower than the model:
        ``wait`` for room, or ``drop`` it, which `num_dropped` counts.
    ring
        Where passes leave the device; by default a pinned one of 64 MiB for what runs on a GPU, and none for
        the CPU.

    Raises
    ------
    InputError
        If the family is not supported, the model has no MoE layers, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        sink: TraceSink,
        *,
        family: ModelFamily | str | None = None,
        sample_every: int = 1,
        sample_sequences: float = 1.0,
        every_steps: int = 1,
        rank: int = 0,
        first_sequence: int = 0,
        flush_tokens: int = FLUSH_TOKENS,
        on_error: OnError = "raise",
        when_full: WhenFull = "wait",
        ring: PinnedRing | None = None,
    ) -> None:
        if flush_tokens < 1:
            raise InputError(f"flush_tokens {flush_tokens} must be at least 1")
        if on_error not in ("raise", "stop-recording"):
            raise InputError(f"on_error {on_error!r} is neither 'raise' nor 'stop-recording'")
        if when_full not in ("wait", "drop"):
            raise InputError(f"when_full {when_full!r} is neither 'wait' nor 'drop'")
        self._sampling = Sampling(
            every_tokens=sample_every, sequences=sample_sequences, every_steps=every_steps
        )
        self._family = find_family(model, family)
        layers = check_layers(self._family, self._family.moe_layers(model))
        self._sink, self._rank, self._on_error = sink, rank, on_error
        self._flush_tokens = flush_tokens
        self._num_experts = layers[0].num_experts
        self._numbering = Numbering(first_sequence)
        self._ring, self._when_full = ring, when_full
        self._writer = BackgroundWriter()
        self._pending: list[ForwardPass] = []
        self._pending_tokens = self._num_taken = self._num_written = 0
        self._num_seen = self._num_tokens = self._num_dropped = 0
        self._pauses = self._steps = 0
        self._steps_are_told = False
        self._closed = False
        self._pid = os.getpid()
        self._error: Exception | None = None
        self._guard = SignalGuard(self.close)
        self._followed = ExitStack()
        self._passes = TokenPasses(
            self._family, layers, numbering=self._numbering, due=self._is_due, take=self._take
        )
        self._hooks = RouterHooks(
            model, self._family, layers, begin=self._passes.begin, end=self._passes.end, fail=self._fail
        )
        atexit.register(self.close)

    @property
    def num_tokens(self) -> int:
        """Tokens handed to the sink so far."""
        return self._num_tokens

    @property
    def num_dropped(self) -> int:
        """Places (padding included) of passes that were dropped because the ring was full."""
        return self._num_dropped

    @property
    def num_sequences(self) -> int:
        """One more than the highest sequence number handed out or given so far."""
        return self._numbering.num_sequences

    @property
    def error(self) -> Exception | None:
        """What ended the recording early, if something did."""
        return self._error

    @contextmanager
    def batch(
        self,
        *,
        sequence_ids: npt.ArrayLike | None = None,
        positions: npt.ArrayLike | None = None,
        domains: npt.ArrayLike | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Iterator[None]:
        """Say what the rows of the forward passes inside are, instead of having it inferred.

        Parameters
        ----------
        sequence_ids
            Sequence per row ``[rows]`` or per place ``[rows, places]``; -1 drops the tokens (padding).
        positions
            Position in its sequence, ``[rows, places]``.
        domains
            Domain index per row or per place.
        shape
            (rows, places) that the routers see, where the model's inputs do not tell: a part of the batch on
            one of several parallel ranks, or inputs of a form of their own.

        Raises
        ------
        InputError
            By a forward pass whose batch has another shape.
        """
        label = partial(given_labels, sequence_ids, positions, domains)
        with self._passes.saying(label, shape):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside, an evaluation between training steps say."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """Record nothing until `resume`; pauses nest."""
        self._pauses += 1

    def resume(self) -> None:
        """Go on recording after `pause`.

        Raises
        ------
        InputError
            If the recorder is not paused.
        """
        if not self._pauses:
            raise InputError("the recorder is not paused; resume() ends a pause()")
        self._pauses -= 1

    def step(self) -> None:
        """End a step, for `every_steps`: call it after each optimizer step."""
        self._steps = self._steps + 1 if self._steps_are_told else 1
        self._steps_are_told = True

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `step` after each step of an optimizer, however many passes it accumulates."""
        self._steps_are_told, self._steps = True, 0
        handle = optimizer.register_step_post_hook(lambda *_: self.step())
        self._followed.callback(handle.remove)

    def stop_on_signals(self, *numbers: int) -> Self:
        """Close on a signal before it takes its usual course; by default SIGTERM and SIGINT.

        What was recorded is flushed, then the handler that was there before is called, or the signal
        is raised again: it is never swallowed. Handlers are put back by `close`.

        Raises
        ------
        InputError
            Outside the main thread, where Python does not take signal handlers.
        """
        self._guard.install(numbers or (signals.SIGTERM, signals.SIGINT))
        return self

    def flush(self) -> None:
        """Hand what was recorded so far to the sink."""
        with self._writing():
            self._flush()

    def close(self) -> None:
        """Take the hooks off, flush and close the sink; closing twice does nothing."""
        if self._closed or os.getpid() != self._pid:  # a forked child must not write its parent's shard
            return
        self._closed = True
        self._detach()
        try:
            with self._writing():
                try:
                    self._flush()
                finally:
                    self._sink.close()
        finally:
            self._writer.drop()
            self._guard.remove()

    def __enter__(self) -> Self:
        """Return the recorder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; what was recorded before a failure is kept."""
        self.close()

    def _detach(self) -> None:
        atexit.unregister(self.close)
        self._followed.close()
        self._hooks.remove()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Put signals off, and treat a failure as the caller chose."""
        try:
            with self._guard.held():
                yield
        except FAILURES as exc:
            self._fail(exc)

    def _fail(self, exc: Exception) -> None:
        """Let a failure through, or end the recording with a warning, as the caller chose."""
        if self._on_error == "raise":
            raise exc
        self._give_up(exc)

    def _give_up(self, exc: Exception) -> None:
        if self._error is not None:
            return
        self._pending, self._error = [], exc
        self._writer.drop()
        if not self._closed:
            self._closed = True
            self._detach()
            with suppress(*FAILURES):  # the first failure is the one to tell
                self._sink.close()
            self._guard.remove()
        warnings.warn(
            f"recording stopped, the model goes on: {exc} ({self._num_tokens} tokens were handed over, "
            f"up to {self._num_taken - self._num_written} are lost)",
            RecordingStopped,
            stacklevel=2,
        )

    def _is_due(self) -> bool:
        """Whether the pass that begins is to be recorded."""
        if self._pauses:
            return False
        due = self._steps % self._sampling.every_steps == 0
        if not self._steps_are_told:
            self._steps += 1
        return due

    def _take(self, done: ForwardPass, num_places: int) -> None:
        with self._guard.held():
            self._writer.check()
            if not self._leaves(done):
                self._num_dropped += num_places
                return
            self._pending.append(done)
            self._pending_tokens += num_places
            self._num_taken += num_places
            if self._pending_tokens >= self._flush_tokens:
                self._send()

    def _leaves(self, done: ForwardPass) -> bool:
        """Let a pass leave the device, where there is a ring for it; `False` if it is dropped."""
        ids = done.experts_LPK
        if self._ring is None and ids is not None and ids.is_cuda:
            self._ring = PinnedRing(transfer_from(ids.device))
        if self._ring is None or done.leave(self._ring):
            return True
        self._send()  # what waits holds room that only writing gives back
        while self._when_full == "wait":
            # An empty ring takes any pass, so there is a job to wait for as long as this one finds no room.
            if not self._writer.wait_for_one():
                raise InputError("the ring is full of what others put there; give each recorder its own")
            if done.leave(self._ring):
                return True
        return False

    def _send(self) -> None:
        """Have what was recorded so far written: here, or in the background where passes leave by a ring."""
        if self._ring is None:
            self._flush()
            return
        pending, self._pending, self._pending_tokens = self._pending, [], 0
        if pending:
            self._writer.submit(partial(self._write, pending))

    def _flush(self) -> None:
        self._writer.wait_for_all()
        pending, self._pending, self._pending_tokens = self._pending, [], 0
        if pending:
            self._write(pending)

    def _write(self, pending: Sequence[ForwardPass]) -> None:
        try:
            for one in pending:
                one.arrive()
            names = [self._numbering.name(one, one.rows) for one in pending if one.rows is not None]
            kept_P, sequence_T, position_T, domain_T = map(np.concatenate, zip(*names, strict=True))
            self._hand_over(_experts_of(pending)[kept_P], sequence_T, position_T, domain_T)
        finally:
            for one in pending:
                one.let_go()
        self._num_written += len(kept_P)

    def _hand_over(
        self, experts_TLK: ExpertArray, sequence_T: IntArray, position_T: IntArray, domain_T: IntArray
    ) -> None:
        chosen_T = np.flatnonzero(kept_sequences(sequence_T, self._sampling.sequences, rank=self._rank))
        every, seen = self._sampling.every_tokens, self._num_seen
        self._num_seen += len(chosen_T)
        chosen_T = chosen_T[-seen % every :: every]
        if not len(chosen_T):
            return
        whole = len(chosen_T) == len(experts_TLK)
        if not whole:
            experts_TLK, domain_T = experts_TLK[chosen_T], domain_T[chosen_T]
            sequence_T, position_T = sequence_T[chosen_T], position_T[chosen_T]
        if self._family.may_lack_experts:
            self._check_whole(experts_TLK)
        self._sink.append(
            experts_TLK,
            sequence_T=sequence_T,
            position_T=position_T,
            domain_T=domain_T if (domain_T != UNKNOWN_DOMAIN).any() else None,
        )
        self._num_tokens += len(experts_TLK)

    def _check_whole(self, experts_TLK: ExpertArray) -> None:
        lacking_TL = (experts_TLK == self._num_experts).any(axis=2)
        if lacking_TL.any():
            raise InputError(
                f"{int(lacking_TL.any(axis=1).sum())} of {len(experts_TLK)} tokens have another number of "
                "experts than top-k (dropped by a capacity limit?); record without dropping tokens"
            )


def find_family(model: nn.Module, family: ModelFamily | str | None) -> ModelFamily:
    """Return a family given, named, or else found out from the model.

    Raises
    ------
    InputError
        If there is no such family, or none is known for the model.
    """
    if family is None:
        return family_of(model)
    return family_named(family) if isinstance(family, str) else family


def _experts_of(passes: Sequence[ForwardPass]) -> ExpertArray:
    """Expert ids of all places of these passes, ``[places, layers, k]``."""
    held = [one.experts_LPK for one in passes if one.experts_LPK is not None]
    joined_LPK = torch.cat(held, dim=1).cpu().numpy()
    # Torch computes little with uint16, so ids over 255 travel as int16 of the same bits.
    ids_LPK: ExpertArray = joined_LPK.view(np.uint8 if joined_LPK.itemsize == 1 else np.uint16)
    return ids_LPK.swapaxes(0, 1)
