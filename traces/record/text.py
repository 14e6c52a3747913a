"""Records a checkpoint over text files: the prompts, and tokens generated after them if asked for.

Shape letters: B rows of a batch, N token places of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from placement.errors import InputError, PlacementError
from placement.runtime.checkpoint import TextSequence, load_checkpoint, read_config, read_sequences
from placement.runtime.families.protocol import ModelFamily
from placement.runtime.families.registry import check_layers, family_of
from traces.record.dataset import dataset_sink, header_of
from traces.record.recorder import Recorder
from traces.record.sinks import MemorySink, TraceSink
from traces.trace import Trace

__all__ = ["Progress", "RecordReport", "record_text"]

Progress = Callable[[int, int], None]


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
    generate: int = 0,
    seed: int = 0,
    sample_every: int = 1,
    sample_sequences: float = 1.0,
    family: ModelFamily | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    append: bool = False,
    resume: bool = False,
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
        Tokens per sequence at most; `None` means the model's context, less what is generated.
    batch_size
        Sequences per forward pass.
    generate
        Tokens to generate after each sequence, one pass each with a cache: decode traffic. They are drawn
        from the model's distribution, and run through the model themselves.
    seed
        Seed of the generated tokens.
    sample_every, sample_sequences
        As in `Recorder`.
    family
        How to find the routers of a model that has no adapter.
    overwrite
        Replace a data set or file that is there.
    append
        Add to a data set that is there, with sequence numbers of its own.
    resume
        Go on with the same recording after it was interrupted: sequences that are there, if only in part, are
        not run again.
    progress
        Called with (tokens run, tokens in all) after each batch.

    Raises
    ------
    InputError
        On a bad checkpoint, text, option or output.
    PlacementError
        If it was interrupted before any token was recorded; nothing is left behind.
    """
    modes = [name for name, on in (("overwrite", overwrite), ("append", append), ("resume", resume)) if on]
    _check_options(out, modes, batch_size=batch_size, generate=generate)
    known = family is None
    length = _prompt_length(model_dir, context, generate, known=known)
    sequences = read_sequences(model_dir, text_files, max_length=length, known_family=known)
    model = load_checkpoint(model_dir, device=device, known_family=known)
    family = family or family_of(model)
    layers = check_layers(family, family.moe_layers(model))
    domain_names = tuple(dict.fromkeys(file.stem for file in text_files))
    header = header_of(layers, model_dir.resolve().name, domain_names)
    was_there = out.exists()
    memory = MemorySink(**header)
    sink: TraceSink = memory
    first = 0
    if out.suffix != ".npz":
        sink, first = dataset_sink(
            layers, out, header, rank=0, overwrite=overwrite, append=append, resume=resume
        )
    run = _Run(model=model, family=family, generate=generate, seed=seed, offset=0 if resume else first)
    sampling: dict[str, Any] = {"sample_every": sample_every, "sample_sequences": sample_sequences}
    with Recorder(model, sink, family=family, first_sequence=first, **sampling) as recorder:
        start = first if resume else 0
        interrupted = _run_all(run, recorder, sequences, start, domain_names, batch_size, progress)
    if not recorder.num_tokens and not (append or resume):
        _leave_nothing(out, was_there=was_there, interrupted=interrupted)
    if out.suffix == ".npz":
        _write_npz(memory.trace(), out)
    return RecordReport(
        path=out,
        num_tokens=recorder.num_tokens,
        num_sequences=recorder.num_sequences,
        num_layers=len(layers),
        num_experts=layers[0].num_experts,
        top_k=layers[0].top_k,
        domain_names=domain_names,
        interrupted=interrupted,
    )


def _check_options(out: Path, modes: Sequence[str], *, batch_size: int, generate: int) -> None:
    if batch_size < 1:
        raise InputError(f"a batch of {batch_size} sequences; it must be at least 1")
    if generate < 0:
        raise InputError(f"{generate} tokens to generate; it must be 0 or more")
    if len(modes) > 1:
        raise InputError(f"{out}: {' and '.join(modes)} exclude each other; choose one")
    if out.suffix != ".npz":
        return
    if modes not in ([], ["overwrite"]):
        raise InputError(f"{out} is one file, which cannot be continued; record into a folder to {modes[0]}")
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: there is no folder {out.parent}")
    if out.exists() and not modes:
        raise InputError(f"{out} is there already; choose another output or overwrite it")


def _prompt_length(model_dir: Path, context: int | None, generate: int, *, known: bool) -> int | None:
    """Tokens of a sequence, so that what is generated after it still fits the model's context."""
    if not generate:
        return context
    config: Any = read_config(model_dir, known_family=known).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return context
    if (context or 1) + generate > limit:
        raise InputError(
            f"{generate} tokens to generate after {context or 'at least 1'} of text exceed the model's "
            f"context of {limit}"
        )
    return context or int(limit) - generate


@dataclass(kw_only=True, slots=True, eq=False)
class _Run:
    """A model and what to do with each batch of text."""

    model: nn.Module
    family: ModelFamily
    generate: int
    seed: int
    offset: int


def _run_all(
    run: _Run,
    recorder: Recorder,
    sequences: Sequence[TextSequence],
    first: int,
    domain_names: tuple[str, ...],
    batch_size: int,
    progress: Progress | None,
) -> bool:
    """Run the sequences from the first on; return whether Ctrl-C ended it early."""
    total = sum(len(sequence.tokens_T) + run.generate for sequence in sequences[first:])
    done = 0
    try:
        for start in range(first, len(sequences), batch_size):
            rows = sequences[start : start + batch_size]
            domains = [domain_names.index(row.file.stem) for row in rows]
            numbers = run.offset + np.arange(start, start + len(rows))
            with recorder.batch(sequence_ids=numbers, domains=domains):
                _run_batch(run, rows, seed=run.seed + start)
            done += sum(len(row.tokens_T) + run.generate for row in rows)
            if progress is not None:
                progress(done, total)
    except KeyboardInterrupt:
        return True
    return False


def _run_batch(run: _Run, rows: Sequence[TextSequence], *, seed: int) -> None:
    """Run some sequences together, padded, and generate after them."""
    device = next(run.model.parameters()).device
    with torch.inference_mode():
        if run.generate:
            _generate(run, *_padded(rows, device, left=True), seed=seed)
            return
        ids_BN, mask_BN = _padded(rows, device, left=False)
        # The decoder alone: the logits are not needed.
        run.family.decoder(run.model)(
            input_ids=ids_BN, attention_mask=None if bool(mask_BN.all()) else mask_BN, use_cache=False
        )


def _generate(run: _Run, ids_BN: torch.Tensor, mask_BN: torch.Tensor, *, seed: int) -> None:
    """Prefill, then exactly so many decode steps for every row: an end of text does not end it."""
    generator = torch.Generator().manual_seed(seed)
    position_BN = (mask_BN.cumsum(dim=1) - 1).clamp(min=0)
    output = run.model(input_ids=ids_BN, attention_mask=mask_BN, position_ids=position_BN, use_cache=True)
    for _ in range(run.generate):
        share_BV = output.logits[:, -1].float().softmax(dim=-1).cpu()
        next_B1 = torch.multinomial(share_BV, 1, generator=generator).to(ids_BN.device)
        mask_BN = torch.cat([mask_BN, mask_BN.new_ones(len(mask_BN), 1)], dim=1)
        output = run.model(
            input_ids=next_B1,
            attention_mask=mask_BN,
            position_ids=mask_BN.sum(dim=1, keepdim=True) - 1,
            past_key_values=output.past_key_values,
            use_cache=True,
        )


def _padded(
    rows: Sequence[TextSequence], device: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of rows of different lengths, ``[rows, longest]``."""
    longest = max(len(row.tokens_T) for row in rows)
    ids_BN = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_BN = torch.zeros_like(ids_BN)
    for row, one in enumerate(rows):
        length = len(one.tokens_T)
        places = slice(longest - length, None) if left else slice(length)
        ids_BN[row, places] = torch.from_numpy(one.tokens_T)
        mask_BN[row, places] = 1
    return ids_BN.to(device), mask_BN.to(device)


def _write_npz(trace: Trace, out: Path) -> None:
    from traces.store import write_npz

    write_npz(trace, out)


def _leave_nothing(out: Path, *, was_there: bool, interrupted: bool) -> NoReturn:
    """Take away the folder of a data set that got no token."""
    from traces.store import clear_dataset

    if out.is_dir():
        clear_dataset(out)
        if not was_there:
            out.rmdir()
    if interrupted:
        raise PlacementError("interrupted before any token was recorded; nothing was written")
    raise InputError("no token was chosen by the sampling; nothing was written, record a larger share")
