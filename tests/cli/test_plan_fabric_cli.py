"""``moe-placement plan fabric`` from the file to the plan, its page and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from placement.cli.app import run
from placement.planning.fabric import (
    FabricRegion,
    Timing,
    all_to_all_time,
    plan_fabric,
    synthetic_demand,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "plans" / "fabric.yaml"
BYTE16 = Path(__file__).parents[2] / "placement" / "samples" / "traces" / "byte16.npz"

SYNTHETIC = "servers: 6\nlink_gbits: 100\nsynthetic: {skew: 1.0, seed: 3, layers: 2}\n"

TRACED = f"""
topology: h100:4x2
ocs_ports: 2
eps_ports: 1
link_gbits: 100
trace: {BYTE16}
trace_window: 131072
sample: 512
placement_work_s: 0.1
nodes: 0
model: {{num_layers: 6, num_experts: 16, top_k: 2, hidden_size: 4096, expert_hidden_size: 2048}}
"""


def planned(folder: Path, text: str, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    """Write a spec, plan it, return the JSON."""
    spec = folder / "spec.yaml"
    spec.write_text(text)
    capsys.readouterr()
    assert run(["plan", "fabric", str(spec), "--json", *options]) == 0
    values = json.loads(capsys.readouterr().out)
    assert isinstance(values, dict)
    return values


def test_plan_of_a_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file gives the same bytes; every time is what the cost function says of the circuits."""
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    plan = planned(tmp_path, SYNTHETIC, capsys, "-o", str(out), "--html", str(page))
    assert plan == planned(tmp_path, SYNTHETIC, capsys) == json.loads(out.read_text())
    assert (plan["format"], plan["plan"]) == ("moe-placement-plan/1", "fabric")
    region = FabricRegion(num_servers=6, link_gbits=100.0)
    layers = plan["layers"]
    assert isinstance(layers, list)
    for layer in layers:
        circuits, demand = np.array(layer["circuits"]), np.array(layer["demand_bytes"])
        assert layer["time_s"] == all_to_all_time(circuits, demand, region)
        published_s = layer["time_of_method_s"]["published"]
        assert layer["lower_bound_s"] <= layer["time_s"] <= published_s * (1 + 1e-12)
    text = page.read_text()
    assert "All-to-all of each layer" in text
    assert "Fabrics of the same ports per server" in text


def test_terminal_says_the_answer_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence, then tables of methods and fabrics."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(SYNTHETIC)
    capsys.readouterr()
    assert run(["plan", "fabric", str(spec)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Optical circuits bring one all-to-all of every layer to ")
    assert "MixNet, Algorithm 1" in text
    assert "rail-optimised" in text


def test_plan_of_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Placement and circuits together are never slower than apart; homes that are dealt are told."""
    page = tmp_path / "plan.html"
    plan = planned(tmp_path, TRACED, capsys, "--html", str(page))
    placement = plan["placement"]
    assert isinstance(placement, dict)
    assert placement["time_s"] <= min(placement["separate_s"].values())
    device_LE = np.array(placement["device_of_expert"])
    assert device_LE.shape == (6, 16)
    assert (np.sort(device_LE, axis=1) == np.repeat(np.arange(8), 2)).all()
    assert "contiguous blocks" in str(plan["notes"])
    prediction = plan["prediction"]
    assert isinstance(prediction, dict)
    assert set(prediction["wrong_share"]) == {"transition", "last window", "mean"}
    assert "held-out windows" in page.read_text()


def test_example_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example names what exists: with a draw for its trace it is planned as it stands."""
    text = EXAMPLE.read_text().split("trace: ")[0] + "synthetic: {skew: 0.6, layers: 2}\n"
    plan = planned(tmp_path, text, capsys)
    region = plan["region"]
    assert isinstance(region, dict)
    assert (region["servers"], region["switch"], region["link_gbits"]) == (8, "polatis", 100)


def test_given_demand_and_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Demand in megabytes; the topology's switch, ports and adapters are taken."""
    text = """
topology:
  nodes: [{kind: h100, devices: 1, count: 2}]
  tiers: [{name: node}, {name: cluster, ports: 3}]
  optical_switch: {ports: 10, reconfiguration_ms: 10}
demand_mb: [[0, 8], [4, 0]]
"""
    plan = planned(tmp_path, text, capsys)
    region = plan["region"]
    assert isinstance(region, dict)
    assert (region["ocs_ports"], region["eps_ports"], region["switch_ports"]) == (1, 2, 10)
    assert (region["link_gbits"], region["reconfiguration_s"]) == (400, 0.01)
    # 8 MB over three links of 50 GB/s.
    assert plan["time_s"] == pytest.approx(8e6 / 150e9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("delay_ms", [0, 0.05, 2500])
def test_schedule_is_never_worse_than_either_rule(training: bool, delay_ms: float) -> None:
    """Neither never changing circuits nor changing them at every layer is faster."""
    from placement.planning.fabric import OpticalSwitch

    switch = OpticalSwitch(name="switch", ports=500, reconfiguration_s=delay_ms / 1e3)
    region = FabricRegion(num_servers=5, ocs_ports=2, link_gbits=100.0, switch=switch)
    demand = synthetic_demand(5, skew=1.2, seed=1, num_layers=3)
    plan = plan_fabric(region, demand=demand, timing=Timing(training=training, window_s=2e-5))
    assert plan.schedule.time_s <= min(plan.always_keep_s, plan.always_change_s)
    if delay_ms == 0:
        assert plan.schedule.time_s == pytest.approx((4 if training else 2) * plan.time_s)
    if delay_ms == 2500:
        assert plan.schedule.num_changes == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("synthetic: {}", "servers is missing"),
        ("servers: 4", "give one of demand_mb, synthetic and trace, not none"),
        ("servers: 4\nsynthetic: {}\ndemand_mb: [[1]]", "not demand_mb and synthetic"),
        ("servers: 4\nsynthetic: {}\nbatch_tokens: 5", "batch_tokens has no effect without a trace"),
        ("servers: 4\nsynthetic: {}\nswitch: polatsi", "did you mean 'polatis'"),
        ("servers: 4\nsynthetic: {}\npairing: both", "pairing must be directed or paired"),
        ("servers: 4\nsynthetic: {}\ntraining: 1", "training must be true or false"),
        ("servers: 4\nsynthetic: {}\nprices_gbits: 300", "no prices for links of 300"),
        ("servers: 4\nsynthetic: {}\noversubscription: 0.5", "it must be 1 or more"),
        ("servers: 4\nsynthetic: {skw: 1}", "did you mean 'skew'"),
        ("servers: 4\ndemand_mb: [[0, 1], [1, 0]]", "a matrix of 4 rows of 4 numbers"),
        ("servers: 3\ndemand_mb: [[0, 1], [1]]", "a matrix of 3 rows"),
        ("servers: 5\ntopology: h100:4x2\nsynthetic: {}", "servers is 5, the topology has 4 nodes"),
        (f"servers: 4\ntrace: {BYTE16}", "topology is missing"),
    ],
)
def test_bad_specs_are_told_in_a_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line that says what is wrong."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(text)
    capsys.readouterr()
    assert run(["plan", "fabric", str(spec)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err


def test_switch_without_enough_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3, with what would fit."""
    spec = tmp_path / "spec.yaml"
    spec.write_text("servers: 100\nsynthetic: {}\n")
    capsys.readouterr()
    assert run(["plan", "fabric", str(spec)]) == 3
    assert "at most 83 such servers" in capsys.readouterr().err
