"""Tests of ``moe-placement plan hetero``: what it prints and writes, and what it says of wrong files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from placement.cli.app import run
from placement.io import read_placement

EXAMPLES = Path(__file__).parents[2] / "examples" / "plans"


def spec_of(**changes: Any) -> dict[str, Any]:
    """Return the example with fixed roles, small enough to plan at once; None takes a key out."""
    values = yaml.safe_load((EXAMPLES / "hetero.yaml").read_text(encoding="utf-8"))
    values["classes"] = [{"kind": "a40", "count": 1}, {"kind": "v100", "count": 1}]
    values |= {"micro_batches": [4], "trace": None, "sequence_length": 8192, **changes}
    return {key: value for key, value in values.items() if value is not None}


def written(folder: Path, **changes: Any) -> str:
    """Write a changed example and return its path."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(spec_of(**changes)), encoding="utf-8")
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return the JSON of a plan."""
    assert run(["plan", "hetero", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_example_with_its_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled trace on 1 A40 and 1 V100: text, page, plan and placement agree."""
    trace = str(EXAMPLES / ".." / ".." / "placement" / "samples" / "traces" / "byte16.npz")
    files = [tmp_path / name for name in ("page.html", "plan.json", "placement.json")]
    options = ["--trace", trace, "--html", str(files[0]), "-o", str(files[1]), "--placement", str(files[2])]
    assert run(["plan", "hetero", written(tmp_path), *options]) == 0
    said = capsys.readouterr().out
    assert "attention on 1 a40, experts on 1 v100" in said
    assert "times EP(Ideal)" in said
    assert "Under loads that the plan has not seen" in said
    page = files[0].read_text(encoding="utf-8")
    for name in ("gantt", "utilisation", "makespan", "offload"):
        assert f'id="{name}-data"' in page
    plan = json.loads(files[1].read_text(encoding="utf-8"))
    assert plan["lower_bound_s"] <= plan["step_s"]
    placement = read_placement(files[2])
    assert placement.first_device_LE.tolist() == plan["device_of_expert"]


def test_the_example_file_is_valid() -> None:
    """The example as it stands makes a question: classes, memory, exchange and its trace are read."""
    from placement.tasks.plan_hetero import question_of
    from placement.tasks.plan_spec import read_spec

    question = question_of(read_spec(EXAMPLES / "hetero.yaml"))
    assert [(its.name, its.count) for its in question.classes] == [("a40", 6), ("v100", 6)]
    assert (question.job.num_layers, question.job.num_experts) == (6, 16)
    # 3 matrices of 2048 x 4096, 16 bytes a weight
    assert question.job.expert_bytes == 3 * 2048 * 4096 * 16
    assert question.held_out_LE is not None


def test_measured_times_and_fixed_roles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figure 6 of HeterMoE (arXiv 2504.03871) from a file: 35/3 ms, o = [0, 1, 1], or better."""
    measured = {"tokens": 1, "attention_ms": 1, "experts_ms": 4 / 3}
    changes: dict[str, Any] = {
        "classes": [{"kind": name, "count": 1, "measured": measured} for name in ("a40", "v100")],
        "model": {
            "num_layers": 3, "num_experts": 6, "top_k": 2, "hidden_size": 64, "expert_hidden_size": 64,
        },
        "tokens_per_step": 3, "micro_batches": [3], "backward": 0,
        "exchange": {"free_bytes": True, "dispatch_us": 0, "combine_us": 0},
        "roles": {"attention": {"a40": 1}, "experts": {"v100": 1}},
    }  # fmt: skip
    plan = planned(capsys, written(tmp_path, **changes))
    assert plan["algorithm_1"]["offload_per_expert_device"] == [0, 1, 1]
    published = next(its for its in plan["contenders"] if its["name"] == "Algorithm 1")
    assert published["step_s"] == pytest.approx(35e-3 / 3)
    assert plan["step_s"] <= published["step_s"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clases": 1}, "the unknown key 'clases'; did you mean 'classes'?"),
        ({"classes": [{"kind": "a41", "count": 1}]}, "classes[0].kind: unknown device kind 'a41'"),
        ({"classes": [{"kind": "a40"}]}, "classes[0].count is missing"),
        ({"micro_batches": [0]}, "micro_batches must be a list of numbers from 1 to 1024"),
        ({"roles": {"attention": {"a40": 2}, "experts": {"v100": 1}}}, "roles: 1 groups with 2 + 0 devices"),
        ({"exchange": {"efficiency": 2}}, "exchange.efficiency must be a share"),
        ({"sequence_length": None}, "sequence_length is missing"),
    ],
)
def test_wrong_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    """Exit code 2 and one line with the place."""
    assert run(["plan", "hetero", written(tmp_path, **changes)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_too_little_memory_is_infeasible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3, with the bytes that are missing."""
    classes = [{"kind": name, "count": 1, "memory_gib": 4} for name in ("a40", "v100")]
    assert run(["plan", "hetero", written(tmp_path, classes=classes)]) == 3
    error = capsys.readouterr().err
    assert "are missing" in error
    assert "it would fit with" in error
