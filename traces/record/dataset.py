"""A recorder into a data set: one line in somebody's own training or inference loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from placement.errors import InputError
from placement.runtime.families.protocol import ModelFamily, MoELayer
from placement.runtime.families.registry import check_layers, family_named, family_of
from placement.runtime.families.unwrap import unwrapped
from traces.record.null import NullRecorder
from traces.record.recorder import OnError, Recorder, WhenFull
from traces.record.sinks import TraceSink

__all__ = ["dataset_sink", "header_of", "recorder_for"]

_logger = logging.getLogger(__name__)


def recorder_for(
    model: nn.Module,
    path: str | Path | None,
    *,
    family: ModelFamily | str | None = None,
    model_name: str | None = None,
    domain_names: Sequence[str] = (),
    rank: int | None = None,
    sample_every: int = 1,
    sample_sequences: float = 1.0,
    every_steps: int = 1,
    overwrite: bool = False,
    append: bool = False,
    resume: bool = False,
    on_error: OnError = "stop-recording",
    when_full: WhenFull = "wait",
) -> Recorder | NullRecorder:
    """Return a recorder into the data set `path`, or one that does nothing if `path` is `None`.

    It is closed at the latest when the interpreter ends; `Recorder.stop_on_signals` covers signals. By
    default a failure of the recording (a full disk) ends the recording and not the run.

    Every process writes what its own routers see, as its rank. Ranks that run the same tokens (tensor
    parallel) would record them several times: give `path` in one of them and `None` in the others.

    Parameters
    ----------
    family
        How to find the routers, as in `Recorder`.
    model_name
        Name kept with the trace; by default that of the folder the model was loaded from.
    domain_names
        Names that the domain indices of `Recorder.batch` stand for.
    rank
        Process rank whose shard is written; by default that of torch.distributed, else of the
        launcher's RANK, else 0.
    sample_every, sample_sequences, every_steps, on_error, when_full
        As in `Recorder`.
    overwrite
        Replace a data set that is there. With torch.distributed every rank says so: rank 0 clears it, the
        others wait.
    append
        Continue this rank's data set if it is there; sequences are numbered on.
    resume
        Continue it also after a crash, which recovers what was spooled and not yet part of the data set.

    Raises
    ------
    InputError
        If the model is not supported or the data set cannot be written.
    """
    if path is None:
        return NullRecorder()
    rank = _process_rank() if rank is None else rank
    found = family_named(family) if isinstance(family, str) else family or family_of(model)
    layers = check_layers(found, found.moe_layers(model))
    header = header_of(layers, model_name or _name_of(model, found), domain_names)
    if overwrite and _world_size() > 1:
        _clear_once(path)
        overwrite = False
    sink, first_sequence = dataset_sink(
        layers, path, header, rank=rank, overwrite=overwrite, append=append, resume=resume
    )
    return Recorder(
        model,
        sink,
        family=found,
        sample_every=sample_every,
        sample_sequences=sample_sequences,
        every_steps=every_steps,
        rank=rank,
        first_sequence=first_sequence,
        on_error=on_error,
        when_full=when_full,
    )


def header_of(layers: Sequence[MoELayer], model_name: str, domain_names: Sequence[str]) -> dict[str, Any]:
    """What every sink is told about the recording, beside its shape."""
    return {
        "num_experts": layers[0].num_experts,
        "model_name": model_name,
        "moe_layer_ids": tuple(layer.decoder_layer for layer in layers),
        "domain_names": tuple(domain_names),
    }


def dataset_sink(
    layers: Sequence[MoELayer],
    path: str | Path,
    header: dict[str, Any],
    *,
    rank: int,
    overwrite: bool,
    append: bool = False,
    resume: bool = False,
) -> tuple[TraceSink, int]:
    """Open a data set for recorded tokens of these layers; also return its first free sequence number.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    from traces.store import DatasetWriter

    shape: dict[str, Any] = {"num_layers": len(layers), "top_k": layers[0].top_k, **header}
    writer = DatasetWriter(path, rank=rank, overwrite=overwrite, append=append, resume=resume, **shape)
    if writer.recovered is not None:
        _logger.warning("%s: %s", path, writer.recovered)
        writer.flush()  # what was recovered has sequence numbers too
    return writer, writer.next_sequence if append or resume else 0


def _clear_once(path: str | Path) -> None:
    """Remove an old data set in one process before any opens the new one."""
    from traces.store import clear_dataset

    try:
        if torch.distributed.get_rank() == 0:
            clear_dataset(path)
    finally:
        torch.distributed.barrier()


def _name_of(model: nn.Module, family: ModelFamily) -> str:
    config: Any = getattr(unwrapped(model), "config", None)
    return Path(getattr(config, "_name_or_path", "") or family.model_type).name


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _process_rank() -> int:
    """Rank of this process; a launcher may set RANK long before torch.distributed starts."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal():
        raise InputError(f"RANK={rank!r} is not a process rank; unset it or give rank=...")
    return int(rank)
