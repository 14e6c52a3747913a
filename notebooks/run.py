"""Runs notebooks from scratch and writes what they show as HTML: ``python -m notebooks.run``.

Each notebook gets a fresh kernel in this folder. An error, a warning of our own code, or anything on stderr
ends the run: what a reader sees is clean. The HTML fetches nothing: style and plotly are inside.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from traitlets.config import Config

__all__ = ["FOLDER", "NotebookError", "execute", "main", "notebooks", "render", "strip", "with_parameters"]

FOLDER = Path(__file__).resolve().parent
PARAMETERS = "parameters"
CELL_S = 300
"""Seconds that one cell may take: far more than any needs."""

OURS = r"(__main__|placement|traces|service)(\.|$)"

SET_UP = (
    "import warnings",
    f"warnings.filterwarnings('error', module={OURS!r})",
    "del warnings",
)

QUIET = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONWARNINGS": "", "NO_COLOR": "1"}


class NotebookError(Exception):
    """A notebook did not run cleanly; the message says which cell, and what it wrote."""


def notebooks() -> list[Path]:
    """Return the notebooks of this folder, in reading order."""
    return sorted(FOLDER.glob("[0-9]-*.ipynb"))


def with_parameters(notebook: NotebookNode, values: Mapping[str, Any]) -> NotebookNode:
    """Return a copy with a cell after the parameters that sets some of them.

    Raises
    ------
    NotebookError
        If there is no cell of parameters, or it does not set one of these.
    """
    changed = copy.deepcopy(notebook)
    if not values:
        return changed
    found = [i for i, cell in enumerate(changed.cells) if PARAMETERS in cell.metadata.get("tags", ())]
    if len(found) != 1:
        raise NotebookError(f"{len(found)} cells carry the tag {PARAMETERS!r}; one is needed")
    known = set(_assigned(changed.cells[found[0]].source))
    unknown = sorted(set(values) - known)
    if unknown:
        raise NotebookError(f"no parameter {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    cell = nbformat.v4.new_code_cell("\n".join(lines), id="given-parameters")
    changed.cells.insert(found[0] + 1, cell)
    return changed


def _assigned(source: str) -> Iterator[str]:
    for node in ast.parse(source).body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                yield target.id


def execute(path: Path, *, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """Run a notebook in a fresh kernel and return it with its outputs.

    Parameters
    ----------
    parameters
        Values that replace those of its cell of parameters.

    Raises
    ------
    NotebookError
        If a cell raises, warns or writes to stderr.
    """
    notebook = with_parameters(nbformat.read(path, as_version=4), parameters or {})
    try:
        with TemporaryDirectory(prefix="notebook-") as folder:
            _client(notebook, path.parent, folder).execute(env=_environment())
    except CellExecutionError as exc:
        raise NotebookError(f"{path.name}: {_plain(str(exc))}") from None
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise NotebookError(f"{path.name}: cell {number} wrote to stderr:\n{_plain(output.text)}")
    return notebook


def _environment() -> dict[str, str]:
    # Within a test, the kernel would let what child processes write pass by.
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return kept | QUIET


def _client(notebook: NotebookNode, where: Path, folder: str) -> NotebookClient:
    arguments = [f"--IPKernelApp.exec_lines={line}" for line in SET_UP]
    # Sockets in a folder of our own: no port that others could reach or take.
    sockets = {"transport": "ipc", "ip": f"{folder}/kernel"}
    return NotebookClient(
        notebook,
        timeout=CELL_S,
        kernel_name="python3",
        extra_arguments=[*arguments, "--HistoryManager.enabled=False"],
        resources={"metadata": {"path": str(where)}},
        config=Config({"KernelManager": sockets}),
    )


def _plain(text: str) -> str:
    """Return a text without the terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


_TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'">
{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
body.jp-Notebook { padding: 24px 16px 64px; --jp-cell-editor-background: #ffffff; }
main { max-width: 1040px; margin: 0 auto; }
.jp-InputPrompt, .jp-OutputPrompt, .jp-Cell-outputCollapser, .jp-InputCollapser { display: none; }
.jp-RenderedHTMLCommon { font-size: 16px; line-height: 1.55; }
.jp-RenderedHTMLCommon table { font-size: 14px; }
body.jp-Notebook .jp-RenderedHTMLCommon a:any-link { text-decoration: underline; }
.jp-OutputArea-output { overflow-x: auto; }
.jp-OutputArea-output pre { white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere; }
.jp-RenderedText pre { font-size: 14px; line-height: 1.5; }
@media print { .jp-InputArea { break-inside: avoid; } figure { break-inside: avoid; } }
</style>
{%- endblock -%}
"""


def render(notebook: NotebookNode, *, title: str) -> str:
    """Return an executed notebook as one HTML page that fetches nothing."""
    exporter = HTMLExporter(config=Config({"HTMLExporter": {"theme": "light"}}), raw_template=_TEMPLATE)
    exporter.exclude_anchor_links = True
    named = copy.deepcopy(notebook)
    named.metadata["title"] = title
    html, _ = exporter.from_notebook_node(named)
    return str(html)


def strip(notebook: NotebookNode) -> NotebookNode:
    """Return a copy as it is committed: without outputs, counts and what editors leave behind."""
    clean = copy.deepcopy(notebook)
    kept = {"kernelspec", "title"}
    clean.metadata = NotebookNode({k: v for k, v in clean.metadata.items() if k in kept})
    clean.metadata["language_info"] = {"name": "python"}
    for cell in clean.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return clean


def _title(notebook: NotebookNode) -> str:
    first = notebook.cells[0].source.splitlines()[0]
    return str(first.lstrip("# "))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, by number or file; all by default")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("-o", "--out", type=Path, default=FOLDER / "html", help="folder for the HTML")
    parser.add_argument("--strip", action="store_true", help="remove outputs from the files, run nothing")
    given = parser.parse_args(arguments)
    try:
        paths = [_found(name) for name in given.names] or notebooks()
        for path in paths:
            if given.strip:
                nbformat.write(strip(nbformat.read(path, as_version=4)), path)
            else:
                _run(path, given.out, dict(_value(text) for text in given.parameter))
    except NotebookError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    return 0


def _run(path: Path, out: Path, parameters: Mapping[str, Any]) -> None:
    began_s = time.monotonic()
    executed = execute(path, parameters=parameters)
    out.mkdir(parents=True, exist_ok=True)
    page = out / f"{path.stem}.html"
    page.write_text(render(executed, title=_title(executed)), encoding="utf-8")
    size = page.stat().st_size / 1e6
    print(f"{path.name}: {time.monotonic() - began_s:.1f} s, {page} ({size:.1f} MB)", flush=True)


def _found(name: str) -> Path:
    matching = [path for path in notebooks() if name in (path.stem.partition("-")[0], path.stem, path.name)]
    path = matching[0] if matching else Path(name).resolve()
    if not path.is_file():
        raise NotebookError(f"no notebook {name!r}; there are {', '.join(p.stem for p in notebooks())}")
    return path


def _value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise NotebookError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        # The kernel runs in the notebook's folder.
        return name, os.path.abspath(value) if os.path.exists(value) else value


if __name__ == "__main__":
    sys.exit(main())
