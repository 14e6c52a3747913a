"""``moe-placement trace merge``: joins traces into one data set."""

from __future__ import annotations

import json as json_text
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from placement.cli.inputs import FromOption, JsonOption
from placement.cli.trace_opening import LayersOption, OverwriteOption, PhysicalMapOption, open_tokens
from placement.errors import InputError

__all__ = ["merge"]


def merge(
    trace: Annotated[
        list[str],
        typer.Argument(metavar="TRACE...", help="Traces in time order, of any format.", show_default=False),
    ],
    out: Annotated[str, typer.Option("-o", "--out", help="Data set folder or URL.", show_default=False)],
    ranks: Annotated[
        str,
        typer.Option(
            "--ranks",
            help="keep: the same rank of two traces went on recording; renumber: they ran side by side.",
        ),
    ] = "keep",
    source_format: FromOption = None,
    model: LayersOption = None,
    physical_map: PhysicalMapOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Join traces of one model. Data sets are linked fragment by fragment, other formats are converted.

    Domains of the same name become one; sequences are numbered anew.
    """
    from traces.store.merge import merge_datasets

    if ranks not in ("keep", "renumber"):
        raise InputError(f"--ranks {ranks!r} is unknown; it is keep or renumber")
    if out.endswith(".npz"):
        raise InputError(f"{out}: is no folder; merge into a data set, then 'trace window' makes an archive")
    with ExitStack() as stack:
        paths: list[str | Path] = []
        for name in trace:
            source = open_tokens(name, source_format=source_format, model=model, physical_map=physical_map)
            paths.append(_as_dataset(stack, name, source, out))
        report = merge_datasets(paths, out, ranks=ranks, overwrite=overwrite, names=trace)  # type: ignore[arg-type]
    plain = {
        "path": out,
        "tokens": report.num_tokens,
        "ranks": report.num_ranks,
        "fragments": report.num_fragments,
        "domain_names": list(report.header.domain_names),
    }
    line = f"{out}: {report.num_tokens:,} tokens of {len(trace)} traces, {report.num_ranks} ranks"
    typer.echo(json_text.dumps(plain) if json else line)


def _as_dataset(stack: ExitStack, name: str, source: object, out: str) -> str | Path:
    """Return where the trace lies as a data set that can be linked from; converted where it is none."""
    from traces.store.copy import write_stream
    from traces.store.source import DatasetSource

    if isinstance(source, DatasetSource) and source.is_current:
        return name
    # Beside the output where that is local, so that fragments are linked and not copied.
    beside = Path(out).resolve().parent if "://" not in out else None
    folder = stack.enter_context(
        tempfile.TemporaryDirectory(prefix=".merge-", dir=beside if beside and beside.is_dir() else None)
    )
    converted = Path(folder) / "set"
    write_stream(source.blocks(), source.header, converted)  # type: ignore[attr-defined]
    return converted
