"""Batch files: what they ask for, and one line for whatever is wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.errors import InputError
from traces.distributed.spec import read_spec

MINIMAL = "traces: [chat.npz]\ntopologies: [h100:1x4]\n"


def read(folder: Path, text: str) -> tuple[list[str], list[dict[str, object]]]:
    """Read a batch file; return its cells' names and options."""
    path = folder / "grid.yaml"
    path.write_text(text)
    cells = read_spec(path).cells
    return [cell.name for cell in cells], [dict(cell.options) for cell in cells]


def test_the_least_that_a_batch_needs(tmp_path: Path) -> None:
    """One trace on one topology, with the defaults of solve."""
    path = tmp_path / "grid.yaml"
    path.write_text(MINIMAL)
    spec = read_spec(path)
    assert (spec.name, len(spec.cells), spec.num_excluded) == ("grid", 1, 0)
    cell = spec.cells[0]
    assert cell.name == "chat/h100-1x4"
    assert (cell.trace.path, cell.topology.topology) == (str(tmp_path / "chat.npz"), "h100:1x4")
    assert (dict(cell.options), cell.held_out, cell.split_layers) == ({}, "alternate", False)


def test_everything_crossed_and_some_left_out(tmp_path: Path) -> None:
    """Traces times topologies times every combination of the grid, in order, but what is excluded."""
    (tmp_path / "rack.yaml").touch()
    (tmp_path / "models").mkdir()
    text = """
name: what-if
traces:
  - s3://bucket/chat
  - {name: code, path: dumps/code, from: npz, model: models, held_out: dumps/later}
topologies:
  - h100:1x4
  - {name: rack, topology: rack.yaml, price_per_device_hour: 2.5}
solve: {objective: balance, window: 512, calibration: costs/linear.json, time_limit: null}
grid:
  seed: [0, 1]
  spare_slots: [0, 8]
  fill_memory: [false]
exclude:
  - {topology: rack, spare_slots: 8}
  - {trace: [chat, code], seed: 1, topology: h100-1x4}
held_out: none
split_layers: true
"""
    names, options = read(tmp_path, text)
    grid = "spare_slots={},fill_memory=false,seed={}".format
    assert names == [
        f"chat/h100-1x4/{grid(0, 0)}",
        f"chat/h100-1x4/{grid(8, 0)}",
        f"chat/rack/{grid(0, 0)}",
        f"chat/rack/{grid(0, 1)}",
        f"code/h100-1x4/{grid(0, 0)}",
        f"code/h100-1x4/{grid(8, 0)}",
        f"code/rack/{grid(0, 0)}",
        f"code/rack/{grid(0, 1)}",
    ]
    assert options[1] == {
        "objective": "balance",
        "window": 512,
        "calibration": str(tmp_path / "costs" / "linear.json"),
        "spare_slots": 8,
        "fill_memory": False,
        "seed": 0,
    }
    spec = read_spec(tmp_path / "grid.yaml")
    assert (spec.name, spec.num_excluded) == ("what-if", 8)
    chat, code = spec.cells[0], spec.cells[-1]
    assert (chat.trace.path, chat.held_out, chat.split_layers) == ("s3://bucket/chat", "none", True)
    assert code.trace.model == str(tmp_path / "models")
    assert (code.trace.source_format, code.trace.held_out) == ("npz", str(tmp_path / "dumps" / "later"))
    assert code.topology.topology == str(tmp_path / "rack.yaml")
    assert code.topology.price_per_device_hour == 2.5
    assert code.varied == ("spare_slots", "fill_memory", "seed")


def test_names_of_paths_stay_apart(tmp_path: Path) -> None:
    """Files of the same name, numbers with dots and very long names still name different folders."""
    text = MINIMAL + "grid: {calibration: [a/c.json, b/c.json, null], max_imbalance: [1.05, 1.5]}"
    names, options = read(tmp_path, text)
    assert len(set(names)) == 6
    assert "max_imbalance=1.05,calibration=c-1" in names[1]
    assert "calibration" not in options[2]
    long = "x" * 90
    names, _ = read(tmp_path, MINIMAL + f"grid: {{model: [{long}1, {long}2], calibration: [{long}]}}")
    assert len(set(names)) == 2
    assert all(len(part) < 160 for name in names for part in name.split("/"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("traces: [a]\n", "topologies is missing"),
        ("traces: []\ntopologies: [h100:1x4]\n", "traces must be a list that is not empty"),
        (MINIMAL + "trace: b\n", "unknown key 'trace'; did you mean 'traces'?"),
        (MINIMAL + "solve: {windw: 3}\n", "solve has the unknown key 'windw'; did you mean 'window'?"),
        (MINIMAL + "solve: {window: 0}\n", r"solve\.window must be an integer from 1"),
        (MINIMAL + "solve: {objective: balanced}\n", r"solve\.objective 'balanced' is unknown; did you mean"),
        (MINIMAL + "solve: {solver: serach}\n", r"solve\.solver 'serach' is unknown; did you mean 'search'"),
        (MINIMAL + "solve: {fill_memory: 1}\n", r"solve\.fill_memory must be true or false, not 1"),
        (MINIMAL + "solve: {max_imbalance: 0.5}\n", r"solve\.max_imbalance must be a number of 1 or more"),
        (MINIMAL + "grid: {seed: 1}\n", r"grid\.seed must be a list"),
        (MINIMAL + "grid: {seed: [0, -1]}\n", r"grid\.seed\[1\] must be an integer from 0"),
        (MINIMAL + "grid: {seed: [1, 1]}\n", r"grid\.seed\[1\] is 1 a second time"),
        (MINIMAL + "solve: {seed: 1}\ngrid: {seed: [1]}\n", "seed is under solve and under grid"),
        (MINIMAL + "held_out: half\n", "held_out 'half' is unknown"),
        (MINIMAL + "exclude: [{}]\n", r"exclude\[0\] is empty"),
        (MINIMAL + "exclude: [{sed: 1}]\n", r"exclude\[0\] has the unknown key 'sed'"),
        (MINIMAL + "exclude: [{trace: cat}]\n", r"exclude\[0\]\.trace 'cat' fits no cell; there are: 'chat'"),
        (MINIMAL + "grid: {seed: [1]}\nexclude: [{seed: 2}]\n", r"exclude\[0\]\.seed 2 fits no cell"),
        (MINIMAL + "exclude: [{trace: chat}]\n", "exclude leaves no cell out of 1"),
        (
            "traces: [a/x.npz, b/x.npz]\ntopologies: [h100:1x4]\n",
            r"traces\[1\] is named 'x' as traces\[0\] is",
        ),
        ("traces: [{name: ../x, path: a}]\ntopologies: [h100:1x4]\n", r"traces\[0\]\.name must be"),
        ("traces: [{name: a}]\ntopologies: [h100:1x4]\n", r"traces\[0\]\.path is missing"),
        ("traces: [3]\ntopologies: [h100:1x4]\n", r"traces\[0\] must be a mapping"),
        (MINIMAL + "split_layers: true\nsolve: {semantics: stay-put}\n", "split_layers goes without"),
        (MINIMAL + "split_layers: true\ngrid: {risk: [mean, p95]}\n", "risk mean alone"),
        (MINIMAL + f"grid: {{seed: {list(range(400))}, window: {list(range(1, 401))}}}\n", "asks for 160000"),
        ("traces: [a]\ntraces: [b]\n", "'traces' is given twice"),
        ("- 1\n", "the top level must be a mapping"),
        ("traces: [\n", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    """One line: the file, the key, what it should be."""
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "grid.yaml" in str(caught.value)
