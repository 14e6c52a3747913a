"""Records which experts a model's routers select, by forward hooks that leave the model alone.

During a forward pass the hooks only keep references; ids leave the device as one or two bytes each, in
whole batches, when the buffer is full. Off means no hook at all (`NullRecorder`).

Shape letters: B rows of a batch, N token places of a row (padding included), P places of all rows,
T recorded tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from placement.errors import InputError, PlacementError
from placement.runtime.checkpoint import TextSequence, load_checkpoint, read_sequences
from placement.runtime.families.registry import family_of, moe_layers_of
from traces.trace import UNKNOWN_DOMAIN, Trace

__all__ = [
    "MemorySink",
    "NullRecorder",
    "RecordReport",
    "Recorder",
    "TraceSink",
    "record_text",
    "recorder_for",
]

IntArray = npt.NDArray[np.int64]
ExpertArray = npt.NDArray[np.unsignedinteger[Any]]
Progress = Callable[[int, int], None]

FLUSH_TOKENS = 1 << 14
"""Tokens after which what was recorded is handed to the sink."""


class TraceSink(Protocol):
    """Takes recorded tokens; `traces.store.DatasetWriter` and `MemorySink` are two."""

    def append(
        self,
        experts_TLK: ExpertArray,
        *,
        sequence_T: IntArray,
        position_T: IntArray,
        domain_T: IntArray | None,
    ) -> None:
        """Add tokens, in recorded order."""
        ...

    def close(self) -> None:
        """Finish; nothing is appended afterwards."""
        ...


class MemorySink:
    """Keeps recorded tokens in memory.

    Parameters
    ----------
    num_experts, model_name, moe_layer_ids, domain_names
        As in `Trace`.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        model_name: str | None = None,
        moe_layer_ids: tuple[int, ...] | None = None,
        domain_names: tuple[str, ...] = (),
    ) -> None:
        self._header: dict[str, Any] = {
            "num_experts": num_experts,
            "model_name": model_name,
            "moe_layer_ids": moe_layer_ids,
            "domain_names": domain_names,
        }
        self._batches: list[tuple[ExpertArray, IntArray, IntArray, IntArray]] = []

    def append(
        self,
        experts_TLK: ExpertArray,
        *,
        sequence_T: IntArray,
        position_T: IntArray,
        domain_T: IntArray | None,
    ) -> None:
        """Add tokens, in recorded order."""
        domains_T = np.full_like(sequence_T, UNKNOWN_DOMAIN) if domain_T is None else domain_T
        self._batches.append((experts_TLK, sequence_T, position_T, domains_T))

    def close(self) -> None:
        """Do nothing: the tokens stay readable."""

    def trace(self) -> Trace:
        """Return what was recorded.

        Raises
        ------
        InputError
            If nothing was.
        """
        if not self._batches:
            raise InputError("nothing was recorded: the model ran no token")
        experts_TLK, sequence_T, position_T, domain_T = map(np.concatenate, zip(*self._batches, strict=True))
        return Trace(
            experts_TLK=experts_TLK,
            sequence_T=sequence_T,
            position_T=position_T,
            domain_T=domain_T,
            **self._header,
        )


class _Rows:
    """Which sequence each row of a running batch belongs to; -1 until its first token is numbered."""

    def __init__(self, num_rows: int) -> None:
        self.sequence_B = np.full(num_rows, -1, dtype=np.int64)


@dataclass(kw_only=True, slots=True, eq=False)
class _Labels:
    """What the caller said about the tokens of a batch, each ``[rows, places]`` or `None`."""

    sequence_BN: IntArray | None
    position_BN: IntArray | None
    domain_BN: IntArray | None


@dataclass(kw_only=True, slots=True, eq=False)
class _Pass:
    """One forward pass: everything needed to name its tokens later, still on the device."""

    shape: tuple[int, int]
    past_tokens: int
    rows: _Rows
    kept_BN: torch.Tensor | None
    position_BN: torch.Tensor | None
    labels: _Labels
    cache: Any
    index_L: list[torch.Tensor | None]
    experts_LPK: torch.Tensor | None = None


class Recorder:
    """Forward hooks on a model's routers that hand every token's expert ids to a sink.

    Each row of a prefill is a new sequence; later passes with the same cache continue their rows'
    sequences; packed rows are cut where their positions start again. Padding (by a 2-D attention mask) is
    dropped. Ids are those of logical experts, also while a placement is applied.

    Parameters
    ----------
    model
        A transformers model of a supported family; it may be the bare decoder.
    sink
        Takes the tokens; closed with the recorder.
    sample_every
        Record one token in so many, all its layers; 1 records every token.
    flush_tokens
        Tokens after which the buffer is handed over.

    Raises
    ------
    InputError
        If the family is not supported, the model has no MoE layers, or a number is below 1.
    """

    def __init__(
        self, model: nn.Module, sink: TraceSink, *, sample_every: int = 1, flush_tokens: int = FLUSH_TOKENS
    ) -> None:
        if sample_every < 1 or flush_tokens < 1:
            raise InputError(
                f"sample_every {sample_every} and flush_tokens {flush_tokens} must be at least 1"
            )
        self._family, layers = family_of(model), moe_layers_of(model)
        self._sink = sink
        self._sample_every, self._flush_tokens = sample_every, flush_tokens
        self._id_dtype = torch.uint8 if layers[0].num_experts <= 256 else torch.int16
        self._num_layers = len(layers)
        self._running: _Pass | None = None
        self._pending: list[_Pass] = []
        self._pending_tokens = self._num_seen = self._num_tokens = self._num_sequences = 0
        self._labels: Callable[[tuple[int, int]], _Labels] = _no_labels
        self._rows_of: WeakKeyDictionary[Any, _Rows] = WeakKeyDictionary()
        self._closed = False
        decoder = getattr(model, "base_model", model)
        self._input_names = tuple(inspect.signature(decoder.forward).parameters)
        self._hooks = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end),
            # First in line: a placement's hook turns expert ids into slots, and those are not recorded.
            *(
                layer.router.register_forward_hook(partial(self._capture, index), prepend=True)
                for index, layer in enumerate(layers)
            ),
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens handed to the sink so far."""
        return self._num_tokens

    @property
    def num_sequences(self) -> int:
        """One more than the highest sequence number handed out or given so far."""
        return self._num_sequences

    @contextmanager
    def batch(
        self,
        *,
        sequence_ids: npt.ArrayLike | None = None,
        positions: npt.ArrayLike | None = None,
        domains: npt.ArrayLike | None = None,
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

        Raises
        ------
        InputError
            By a forward pass whose batch has another shape.
        """
        before = self._labels
        self._labels = partial(_given_labels, sequence_ids, positions, domains)
        try:
            yield
        finally:
            self._labels = before

    def flush(self) -> None:
        """Hand what was recorded so far to the sink."""
        pending, self._pending, self._pending_tokens = self._pending, [], 0
        if not pending:
            return
        names = [self._name_tokens(one) for one in pending]
        kept_P, sequence_T, position_T, domain_T = map(np.concatenate, zip(*names, strict=True))
        self._hand_over(_experts_of(pending)[kept_P], sequence_T, position_T, domain_T)

    def _hand_over(
        self, experts_TLK: ExpertArray, sequence_T: IntArray, position_T: IntArray, domain_T: IntArray
    ) -> None:
        chosen = slice(-self._num_seen % self._sample_every, None, self._sample_every)
        self._num_seen += len(experts_TLK)
        experts_TLK, domain_T = experts_TLK[chosen], domain_T[chosen]
        if not len(experts_TLK):
            return
        self._sink.append(
            experts_TLK,
            sequence_T=sequence_T[chosen],
            position_T=position_T[chosen],
            domain_T=domain_T if (domain_T != UNKNOWN_DOMAIN).any() else None,
        )
        self._num_tokens += len(experts_TLK)

    def close(self) -> None:
        """Take the hooks off, flush and close the sink; closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        try:
            self.flush()
        finally:
            self._sink.close()

    def __enter__(self) -> Self:
        """Return the recorder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; what was recorded before a failure is kept."""
        self.close()

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self._input_names, args, strict=False)), **kwargs} if args else kwargs
        shape, cache = _batch_shape(inputs), inputs.get("past_key_values")
        past_tokens = 0 if cache is None else int(cache.get_seq_length())
        rows = self._rows_of.get(cache) if past_tokens else None
        if rows is None or len(rows.sequence_B) != shape[0]:
            rows = _Rows(shape[0])
        labels = self._labels(shape)
        mask = inputs.get("attention_mask")
        counted_BN = None if mask is None else _mask_of_places(mask, past_tokens, shape, labels)
        self._running = _Pass(
            shape=shape,
            past_tokens=past_tokens,
            rows=rows,
            kept_BN=None if counted_BN is None else counted_BN[:, past_tokens:].clone(),
            position_BN=_positions(inputs.get("position_ids"), counted_BN, past_tokens, shape),
            labels=labels,
            cache=cache,
            index_L=[None] * self._num_layers,
        )

    def _capture(self, layer: int, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # None outside a forward pass of the model: gradient checkpointing runs layers again on their own.
        if self._running is not None:
            self._running.index_L[layer] = self._family.read_top_k(output)

    def _end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        done, self._running = self._running, None
        if done is None:
            return
        index_L = [index for index in done.index_L if index is not None]
        if len(index_L) < self._num_layers:
            raise InputError(
                f"{len(index_L)} of the {self._num_layers} MoE layers ran, so no token can be recorded"
            )
        device = index_L[0].device
        done.experts_LPK = torch.stack([index.to(device) for index in index_L]).to(self._id_dtype)
        done.index_L = []
        cache = done.cache if done.cache is not None else _cache_in(output)
        done.cache = None
        if cache is not None:
            self._rows_of[cache] = done.rows
        self._pending.append(done)
        self._pending_tokens += done.shape[0] * done.shape[1]
        if self._pending_tokens >= self._flush_tokens:
            self.flush()

    def _name_tokens(self, one: _Pass) -> tuple[npt.NDArray[np.bool_], IntArray, IntArray, IntArray]:
        """Which places of a pass are kept, and sequence, position and domain of those."""
        labels = one.labels
        kept_BN = np.ones(one.shape, dtype=bool) if one.kept_BN is None else one.kept_BN.cpu().numpy()
        if labels.sequence_BN is not None:
            kept_BN = kept_BN & (labels.sequence_BN >= 0)
        row_T = np.nonzero(kept_BN)[0]
        position_T = _inferred_or_given_positions(one)[kept_BN]
        if labels.sequence_BN is None:
            sequence_T = self._number_sequences(one, row_T, position_T)
        else:
            sequence_T = labels.sequence_BN[kept_BN]
        one.rows.sequence_B[row_T] = sequence_T
        self._num_sequences = max(self._num_sequences, int(sequence_T.max(initial=-1)) + 1)
        domain_T = (
            np.full_like(row_T, UNKNOWN_DOMAIN) if labels.domain_BN is None else labels.domain_BN[kept_BN]
        )
        return kept_BN.ravel(), sequence_T, position_T, domain_T

    def _number_sequences(self, one: _Pass, row_T: IntArray, position_T: IntArray) -> IntArray:
        """Sequence of each token: its row's, or a new one where a row or a packed sequence starts."""
        rows = one.rows
        if one.shape[1] == 1 and (rows.sequence_B >= 0).all():  # a decode step: the usual case by far
            return rows.sequence_B[row_T]
        place_T = np.arange(row_T.size)
        first_of_row_T = np.diff(row_T, prepend=-1) > 0
        starts_T = np.where(first_of_row_T, rows.sequence_B[row_T] < 0, np.diff(position_T, prepend=0) <= 0)
        last_start_T = np.maximum.accumulate(np.where(starts_T, place_T, -1))
        row_start_T = np.maximum.accumulate(np.where(first_of_row_T, place_T, 0))
        new_T = self._num_sequences + np.cumsum(starts_T) - 1
        return np.where(last_start_T < row_start_T, rows.sequence_B[row_T], new_T)


class NullRecorder:
    """A recorder that is off: it touches neither the model nor the disk."""

    num_tokens = 0
    num_sequences = 0

    @contextmanager
    def batch(
        self,
        *,
        sequence_ids: npt.ArrayLike | None = None,
        positions: npt.ArrayLike | None = None,
        domains: npt.ArrayLike | None = None,
    ) -> Iterator[None]:
        """Do nothing."""
        yield

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        """Return the recorder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing."""


def recorder_for(
    model: nn.Module,
    path: str | Path | None,
    *,
    model_name: str | None = None,
    domain_names: Sequence[str] = (),
    rank: int | None = None,
    sample_every: int = 1,
    overwrite: bool = False,
) -> Recorder | NullRecorder:
    """Return a recorder into the data set `path`, or one that does nothing if `path` is `None`.

    Parameters
    ----------
    model_name
        Name kept with the trace; by default that of the folder the model was loaded from.
    domain_names
        Names that the domain indices of `Recorder.batch` stand for.
    rank
        Process rank whose shard is written; by default that of torch.distributed, else of the
        launcher's RANK, else 0.
    sample_every
        Record one token in so many.
    overwrite
        Replace a data set that is there (single process only).

    Raises
    ------
    InputError
        If the model is not supported or the data set cannot be written.
    """
    if path is None:
        return NullRecorder()
    header = _header_of(model, model_name or _name_of(model), domain_names)
    sink = _dataset_sink(
        model, Path(path), header, rank=_process_rank() if rank is None else rank, overwrite=overwrite
    )
    return Recorder(model, sink, sample_every=sample_every)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordReport:
    """What a recording run wrote.

    Parameters
    ----------
    path
        Data set folder or ``.npz`` file.
    num_tokens, num_sequences
        Tokens in it, and sequences that were run.
    num_layers, num_experts, top_k
        Shape of the routing.
    domain_names
        Stems of the text files.
    interrupted
        Whether Ctrl-C ended it before the end of the text.
    """

    path: Path
    num_tokens: int
    num_sequences: int
    num_layers: int
    num_experts: int
    top_k: int
    domain_names: tuple[str, ...]
    interrupted: bool


def record_text(
    model_dir: Path,
    text_files: Sequence[Path],
    out: Path,
    *,
    context: int | None = None,
    batch_size: int = 8,
    sample_every: int = 1,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RecordReport:
    """Run a model over text files and write down its routing; Ctrl-C keeps what was recorded.

    Files come one after the other; each one's stem is its domain, and sequences are numbered over all
    files.

    Parameters
    ----------
    out
        A data set folder, or a file if the name ends in ``.npz``.
    context
        Tokens per sequence at most; `None` means the model's context.
    batch_size
        Sequences per forward pass.
    sample_every
        Record one token in so many.
    overwrite
        Replace a data set or file that is there.
    progress
        Called with (tokens run, tokens in all) after each batch.

    Raises
    ------
    InputError
        On a bad checkpoint, text, option or output.
    PlacementError
        If it was interrupted before any token was recorded; nothing is left behind.
    """
    if batch_size < 1:
        raise InputError(f"a batch of {batch_size} sequences; it must be at least 1")
    as_file = out.suffix == ".npz"
    if as_file:
        _check_npz_output(out, overwrite=overwrite)
    sequences = read_sequences(model_dir, text_files, max_length=context)
    model = load_checkpoint(model_dir, device=device)
    domain_names = tuple(dict.fromkeys(file.stem for file in text_files))
    header = _header_of(model, model_dir.resolve().name, domain_names)
    was_there = out.exists()
    memory = MemorySink(**header)
    sink = memory if as_file else _dataset_sink(model, out, header, rank=0, overwrite=overwrite)
    with Recorder(model, sink, sample_every=sample_every) as recorder:
        interrupted = _run_all(model, recorder, sequences, domain_names, batch_size, progress)
    if not recorder.num_tokens:
        _leave_nothing(out, was_there=was_there)
    if as_file:
        _write_npz(memory.trace(), out)
    layer = moe_layers_of(model)[0]
    return RecordReport(
        path=out,
        num_tokens=recorder.num_tokens,
        num_sequences=recorder.num_sequences,
        num_layers=len(header["moe_layer_ids"]),
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        domain_names=domain_names,
        interrupted=interrupted,
    )


def _header_of(model: nn.Module, model_name: str, domain_names: Sequence[str]) -> dict[str, Any]:
    """What every sink is told about the recording, beside its shape."""
    layers = moe_layers_of(model)
    return {
        "num_experts": layers[0].num_experts,
        "model_name": model_name,
        "moe_layer_ids": tuple(layer.decoder_layer for layer in layers),
        "domain_names": tuple(domain_names),
    }


def _dataset_sink(
    model: nn.Module, path: Path, header: dict[str, Any], *, rank: int, overwrite: bool
) -> TraceSink:
    from traces.store import DatasetWriter

    layers = moe_layers_of(model)
    return DatasetWriter(
        path, num_layers=len(layers), top_k=layers[0].top_k, rank=rank, overwrite=overwrite, **header
    )


def _run_all(
    model: nn.Module,
    recorder: Recorder | NullRecorder,
    sequences: Sequence[TextSequence],
    domain_names: tuple[str, ...],
    batch_size: int,
    progress: Progress | None,
) -> bool:
    """Run every sequence; return whether Ctrl-C ended it early."""
    total = sum(len(sequence.tokens_T) for sequence in sequences)
    done = 0
    try:
        for start in range(0, len(sequences), batch_size):
            rows = sequences[start : start + batch_size]
            domains = [domain_names.index(row.file.stem) for row in rows]
            with recorder.batch(sequence_ids=np.arange(start, start + len(rows)), domains=domains):
                _run_batch(model, rows)
            done += sum(len(row.tokens_T) for row in rows)
            if progress is not None:
                progress(done, total)
    except KeyboardInterrupt:
        return True
    return False


def _run_batch(model: nn.Module, rows: Sequence[TextSequence]) -> None:
    """Run the decoder alone, rows padded on the right: the logits are not needed."""
    lengths = [len(row.tokens_T) for row in rows]
    input_ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, one in enumerate(rows):
        input_ids[row, : lengths[row]] = torch.from_numpy(one.tokens_T)
        mask[row, : lengths[row]] = 1
    device = next(model.parameters()).device
    padded = min(lengths) < max(lengths)
    with torch.inference_mode():
        getattr(model, "base_model", model)(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device) if padded else None,
            use_cache=False,
        )


def _check_npz_output(out: Path, *, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: there is no folder {out.parent}")
    if out.exists() and not overwrite:
        raise InputError(f"{out} is there already; choose another output or overwrite it")


def _write_npz(trace: Trace, out: Path) -> None:
    from traces.store import write_npz

    write_npz(trace, out)


def _leave_nothing(out: Path, *, was_there: bool) -> NoReturn:
    """Take away the folder of a data set that got no token."""
    from traces.store import clear_dataset

    if out.is_dir():
        clear_dataset(out)
        if not was_there:
            out.rmdir()
    raise PlacementError("interrupted before any token was recorded; nothing was written")


def _cache_in(output: Any) -> Any:
    """Return the cache that the model made itself and returns, in an object or a plain tuple."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def _experts_of(passes: Sequence[_Pass]) -> ExpertArray:
    """Expert ids of all places of these passes, ``[places, layers, k]``."""
    held = [one.experts_LPK for one in passes if one.experts_LPK is not None]
    joined_LPK = torch.cat(held, dim=1).cpu().numpy()
    # Torch computes little with uint16, so ids over 255 travel as int16 of the same bits.
    ids_LPK: ExpertArray = joined_LPK.view(np.uint8 if joined_LPK.itemsize == 1 else np.uint16)
    return ids_LPK.swapaxes(0, 1)


def _batch_shape(inputs: dict[str, Any]) -> tuple[int, int]:
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    if tokens is None:
        raise InputError("a forward pass without input_ids or inputs_embeds cannot be recorded")
    return int(tokens.shape[0]), int(tokens.shape[1])


def _mask_of_places(
    mask: Any, past_tokens: int, shape: tuple[int, int], labels: _Labels
) -> torch.Tensor | None:
    """Real (not padded) places of the past and this pass, bool ``[rows, past + places]``."""
    rows, places = shape
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= past_tokens + places:
        return mask[:, : past_tokens + places] != 0
    if labels.sequence_BN is not None:
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


def _inferred_or_given_positions(one: _Pass) -> IntArray:
    if one.labels.position_BN is not None:
        return one.labels.position_BN
    if one.position_BN is not None:
        position_BN: IntArray = one.position_BN.cpu().numpy()
        return position_BN
    return np.broadcast_to(one.past_tokens + np.arange(one.shape[1]), one.shape)


def _no_labels(shape: tuple[int, int]) -> _Labels:
    return _Labels(sequence_BN=None, position_BN=None, domain_BN=None)


def _given_labels(
    sequence_ids: npt.ArrayLike | None,
    positions: npt.ArrayLike | None,
    domains: npt.ArrayLike | None,
    shape: tuple[int, int],
) -> _Labels:
    return _Labels(
        sequence_BN=_fitted("sequence_ids", sequence_ids, shape),
        position_BN=_fitted("positions", positions, shape, per_row=False),
        domain_BN=_fitted("domains", domains, shape),
    )


def _fitted(
    name: str, values: npt.ArrayLike | None, shape: tuple[int, int], *, per_row: bool = True
) -> IntArray | None:
    """Labels as ``[rows, places]``, given so or, where that makes sense, one per row."""
    if values is None:
        return None
    given = np.asarray(values)
    if given.dtype.kind not in "iu":
        raise InputError(f"{name} holds {given.dtype} values, not integers")
    if per_row and given.shape == shape[:1]:
        given = given[:, None]
    elif given.shape != shape:
        raise InputError(f"{name} has shape {given.shape}, the batch {shape[0]} rows of {shape[1]} places")
    return np.broadcast_to(given.astype(np.int64), shape)


def _name_of(model: nn.Module) -> str:
    config: Any = model.config
    return Path(getattr(config, "_name_or_path", "") or config.model_type).name


def _process_rank() -> int:
    """Rank of this process; a launcher may set RANK long before torch.distributed starts."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal():
        raise InputError(f"RANK={rank!r} is not a process rank; unset it or give rank=...")
    return int(rank)
