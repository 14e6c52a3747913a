"""From a trace and options to a problem, wherever the options come from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from placement import LinearCalibration, parse_topology, resolve_model
from placement.errors import InputError
from placement.io import placement_to_dict
from placement.tasks.problem import ProblemInputs, collecting_notes, labelled
from placement.tasks.solve import placement_entries, run_solver, work_of_limit
from traces import read_trace

ROOT = Path(__file__).parents[2]
TRACE = str(ROOT / "placement/samples/traces/byte16.npz")
LINEAR = ROOT / "placement/samples/linear.json"


def test_objects_and_names_make_the_same_problem(tmp_path: Path) -> None:
    """A topology, a model and a calibration may be given as such instead of by name or file."""
    trace = read_trace(TRACE)
    sizes = tmp_path / "sizes.yaml"
    sizes.write_text(
        f"num_layers: {trace.num_layers}\nnum_experts: {trace.num_experts}\ntop_k: {trace.top_k}\n"
        "hidden_size: 64\nexpert_hidden_size: 32\n",
        encoding="utf-8",
    )
    named, origin = ProblemInputs(
        trace=TRACE, topology="h100:1x4", model=str(sizes), calibration=LINEAR, window=4096
    ).problem()
    given, _ = ProblemInputs(
        trace=TRACE,
        topology=parse_topology("h100:1x4"),
        model=resolve_model(sizes),
        calibration=LinearCalibration(**_weights()),
        window=4096,
    ).problem()
    assert origin.digest.startswith("sha256:")
    assert given.topology.to_dict() == named.topology.to_dict()
    assert (given.model, given.calibration) == (named.model, named.calibration)


def _weights() -> dict[str, float]:
    values = json.loads(LINEAR.read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key != "kind"}


def test_notes_are_collected_and_nowhere_else(capsys: pytest.CaptureFixture[str]) -> None:
    """What is to be told about the input reaches the collector alone; afterwards logging is as it was."""
    handlers = logging.getLogger("placement").handlers[:]
    with collecting_notes() as notes:
        logging.getLogger("placement.tasks.problem").warning("two\n lines")
        logging.getLogger("traces").info("not worth telling")
    assert notes == ["two lines"]
    assert capsys.readouterr().err == ""
    assert logging.getLogger("placement").handlers == handlers


def test_step_time_needs_sizes() -> None:
    """No preset has the shape of this trace: the data sheet cannot price it without sizes."""
    with pytest.raises(InputError, match="step time needs the model's sizes"):
        ProblemInputs(trace=TRACE, topology="h100:1x4").problem()


def test_entries_say_what_the_solution_is() -> None:
    """The file's objective, bound and provenance are the solution's; every incumbent holds its placement."""
    problem, origin = ProblemInputs(
        trace=TRACE, topology="h100:1x4", calibration=LINEAR, window=4096
    ).problem()
    incumbents = []
    solution = run_solver(problem, solver="greedy", seed=3, on_incumbent=incumbents.append)
    entries = placement_entries(problem, solution, origin, seed=3, options={"window": 4096})
    document = placement_to_dict(labelled(solution.placement, problem, origin), **entries)
    assert document["objective"]["value"] == solution.objective >= document["objective"]["lower_bound"]
    assert document["provenance"]["trace"] == origin.digest
    assert document["provenance"]["options"] == {"window": 4096}
    assert len(document["breakdown"]["layers"]) == problem.num_layers
    assert all("gap" in row for row in document["breakdown"]["layers"])
    assert (incumbents[-1].placement.physical_to_logical_map_LS.shape) == (
        problem.num_layers,
        problem.num_slots,
    )
    assert incumbents[-1].objective == solution.objective


def test_a_time_limit_plans_effort() -> None:
    """A part of the limit, for every thread; none without a limit."""
    assert work_of_limit(None, 4) is None
    assert work_of_limit(10, 2) == pytest.approx(14)
