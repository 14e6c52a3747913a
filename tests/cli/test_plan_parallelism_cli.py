"""``moe-placement plan parallelism``: the example, its files, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from placement.cli import main
from placement.cli.app import app
from placement.errors import InputError
from placement.io import dump_json
from placement.report.plan_page import render_plan
from placement.report.plan_parallelism import page_of
from placement.tasks.plan_parallelism import plan_parallelism_of, question_of
from placement.tasks.plan_spec import PlanSpec, read_spec

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plans" / "parallelism.yaml"

SPEC: dict[str, Any] = {
    "model": {
        "name": "<b>tiny</b>",
        "num_layers": 2,
        "num_experts": 4,
        "top_k": 1,
        "hidden_size": 256,
        "expert_hidden_size": 512,
    },
    "transformer": {"num_attention_heads": 4},
    "topology": "a100:1x4",
    "sequence_length": 128,
    "global_batch": 16,
}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """Return the file of a small run."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SPEC), encoding="utf-8")
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Return skewed routing of four experts in two layers."""
    rng = np.random.default_rng(3)
    experts_TLK = rng.choice(4, p=[0.5, 0.25, 0.15, 0.1], size=(512, 2, 1)).astype(np.uint8)
    path = tmp_path / "routing.npz"
    np.savez(path, topk=experts_TLK)
    return path


def test_the_example_is_read_whole() -> None:
    """The bundled example is a valid question about 32 devices with the bundled trace's routing."""
    values = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    named = (EXAMPLE.parent / values["placement"]["trace"]).resolve()
    question = question_of(read_spec(EXAMPLE), trace=str(named))
    assert question.topology.num_devices == 32
    assert question.fast_domain_devices == 32
    assert question.traffic is not None
    assert question.traffic.profile.num_layers == question.job.transformer.moe.num_layers == 6


def test_text(spec: Path) -> None:
    """A terminal shows the answer first, then ranked strategies, then what is not taken."""
    result = CliRunner().invoke(app, ["plan", "parallelism", str(spec), "--top", "2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "trains <b>tiny</b> on 4 devices at" in lines[0]
    assert "Loads are taken for balanced." in result.output
    assert sum(line.startswith("PP") for line in lines[2:]) == 2
    assert "meshes are not taken" in lines[-1]


def test_files(spec: Path, trace: Path, tmp_path: Path) -> None:
    """JSON on the terminal is the JSON of the file, with a placement per stage; the page escapes names."""
    page, plan = tmp_path / "plan.html", tmp_path / "plan.json"
    values = {**SPEC, "ranges": {"expert": [2, 4]}, "placement": {"window": 32, "effort_s": 0.05}}
    spec.write_text(yaml.safe_dump(values), encoding="utf-8")
    arguments = ["plan", "parallelism", str(spec), "--trace", str(trace), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--html", str(page), "-o", str(plan)])
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told == json.loads(plan.read_text(encoding="utf-8"))
    assert told["placement"][0]["placement"]["format"] == "moe-placement/1"
    policies = told["strategies"][0]["experts"]["policies"]
    assert set(policies) == {"contiguous", "eplb", "hill climb", "moe-placement"}
    text = page.read_text(encoding="utf-8")
    assert "<b>tiny</b>" not in text
    assert "What each stage holds" in text
    assert str(trace) in text


def test_figures(spec: Path, trace: Path) -> None:
    """Bars of the step add up to it, and bars of memory to the peak, under the line of the device."""
    values = {**SPEC, "ranges": {"expert": [2, 4]}, "placement": {"window": 32, "effort_s": 0.05}}
    given = PlanSpec(values=values, source=str(spec), folder=spec.parent)
    plan = plan_parallelism_of(given, trace=str(trace)).plan
    page = page_of(plan)
    step, memory = (section for section in page.sections if hasattr(section, "figure"))
    best = plan.best.best
    assert sum(bar.x[0] for bar in step.figure.data) == pytest.approx(best.step.total_s)
    first_stage = sum(bar.y[0] for bar in memory.figure.data)
    assert first_stage * 2**30 == pytest.approx(best.memory.total_P[0])
    assert memory.figure.layout.shapes[0].y0 == 80
    assert render_plan(page) == render_plan(page_of(plan))


def test_trace_of_the_file(trace: Path, tmp_path: Path) -> None:
    """A trace that the file names is found from the file's folder; the option takes its place."""
    values = {**SPEC, "placement": {"trace": trace.name, "window": 32, "effort_s": 0.05}}
    given = PlanSpec(values=values, source="run.yaml", folder=tmp_path)
    planned = plan_parallelism_of(given)
    assert planned.trace == str(trace)
    again = plan_parallelism_of(given, trace=str(trace))
    assert dump_json(again.plan.to_dict()) == dump_json(planned.plan.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_lenght": 3}, "sequence_lenght"),
        ({"global_batch": 0}, "global_batch must be an integer from 1"),
        ({"flash_attention": "no"}, "flash_attention must be true or false"),
        ({"ranges": {"checkpointing": ["ful"]}}, "ranges.checkpointing has 'ful'.*full"),
        ({"ranges": {"expert": [0]}}, r"range expert is \[0\]"),
        ({"state_bytes": {"momentum": 4}}, "momentum"),
        ({"placement": {"objective": "traffic"}}, "placement.objective must be balance or step-time"),
        ({"topology": "a40:1x2+v100:1x2"}, "use plan hetero"),
    ],
)
def test_what_is_wrong_with_a_file(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A wrong entry is named with its place and what would be right."""
    given = PlanSpec(values={**SPEC, **changes}, source="run.yaml", folder=tmp_path)
    with pytest.raises(InputError, match=message):
        plan_parallelism_of(given)


def test_exit_codes(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input ends with 2, what does not fit with 3, each in one line."""
    spec.write_text(yaml.safe_dump({**SPEC, "memory_gib": 0.001}), encoding="utf-8")
    with pytest.raises(SystemExit) as infeasible:
        main(["plan", "parallelism", str(spec)])
    said = capsys.readouterr().err
    assert infeasible.value.code == 3
    assert "nothing fits in 0.0 GiB on 4 devices; nearest is" in said
    spec.write_text(yaml.safe_dump({**SPEC, "topology": "a100:0x4"}), encoding="utf-8")
    with pytest.raises(SystemExit) as bad:
        main(["plan", "parallelism", str(spec)])
    assert bad.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
