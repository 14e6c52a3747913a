"""Writes traces of any format as recorded data sets: several sources joined, block by block, whole or not at
all.

Shape letters: W windows, L layers, E experts, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from placement.errors import InputError
from traces.counts import ExpertCounts
from traces.files import writing, writing_whole
from traces.source import BLOCK_TOKENS, TraceHeader, TraceSource, check_token_range, read_all
from traces.trace import UNKNOWN_DOMAIN, Trace, joined

__all__ = ["JoinedSource", "WriteReport", "write_counts", "write_source"]

Progress = Callable[[int], None]


class JoinedSource:
    """Sources one after the other as one, each in its own domain if it is given one.

    Sequences are numbered on, so that none of two sources become one; sources keep the ranks that they have.

    Parameters
    ----------
    sources
        Names, for messages, and sources of the same model.
    domains
        Domain of each source's tokens, in place of those it has; `None` keeps them.

    Raises
    ------
    InputError
        If there is no source, or they differ in shape, model or layers.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, TraceSource]],
        *,
        domains: Sequence[str | None] | None = None,
    ) -> None:
        if not sources:
            raise InputError("no trace is given; name one or more")
        self._sources = list(sources)
        self._domains = [None] * len(sources) if domains is None else list(domains)
        first, header = sources[0][0], _without_domains(sources[0][1].header)
        for name, source in sources[1:]:
            difference = header.difference(_without_domains(source.header))
            if difference:
                raise InputError(
                    f"{name}: is another model's than {first} ({difference}); name the model with --model"
                )
        names = dict.fromkeys(
            each
            for (_, source), domain in zip(self._sources, self._domains, strict=True)
            for each in (source.header.domain_names if domain is None else (domain,))
        )
        self.header = replace(header, domain_names=tuple(names))
        self.num_tokens = sum(source.num_tokens for _, source in sources)

    @cached_property
    def digest(self) -> str:
        """``"sha256:..."`` of the content; reads everything once."""
        from traces.importers.records import content_digest

        return content_digest(self)

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield tokens in blocks; see `TraceSource.blocks`.

        Sequences are numbered on from those that were read, so that a range from the middle reads as a trace
        of its own.
        """
        start, stop = check_token_range(start, stop, self.num_tokens)
        waiting: list[Trace] = []
        room = max_tokens
        for trace in self._parts(start, stop, max_tokens):
            taken = 0
            while taken < trace.num_tokens:
                end = min(trace.num_tokens, taken + room)
                waiting.append(trace.select_tokens(slice(taken, end)))
                room, taken = room - (end - taken), end
                if not room:
                    yield joined(waiting)
                    waiting, room = [], max_tokens
        if waiting:
            yield joined(waiting)

    def _parts(self, start: int, stop: int, max_tokens: int) -> Iterator[Trace]:
        before = next_sequence = 0
        for (_, source), domain in zip(self._sources, self._domains, strict=True):
            low, high = max(start - before, 0), min(stop - before, source.num_tokens)
            before += source.num_tokens
            if low >= high:
                continue
            first_sequence = next_sequence
            for block in source.blocks(low, high, max_tokens=max_tokens):
                part = self._shown(block, domain, first_sequence)
                if part.sequence_T is not None:
                    next_sequence = max(next_sequence, int(part.sequence_T.max()) + 1)
                yield part

    def _shown(self, block: Trace, domain: str | None, first_sequence: int) -> Trace:
        """Return a block with the domains and sequence numbers of the whole."""
        names = self.header.domain_names
        domain_T = block.domain_T
        if domain is not None:
            domain_T = np.full(block.num_tokens, names.index(domain))
        elif domain_T is not None and block.domain_names != names:
            place = np.array([*(names.index(name) for name in block.domain_names), UNKNOWN_DOMAIN])
            domain_T = place[domain_T]
        sequence_T = None if block.sequence_T is None else block.sequence_T + first_sequence
        return Trace.trusted(
            experts_TLK=block.experts_TLK,
            num_experts=block.num_experts,
            sequence_T=sequence_T,
            position_T=block.position_T,
            rank_T=block.rank_T,
            domain_T=domain_T,
            domain_names=names,
            model_name=block.model_name,
            moe_layer_ids=block.moe_layer_ids,
        )


def _without_domains(header: TraceHeader) -> TraceHeader:
    return replace(header, domain_names=())


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReport:
    """What was written.

    Parameters
    ----------
    path
        Data set or file.
    header
        What its tokens have in common.
    num_tokens
        Tokens that were written now.
    interrupted
        Whether Ctrl-C ended it early; what is written is valid.
    """

    path: str
    header: TraceHeader
    num_tokens: int
    interrupted: bool = False


def write_source(
    source: TraceSource,
    out: str | Path,
    *,
    overwrite: bool = False,
    append: bool = False,
    progress: Progress | None = None,
) -> WriteReport:
    """Write a source as a recorded data set, or as a NumPy archive if `out` ends in ``.npz``.

    A data set takes the memory of a fragment, an archive that of the whole trace. It appears under its name
    when it is complete, or when Ctrl-C ended it; where the source is damaged nothing is left of it. Appending
    goes straight into the data set, which keeps what was appended before a failure; so does writing to a URL.

    Parameters
    ----------
    source
        What to write.
    out
        Folder or URL of the data set, or a file.
    overwrite, append
        Replace a data set or archive that is there, or go on in it; otherwise it is an error.
    progress
        Called with the tokens written so far.

    Raises
    ------
    InputError
        If the source is damaged, or `out` is there already or cannot be written.
    """
    if overwrite and append:
        raise InputError("--overwrite and --append contradict each other; give one of them")
    if str(out).endswith(".npz"):
        return _write_archive(source, Path(out), overwrite=overwrite, append=append)
    if append or "://" in str(out):
        return _fill(source, out, str(out), overwrite=overwrite, append=append, progress=progress)
    return _write_folder(source, Path(out), overwrite=overwrite, progress=progress)


def _write_archive(source: TraceSource, out: Path, *, overwrite: bool, append: bool) -> WriteReport:
    from traces.store import write_npz

    if append:
        raise InputError(f"{out}: nothing can be appended to an archive; write a data set (a folder)")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: is there already; choose another output or --overwrite it")
    write_npz(read_all(source), out)
    return WriteReport(path=str(out), header=source.header, num_tokens=source.num_tokens)


def _write_folder(
    source: TraceSource, out: Path, *, overwrite: bool, progress: Progress | None
) -> WriteReport:
    from traces.store import clear_dataset

    with writing(out):
        if out.exists() and not out.is_dir():
            raise InputError(
                f"{out}: is a file; choose a folder for the data set, or a name that ends in .npz"
            )
        if not overwrite and out.exists() and any(out.iterdir()):
            raise InputError(
                f"{out}: is not empty; choose another output, --overwrite a data set or --append to it"
            )
        partial = out.absolute().parent / f".{out.name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        try:
            report = _fill(source, partial, str(out), overwrite=True, append=False, progress=progress)
            clear_dataset(out)
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except BaseException:
            clear_dataset(partial)
            partial.rmdir()
            raise
    return report


def _fill(
    source: TraceSource,
    out: str | Path,
    name: str,
    *,
    overwrite: bool,
    append: bool,
    progress: Progress | None,
) -> WriteReport:
    from traces.store import DatasetWriter

    header = source.header
    done = 0
    interrupted = False
    with DatasetWriter(
        out,
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        top_k=header.top_k,
        model_name=header.model_name,
        moe_layer_ids=header.moe_layer_ids,
        domain_names=header.domain_names,
        overwrite=overwrite,
        append=append,
        spool=False,
        provenance={"imported": True},
    ) as writer:
        shift = writer.next_sequence if append else 0
        try:
            for block in source.blocks():
                writer.append_trace(_shifted(block, shift))
                done += block.num_tokens
                if progress is not None:
                    progress(done)
        except KeyboardInterrupt:
            if not done:
                raise
            interrupted = True
    return WriteReport(path=name, header=header, num_tokens=done, interrupted=interrupted)


def _shifted(block: Trace, shift: int) -> Trace:
    if not shift or block.sequence_T is None:
        return block
    return replace(block, sequence_T=block.sequence_T + shift)


def write_counts(
    counts: Sequence[ExpertCounts],
    out: Path,
    *,
    overwrite: bool = False,
    num_decoder_layers: int | None = None,
) -> ExpertCounts:
    """Write counts as SGLang's JSON, ``{"logical_count": [windows][layers][experts]}``, one after the other.

    Rows are decoder layers, dense ones all zero, where it is known which the MoE layers are.

    Parameters
    ----------
    counts
        Counts of the same model.
    out
        File.
    overwrite
        Replace a file that is there.
    num_decoder_layers
        Decoder layers of the model; by default up to the last MoE layer.

    Raises
    ------
    InputError
        If counts differ in shape, or the file is there or cannot be written.
    """
    if out.exists() and not overwrite:
        raise InputError(f"{out}: is there already; choose another output or --overwrite it")
    first = counts[0]
    for other in counts[1:]:
        for field in ("num_layers", "num_experts", "top_k", "moe_layer_ids"):
            if getattr(first, field) != getattr(other, field):
                raise InputError(
                    f"counts differ in {field}: {getattr(first, field)!r} and {getattr(other, field)!r}; "
                    "name the model with --model"
                )
    whole = replace(first, load_WLE=np.concatenate([each.load_WLE for each in counts]))
    rows = list(range(first.num_layers)) if first.moe_layer_ids is None else list(first.moe_layer_ids)
    height = max(num_decoder_layers or 0, rows[-1] + 1)
    with writing_whole(out) as file:
        file.write(b'{"logical_count": [')
        for window, load_LE in enumerate(whole.load_WLE):
            decoder_LE = np.zeros((height, first.num_experts), dtype=np.int64)
            decoder_LE[rows] = load_LE
            file.write((",\n" if window else "\n").encode() + json.dumps(decoder_LE.tolist()).encode())
        file.write(b"\n]}\n")
    return whole
