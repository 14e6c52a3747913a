"""Joins data sets without writing their fragments anew: manifests say how what is stored is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from placement.errors import InputError
from traces.files import writing
from traces.source import TraceHeader
from traces.store.folder import Folder, open_folder
from traces.store.manifest import MAX_RANK, Fragment, Manifest, RankShare, fragment_name
from traces.store.prepare import dataset_files, made_by, remove_dataset, write_manifest
from traces.store.source import DatasetSource

__all__ = ["MergeReport", "merge_datasets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge made.

    Parameters
    ----------
    header
        Shape, model and domains of the result.
    num_tokens, num_ranks, num_fragments
        Sizes of the result.
    """

    header: TraceHeader
    num_tokens: int
    num_ranks: int
    num_fragments: int


def merge_datasets(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    ranks: Literal["keep", "renumber"] = "keep",
    overwrite: bool = False,
    names: Sequence[str] | None = None,
) -> MergeReport:
    """Join data sets of one model into a new one.

    Fragments are linked or copied as they are. Domains are the same where their names are. Sequences are
    numbered anew where ranks meet, so that none of two data sets become one.

    Parameters
    ----------
    paths
        Folders or URLs, in order of time.
    out
        Folder or URL of the result.
    ranks
        ``keep``: the same rank of two data sets is one rank, which went on recording. ``renumber``: they are
        different ranks that recorded at the same time; they are numbered in the order given, and a data set
        without ranks becomes one.
    overwrite
        Replace a data set that is there.
    names
        What messages and the manifest call the data sets; their paths by default.

    Raises
    ------
    InputError
        If shapes, models or recorded columns differ, a data set is damaged or of format 1 and would have to
        be renumbered, or the result cannot be written.
    """
    if not paths:
        raise InputError("no data set to merge; name one or more")
    if ranks not in ("keep", "renumber"):
        raise InputError(f"ranks {ranks!r} is unknown; they are kept or renumbered")
    sources = [DatasetSource(path) for path in paths]
    names = [str(path) for path in paths] if names is None else names
    header = _common(sources, names)
    _check_columns(sources, names, ranks=ranks == "keep")
    folder = open_folder(out)
    _prepare(folder, paths, overwrite=overwrite)
    plan = _Plan(header)
    for path, source in zip(paths, sources, strict=True):
        plan.add(str(path), source, renumber=ranks == "renumber")
    return plan.write(folder, made_by({"merged": list(names)}))


def _common(sources: Sequence[DatasetSource], paths: Sequence[str | Path]) -> TraceHeader:
    """Return the header of the result: the same everything, and all domains."""
    first = sources[0].header
    for source, path in zip(sources, paths, strict=True):
        if not source.is_current:
            raise InputError(
                f"{path}: was recorded in format 1, whose fragments cannot be merged as they are; rewrite it "
                "first with 'moe-placement trace window'"
            )
    names = dict.fromkeys(name for source in sources for name in source.header.domain_names)
    for source, path in zip(sources, paths, strict=True):
        difference = replace(first, domain_names=()).difference(replace(source.header, domain_names=()))
        if difference:
            raise InputError(f"{path}: cannot be merged with {paths[0]}: {difference}")
    return replace(first, domain_names=tuple(names))


def _check_columns(sources: Sequence[DatasetSource], paths: Sequence[str | Path], *, ranks: bool) -> None:
    """Refuse before anything is written what could not be read afterwards."""
    names = {"sequence", "position", "rank"} if ranks else {"sequence", "position"}
    first = sources[0].recorded & names
    for source, path in zip(sources, paths, strict=True):
        columns = source.recorded & names
        if columns != first:
            mine, theirs = (", ".join(sorted(given)) or "nothing" for given in (columns, first))
            raise InputError(
                f"{path}: cannot be merged with {paths[0]}: it knows {mine} of each token, the other {theirs}"
            )


def _prepare(folder: Folder, paths: Sequence[str | Path], *, overwrite: bool) -> None:
    if any(_same(folder, open_folder(path)) for path in paths):
        raise InputError(f"{folder}: is one of the data sets to merge; choose another output")
    if overwrite:
        remove_dataset(folder)
    with writing(str(folder)):
        folder.create()
    if dataset_files(folder):
        raise InputError(f"{folder}: holds a data set already; choose another output or overwrite it")


def _same(one: Folder, other: Folder) -> bool:
    if one.path is not None and other.path is not None:
        return one.path.resolve() == other.path.resolve()
    return str(one) == str(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """A fragment that the result takes over."""

    source: Folder
    name: str
    fragment: Fragment


class _Plan:
    """Which fragment goes where, before any file is touched."""

    def __init__(self, header: TraceHeader) -> None:
        self._header = header
        self._taken: dict[int, list[_Taken]] = {}
        self._next_rank = 0
        self._next_sequence = 0

    def add(self, path: str, source: DatasetSource, *, renumber: bool) -> None:
        """Take over all fragments of a data set."""
        folder = open_folder(path)
        ranks = sorted({rank for fragment in source.fragments for rank in _shown(fragment, path, renumber)})
        new_rank = {rank: self._next_rank + i for i, rank in enumerate(ranks)} if renumber else {}
        domain_of = self._domain_of(source.header)
        greatest = -1
        for manifest in source.manifests:
            for fragment in manifest.fragments:
                content = source.content_of(fragment)
                if content is not None and content.sequences is not None:
                    greatest = max(greatest, content.sequences[1] + fragment.sequence_offset)
                shown = _changed(fragment, new_rank, domain_of, self._next_sequence)
                home = new_rank[min(_shown(fragment, path, renumber))] if renumber else manifest.rank
                taken = _Taken(source=folder, name=fragment.file, fragment=shown)
                self._taken.setdefault(home, []).append(taken)
        self._next_rank += len(ranks)
        self._next_sequence += greatest + 1

    def _domain_of(self, header: TraceHeader) -> tuple[int, ...] | None:
        """Map the domains of one data set to those of the result; `None` if they have the same numbers."""
        numbers = tuple(self._header.domain_names.index(name) for name in header.domain_names)
        return None if numbers == tuple(range(len(numbers))) else numbers

    def write(self, folder: Folder, provenance: dict[str, object]) -> MergeReport:
        """Link or copy all fragments, then write the manifests; a failure leaves no fragment behind."""
        if max(self._taken) > MAX_RANK:
            raise InputError(f"the merged data set would have more than {MAX_RANK + 1} ranks")
        copied: list[str] = []
        try:
            manifests = [
                Manifest(
                    header=self._header,
                    rank=rank,
                    fragments=tuple(self._copy(folder, rank, taken, copied)),
                    provenance=provenance,
                )
                for rank, taken in sorted(self._taken.items())
            ]
        except BaseException:
            for name in copied:
                with contextlib.suppress(OSError):
                    folder.remove(name)
            raise
        for manifest in manifests:
            write_manifest(folder, manifest)
        fragments = [fragment for manifest in manifests for fragment in manifest.fragments]
        shown = {share.shown for fragment in fragments for share in fragment.ranks or ()}
        return MergeReport(
            header=self._header,
            num_tokens=sum(fragment.tokens for fragment in fragments),
            num_ranks=len(shown - {None}),
            num_fragments=len(fragments),
        )

    def _copy(
        self, folder: Folder, rank: int, taken: Sequence[_Taken], copied: list[str]
    ) -> Iterator[Fragment]:
        for number, piece in enumerate(taken):
            name = fragment_name(rank, number)
            with writing(folder.locate(name)):
                folder.copy(piece.source, piece.name, name)
            copied.append(name)
            yield replace(piece.fragment, file=name)


def _shown(fragment: Fragment, path: str, renumber: bool) -> set[int]:
    """Ranks of a fragment's tokens, -1 for those without any."""
    if fragment.ranks is None and renumber:
        raise InputError(
            f"{path}: the ranks of {fragment.file} are in its rows alone and cannot be renumbered; rewrite "
            "it first with 'moe-placement trace window'"
        )
    return {-1 if share.shown is None else share.shown for share in fragment.ranks or ()}


def _changed(
    fragment: Fragment, new_rank: dict[int, int], domain_of: tuple[int, ...] | None, offset: int
) -> Fragment:
    """Return a fragment's entry with what readers shall see of it."""
    ranks = fragment.ranks
    if new_rank and ranks is not None:
        ranks = tuple(_renumbered(share, new_rank) for share in ranks)
    if domain_of is not None:
        before = fragment.domain_of
        domains: tuple[int, ...] | None = (
            domain_of if before is None else tuple(domain_of[domain] for domain in before)
        )
    else:
        domains = fragment.domain_of
    return replace(
        fragment, ranks=ranks, domain_of=domains, sequence_offset=fragment.sequence_offset + offset
    )


def _renumbered(share: RankShare, new_rank: dict[int, int]) -> RankShare:
    return replace(share, shown=new_rank[-1 if share.shown is None else share.shown])
