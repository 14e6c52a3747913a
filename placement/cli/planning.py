"""What the commands of planning share: their arguments, and where the answer goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from placement.report.plan_page import PlanPage

__all__ = ["HtmlOption", "OutputOption", "Plan", "SpecArgument", "TraceOption", "tell", "text_table"]

SpecArgument = Annotated[
    Path, typer.Argument(help="What to plan, YAML; examples/plans has one of each.", show_default=False)
]
TraceOption = Annotated[
    str | None,
    typer.Option("--trace", help="Routing to plan for; instead of the file's own.", show_default=False),
]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", help="Report with pictures to write.", show_default=False)
]
OutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="Plan to write, JSON.", show_default=False)
]


class Plan(Protocol):
    """An answer of planning."""

    def to_dict(self) -> dict[str, Any]:
        """Return the machine-readable plan."""
        ...


def tell(
    plan: Plan,
    *,
    json: bool,
    output: Path | None,
    html: Path | None,
    page: Callable[[], PlanPage],
    text: Callable[[], list[RenderableType]],
) -> None:
    """Write the files that were asked for, then print the plan: one JSON object, or texts and tables.

    Parameters
    ----------
    page, text
        Make the report's page and what a terminal shows, where they are wanted.
    """
    from placement.io import dump_json, write_json

    values = plan.to_dict()
    if html is not None:
        from placement.report.plan_page import write_plan

        write_plan(page(), html)
    if output is not None:
        write_json(output, values)
    if json:
        typer.echo(dump_json(values))
        return
    _print(text())


def _print(parts: list[RenderableType]) -> None:
    import shutil
    import sys

    from rich.console import Console

    # Off a terminal tables must not be squeezed into 80 columns.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    console = Console(width=width)
    for part in parts:
        # What comes from files is text: brackets in it are no markup.
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


def text_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    marked: int | None = None,
    left: Collection[int] = (0,),
) -> RenderableType:
    """Return a table of plain texts for a terminal.

    Parameters
    ----------
    columns, rows
        Heads, and the texts beneath them.
    title
        What stands above it.
    marked
        Index of the row to show in bold.
    left
        Columns that begin at the left; all others are numbers.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index in left else "right", overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*(Text(text) for text in row), style="bold" if index == marked else None)
    return table
