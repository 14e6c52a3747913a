"""The page of a plan: the answer first, then pictures and tables, in the look of all reports."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape

from placement.errors import InputError
from placement.io import write_text
from placement.report.document import Chart, document
from placement.report.tables import definitions

__all__ = ["PlanPage", "PlanTable", "render_plan", "write_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTable:
    """A table of texts.

    Parameters
    ----------
    title, caption
        Its heading, and what it shows.
    columns
        Heads of the columns; the first column names the rows.
    rows
        Texts, ``[rows][columns]``.
    marked
        Index of the row that is recommended; None for none.

    Raises
    ------
    InputError
        If a row has not one text for each column.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InputError(f"table {self.title!r}: {len(row)} texts for {len(self.columns)} columns")

    def html(self) -> str:
        """Return the section."""
        heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        rows = "\n".join(self._row(index, row) for index, row in enumerate(self.rows))
        return (
            f"<section><h2>{escape(self.title)}</h2>"
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(self.title)}">'
            f'<table class="policies">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
            "</table></div>"
            f'<p class="note">{escape(self.caption)}</p></section>'
        )

    def _row(self, index: int, row: tuple[str, ...]) -> str:
        mark = ' class="proposed"' if index == self.marked else ""
        cells = "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        return f'<tr{mark}><th scope="row">{escape(row[0])}</th>{cells}</tr>'


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPage:
    """What a plan's page says; every text is plain and escaped when it is written.

    Parameters
    ----------
    title
        Head of the page.
    facts
        What the reader must know of the question at a glance.
    headline, paragraph
        The answer in a sentence, and what stands behind it.
    good
        Whether the answer recommends something (True) or says that nothing is to be had (False).
    warnings
        What the reader must beware of.
    sections
        Charts and tables in reading order.
    words
        Terms and what they mean.
    provenance
        Where the numbers come from.
    """

    title: str
    headline: str
    paragraph: str
    facts: Mapping[str, str] = field(default_factory=dict)
    good: bool = True
    warnings: tuple[str, ...] = ()
    sections: tuple[Chart | PlanTable, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)


def render_plan(page: PlanPage) -> str:
    """Return a plan as one self-contained HTML page; the same plan gives the same page."""
    return document(page.title, "\n".join(_sections(page)))


def write_plan(page: PlanPage, path: str | os.PathLike[str]) -> None:
    """Write a plan as one self-contained HTML file, whole or not at all.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    write_text(path, render_plan(page))


def _sections(page: PlanPage) -> Iterator[str]:
    yield f"<header><h1>{escape(page.title)}</h1>\n{definitions(page.facts, css_class='facts')}</header>"
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in page.warnings)
    yield (
        f'<section class="answer {"good" if page.good else "unsure"}">'
        f'<h2 class="headline">{escape(page.headline)}</h2>'
        f'<p class="numbers">{escape(page.paragraph)}</p>{warnings}</section>'
    )
    # Pictures, then tables, each in its own order.
    for section in sorted(page.sections, key=lambda section: isinstance(section, PlanTable)):
        yield section.html()
    if page.words:
        words = definitions(page.words, css_class="words")
        yield f"<section><h2>How to read this</h2>{words}</section>"
    if page.provenance:
        provenance = definitions(page.provenance, css_class="provenance")
        yield f"<section><h2>Provenance</h2>{provenance}</section>"
