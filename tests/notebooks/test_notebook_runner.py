"""The runner of notebooks: what it lets pass, what it does not, and what a shown figure becomes."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import plotly.graph_objects as go
import pytest

from notebooks.run import NotebookError, execute, main, render, strip, with_parameters
from placement.errors import InputError
from placement.report.notebook import show
from tests.notebooks.running import figures_of, page_of, texts_of

SHOW = """
from placement.report.figures.look import BLUE, empty_figure
from placement.report.notebook import show
import plotly.graph_objects as go

figure = empty_figure(go.Bar(x=["</script>"], y=[1], marker={"color": BLUE}), height=200)
"""


def write(path: Path, *cells: str, parameters: str = "") -> Path:
    """Write a notebook of code cells, the first one being its parameters."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(cells)]
    if parameters:
        first = nbformat.v4.new_code_cell(parameters, id="given", metadata={"tags": ["parameters"]})
        notebook.cells.insert(0, first)
    nbformat.write(notebook, path)
    return path


@pytest.mark.slow
def test_figures_bring_plotly_once_and_are_drawn_anew_in_place(tmp_path: Path) -> None:
    """Two figures, one of them drawn twice: two elements, one library, captions escaped, no request."""
    cells = (
        SHOW,
        "first = show(figure, caption='Before <b>')",
        "show(figure)",
        "shown = first.update(figure.update_layout(height=300), caption='After <b>')",
    )
    executed = execute(write(tmp_path / "figures.ipynb", *cells))
    assert [len(cell.outputs) for cell in executed.cells] == [0, 2, 1, 0]
    assert len(figures_of(executed)) == 2
    html = render(executed, title="Figures <1>")
    assert html.count("plotly.js (cartesian") == 1
    assert "height:300px" in html
    assert html.count("After &lt;b&gt;</figcaption>") == 1
    assert "Before" not in html.split("</figcaption>")[0].rpartition("<figure")[2]
    assert "<title>Figures &lt;1&gt;</title>" in html
    assert [figure.count("</script>") for figure in figures_of(executed)] == [1, 1]
    assert page_of(html).fetching == []
    assert "default-src 'none'" in html


def test_outside_a_notebook_nothing_can_be_shown() -> None:
    """One line says what to do instead."""
    with pytest.raises(InputError, match="displays in a notebook"):
        show(go.Figure())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings; warnings.warn('careful', stacklevel=1)", "UserWarning: careful"),
        ("import numpy; numpy.array([1.0]) / 0", "RuntimeWarning: divide by zero"),
        ("import sys; print('oh', file=sys.stderr)", "cell 1 wrote to stderr:\noh"),
        ("import subprocess; subprocess.run('echo oh >&2', shell=True)", "wrote to stderr"),
    ],
)
def test_what_is_not_clean_ends_the_run(tmp_path: Path, source: str, said: str) -> None:
    """Errors, warnings of cells, and whatever is written to stderr."""
    with pytest.raises(NotebookError, match=re.escape(said)) as caught:
        execute(write(tmp_path / "unclean.ipynb", source))
    assert "unclean.ipynb" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.slow
def test_a_warning_of_our_own_code_ends_the_run(tmp_path: Path) -> None:
    """A module of ours that warns is an error, also where the category is hidden by default."""
    source = """
import placement.errors
old = "import warnings; warnings.warn('old', DeprecationWarning)"
exec(compile(old, "errors.py", "exec"), vars(placement.errors))
"""
    with pytest.raises(NotebookError, match="DeprecationWarning: old"):
        execute(write(tmp_path / "warning.ipynb", source))


@pytest.mark.slow
def test_the_command_line_runs_renders_and_takes_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values are Python where they can be, else texts; the file itself stays as it is."""
    path = write(
        tmp_path / "given.ipynb", "print(NUMBER * 2, WORD)", parameters="NUMBER = 1\nWORD: str = 'a'"
    )
    before = path.read_bytes()
    assert main([str(path), "-o", str(tmp_path), "-p", "NUMBER=4", "-p", "WORD=h100:1x8"]) == 0
    assert "8 h100:1x8" in (tmp_path / "given.html").read_text(encoding="utf-8")
    assert path.read_bytes() == before
    assert "given.ipynb: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_is_named_from_where_the_reader_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs beside the notebook, who starts it may be elsewhere."""
    (tmp_path / "book").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "trace.npz").write_text("what was meant")
    cell = "from pathlib import Path\nassert Path(TRACE).read_text() == 'what was meant'"
    path = write(tmp_path / "book" / "one.ipynb", cell, parameters="TRACE = None")
    monkeypatch.chdir(tmp_path / "here")
    assert main([str(path), "-o", str(tmp_path), "-p", "TRACE=trace.npz"]) == 0


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line, and exit code 1."""
    path = write(tmp_path / "given.ipynb", "print(1)", parameters="NUMBER = 1")
    for arguments, said in (
        (["no-such"], "no notebook 'no-such'; there are "),
        ([str(path), "-p", "NUMBER"], "'NUMBER' is not NAME=VALUE"),
        ([str(path), "-p", "NUMBRE=2"], "no parameter NUMBRE; there are NUMBER"),
        ([str(write(tmp_path / "none.ipynb", "X = 1")), "-p", "X=2"], "0 cells carry the tag 'parameters'"),
    ):
        assert main(arguments) == 1
        assert f"error: {said}" in capsys.readouterr().err


def test_stripping_removes_outputs_alone(tmp_path: Path) -> None:
    """Source, tags and ids stay; what a run or an editor left goes, in place with ``--strip``."""
    path = write(tmp_path / "run.ipynb", "print(1)", parameters="NUMBER = 1")
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["widgets"] = {}
    notebook.cells[1].metadata["execution"] = {"shell.execute_reply": "2026-01-01"}
    notebook.cells[1].execution_count = 3
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
    nbformat.write(notebook, path)
    assert texts_of(nbformat.read(path, as_version=4)) == "1\n"
    assert main([str(path), "--strip"]) == 0
    clean = nbformat.read(path, as_version=4)
    assert clean == strip(notebook)
    assert texts_of(clean) == ""
    assert [cell.source for cell in clean.cells] == ["NUMBER = 1", "print(1)"]
    assert clean.cells[0].metadata == {"tags": ["parameters"]}
    assert "widgets" not in clean.metadata


def test_parameters_are_set_after_their_defaults(tmp_path: Path) -> None:
    """A cell of its own follows; without values the notebook is as it was."""
    notebook = nbformat.read(write(tmp_path / "a.ipynb", "print(A)", parameters="A = 1"), as_version=4)
    assert with_parameters(notebook, {}) == notebook
    given = with_parameters(notebook, {"A": "it's"})
    assert [cell.source for cell in given.cells] == ["A = 1", 'A = "it\'s"', "print(A)"]
    assert len(notebook.cells) == 2
