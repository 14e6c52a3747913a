"""What notebooks are in git: stories that import everything, without outputs."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks.run import notebooks, strip
from tests.notebooks.running import FILES, path_of

LONGEST_CELL = 40
"""Lines: a cell that does more is a function in the wrong place."""


def notebook(name: str) -> NotebookNode:
    """Return a notebook as committed."""
    return nbformat.read(path_of(name), as_version=4)


def code_of(name: str) -> list[str]:
    """Return the code cells of a notebook."""
    return [cell.source for cell in notebook(name).cells if cell.cell_type == "code"]


def test_all_notebooks_are_run() -> None:
    """The folder holds exactly the notebooks that are tested, each with a test file of its own."""
    assert [path.stem for path in notebooks()] == list(FILES)
    for name in FILES:
        test = Path(__file__).with_name(f"test_notebook_{name[0]}.py").read_text(encoding="utf-8")
        assert f'check_notebook("{name}"' in test


@pytest.mark.parametrize("name", FILES)
def test_outputs_are_stripped(name: str) -> None:
    """Nothing of a run, and nothing of an editor, is committed: ``python -m notebooks.run --strip``."""
    committed = notebook(name)
    assert committed == strip(committed)
    nbformat.validate(committed)


@pytest.mark.parametrize("name", FILES)
def test_no_cell_defines_an_algorithm(name: str) -> None:
    """Functions, classes and lambdas live in modules, where they are tested."""
    for source in code_of(name):
        found = [
            type(node).__name__
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))
        ]
        assert found == [], source
        assert len(source.splitlines()) <= LONGEST_CELL, source


@pytest.mark.parametrize("name", FILES)
def test_no_cell_holds_magic_or_another_plotting_library(name: str) -> None:
    """Plain Python, and pictures of one library."""
    for source in code_of(name):
        names = {
            alias.name.partition(".")[0]
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        assert names.isdisjoint({"matplotlib", "plotly", "seaborn", "altair", "bokeh"}), source


@pytest.mark.parametrize("name", FILES)
def test_it_opens_with_a_question_and_closes_with_the_answer(name: str) -> None:
    """The title asks; under the last heading code prints the answer."""
    cells = notebook(name).cells
    title = cells[0].source.splitlines()[0]
    assert cells[0].cell_type == "markdown"
    assert title.startswith("# ")
    assert title.endswith("?")
    headings = [i for i, cell in enumerate(cells) if cell.source.startswith("## ")]
    assert cells[headings[-1]].source.splitlines()[0] == "## The answer"
    assert any("print(" in cell.source for cell in cells[headings[-1] :] if cell.cell_type == "code")


@pytest.mark.parametrize("name", FILES)
def test_parameters_come_first_in_a_cell_of_their_own(name: str) -> None:
    """One tagged cell sets them, before any other code; the trace is among them."""
    code = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    assert code[0].metadata["tags"] == ["parameters"]
    assert [cell for cell in code[1:] if "parameters" in cell.metadata.get("tags", ())] == []
    assigned = {
        target.id
        for node in ast.parse(code[0].source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert {"TRACE", "WINDOW_TOKENS"} <= assigned
