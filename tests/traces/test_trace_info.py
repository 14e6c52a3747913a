"""Tests of ``moe-placement trace info``: one JSON object for programs, tables for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from placement.cli.trace_info import info
from placement.errors import InputError
from traces.store import write_npz
from traces.synthesize import synthesize


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    trace = synthesize(num_tokens=100, num_layers=2, num_experts=8, top_k=2, sequence_tokens=25, seed=0)
    write_npz(trace, tmp_path / "a.npz")
    return tmp_path / "a.npz"


def test_json_is_one_object(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output parses as a whole and holds the figures."""
    info(trace_file, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["num_tokens"], printed["num_sequences"], printed["top_k"]) == (100, 4, 2)
    assert len(printed["layers"]) == 2
    assert printed["digest"].startswith("sha256:")


def test_tables_show_names_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name from a file is text, never markup, and what is unknown is said to be so."""
    trace = synthesize(num_tokens=10, num_layers=1, num_experts=4, top_k=1, seed=0)
    write_npz(
        type(trace)(experts_TLK=trace.experts_TLK, num_experts=4, model_name="[bold]x[/]"), tmp_path / "a"
    )
    info(tmp_path / "a")
    printed = capsys.readouterr().out
    assert "[bold]x[/]" in printed
    assert "not recorded" in printed
    assert "top-1 of 4 experts" in printed


def test_other_formats_can_be_insisted_on(trace_file: Path) -> None:
    """``--from`` reaches the readers."""
    with pytest.raises(InputError, match="is not a folder"):
        info(trace_file, source_format="dataset")
