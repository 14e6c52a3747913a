"""``moe-placement plan cross-dc``: the example runs, figures agree everywhere, bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import placement
from placement.cli.app import run
from placement.planning.cross_dc import EvenLoad, Level, best_sizes
from placement.tasks.plan_cross_dc import group_domains, plan_cross_dc_from, window_counts
from placement.tasks.plan_spec import PlanTraffic, read_spec, read_traffic
from traces.store import write_npz
from traces.synthesize import synthesize
from traces.trace import Trace

EXAMPLE = Path(placement.__file__).parents[1] / "examples" / "plans" / "cross-dc.yaml"

SPEC: dict[str, Any] = {
    "levels": [
        {"name": "dc", "size": 4, "bandwidth_gbits": 10, "latency_us": 20},
        {"name": "gpu", "size": 2, "bandwidth_gbps": 50},
    ],
    "model": {
        "num_layers": 2,
        "num_experts": 8,
        "top_k": 2,
        "hidden_size": 1024,
        "expert_hidden_size": 2048,
    },
    "tokens_per_gpu": 1000,
    "pre_expert_ms": 2,
    "nodes": 0,
}


def spec_file(folder: Path, **changes: Any) -> Path:
    """Write a plan file; None takes a key out."""
    values = {key: value for key, value in {**SPEC, **changes}.items() if value is not None}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Write a trace of four domains and return its path."""
    made = synthesize(num_tokens=4000, num_layers=2, num_experts=8, top_k=2, sequence_tokens=50, seed=1)
    domains = Trace(
        experts_TLK=made.experts_TLK,
        num_experts=8,
        domain_T=np.arange(4000) // 1000,
        domain_names=("<b>oslo</b>", "lima", "rome", "kyiv"),
    )
    path = tmp_path / "trace.npz"
    write_npz(domains, path)
    return path


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run the command and return what it prints as JSON."""
    capsys.readouterr()
    assert run(["plan", "cross-dc", *arguments, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_the_example_runs_and_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The committed example, without its integer program: bound <= program < best uniform < plain."""
    values = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    values |= {"nodes": 0, "trace": str(EXAMPLE.parent / values["trace"])}
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    plan = planned(capsys, str(path))
    assert (plan["format"], plan["plan"]) == ("moe-placement-plan/1", "cross-dc")
    assert plan["break_even_tokens"] == 1.5 * 4096
    routed = plan["routed"]
    fitted = {policy["name"]: policy["fitted_s"] for policy in routed["policies"]}
    plain_s, uniform_s, *_ = fitted.values()
    assert routed["lower_bound_s"] <= routed["step_s"] == min(fitted.values()) < uniform_s < plain_s
    held_out = [policy["held_out_s"] for policy in routed["policies"]]
    assert held_out[-1] < held_out[1] < held_out[0]
    assert (routed["held_out_windows"], len(plan["data_centres"])) == (8, 9)


def test_without_a_trace_the_model_alone_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes follow from the file's units: 4.1 MB of tokens, one 12.6 MB expert, 1.25 and 50 GB/s."""
    plan = planned(capsys, str(spec_file(tmp_path)))
    load = EvenLoad(
        levels=(
            Level(name="dc", size=4, bandwidth=1.25e9, latency_s=20e-6),
            Level(name="gpu", size=2, bandwidth=50e9),
        ),
        data_bytes=1000 * 2 * 2048,
        expert_bytes=6 * 1024 * 2048,
        pre_expert_s=2e-3,
    )
    best = best_sizes(load)
    assert [level["domain"] for level in plan["even"]["levels"]] == list(best.sizes)
    assert plan["even"]["step_s"] == pytest.approx(best.step_s)
    assert plan["routed"] is None


def test_text_page_and_file_agree(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the same bytes; the terminal's first line heads the page; names cannot smuggle HTML."""
    spec, html, output = str(spec_file(tmp_path)), tmp_path / "plan.html", tmp_path / "plan.json"
    arguments = ["plan", "cross-dc", spec, "--trace", str(trace), "--html", str(html), "-o", str(output)]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    first, page = output.read_bytes(), html.read_bytes()
    assert run(arguments) == 0
    assert (output.read_bytes(), html.read_bytes()) == (first, page)
    assert said.startswith("Prefetch ")
    assert said.splitlines()[0] in page.decode()
    assert "<b>oslo</b>" not in page.decode()
    for chart in ("sizes-0", "sizes-1", "pairs", "copies", "scale"):
        assert f'id="{chart}-data"' in page.decode()
    assert json.loads(first) == planned(capsys, spec, "--trace", str(trace))


def test_prefetches_keep_within_the_memory_of_the_file(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An expert is 12 MiB: 0.03 GiB hold two per layer, 0.04 GiB three over both."""
    spec = spec_file(tmp_path, replica_gib=0.03, replica_total_gib=0.04, homes="contiguous")
    prefetch = planned(capsys, str(spec), "--trace", str(trace))["routed"]["prefetch"]
    assert max(len(row) for layer in prefetch for row in layer) <= 2
    assert max(sum(len(layer[centre]) for layer in prefetch) for centre in range(4)) <= 3


def test_data_centres_can_be_groups_or_stretches(trace: Path) -> None:
    """Two named groups, and five stretches of 800 tokens in recorded order."""
    read = read_traffic(str(trace))
    groups = {"north": ["<b>oslo</b>", "kyiv"], "south": ["lima", "rome"]}
    grouped = group_domains(read, groups, source="spec")
    assert grouped.names == ("north", "south")
    assert np.bincount(grouped.centre_T).tolist() == [2000, 2000]
    cut = group_domains(read, 5, source="spec")
    assert np.bincount(cut.centre_T).tolist() == [800] * 5
    counts_WLCE = window_counts(read, cut)
    # 16 windows of 50 tokens; top-2, so every token counts twice.
    assert counts_WLCE.shape == (16, 2, 5, 8)
    assert counts_WLCE.sum(axis=3) == pytest.approx(np.full((16, 2, 5), 2.0))


def test_windows_count_what_was_routed(trace: Path) -> None:
    """The second window of the third data centre, recounted."""
    read: PlanTraffic = read_traffic(str(trace))
    centres = group_domains(read, None, source="spec")
    counts_WLCE = window_counts(read, centres, window_tokens=100)
    tokens = np.nonzero(centres.centre_T == 2)[0][100:200]
    expected = np.bincount(read.experts_TLK[tokens, 1].ravel(), minlength=8) / 100
    assert counts_WLCE[1, 1, 2] == pytest.approx(expected)


def test_times_before_the_experts_follow_from_flops(tmp_path: Path) -> None:
    """One dense layer before MoE layers 1 and 2: (1 + 1) attention + 1 dense, then attention alone.

    Attention: 1000 tokens x (2 x 4 x 1024^2 + 2 x 512 x 1024); dense: 1000 x 2 x 3 x 1024 x 3000 FLOPs.
    """
    model = SPEC["model"] | {"num_decoder_layers": 3, "moe_layer_ids": [1, 2]}
    computed = {
        "device": "h100",
        "sequence_length": 512,
        "transformer": {"num_attention_heads": 8, "dense_hidden_size": 3000},
    }
    plan = plan_cross_dc_from(
        read_spec(spec_file(tmp_path, model=model, pre_expert_ms=None, pre_expert=computed))
    )
    attention, dense = 1000 * (8 * 1024**2 + 2 * 512 * 1024), 1000 * 6 * 1024 * 3000
    assert plan.load.pre_expert_s == pytest.approx((3 * attention + dense) / 2 / 794.5e12)


def test_too_little_memory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 8 GPUs holds one expert of 12 MiB; with room for none the text says what all domains need."""
    spec = spec_file(tmp_path, replica_gib=0.0, pre_expert_ms=100)
    plan = planned(capsys, str(spec))
    assert [level["domain"] for level in plan["even"]["levels"]] == [1, 1]
    assert plan["even"]["unlimited_memory"]["domains"] == [4, 2]
    assert plan["even"]["unlimited_memory"]["replica_bytes_per_device"] == 7 * 12 * 2**20
    assert run(["plan", "cross-dc", str(spec)]) == 0
    assert "Memory is short: with 0.08203 GiB on each device" in capsys.readouterr().out


def test_levels_may_come_from_a_topology(tmp_path: Path) -> None:
    """Four nodes of eight: the network between them first, each at what all-to-alls achieve of it."""
    plan = plan_cross_dc_from(read_spec(spec_file(tmp_path, levels=None, topology="h100:4x8")))
    outer, inner = plan.load.levels
    assert (outer.size, inner.size) == (4, 8)
    assert (outer.bandwidth, inner.bandwidth) == pytest.approx((0.45 * 50e9, 0.55 * 450e9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levles": 1}, "unknown key 'levles'; did you mean 'levels'?"),
        ({"tokens_per_gpu": None}, "tokens_per_gpu is missing"),
        ({"topology": "h100:2x8"}, "give either levels or topology"),
        ({"pre_expert_ms": None}, "give either pre_expert_ms or pre_expert"),
        ({"pre_expert_ms": [1, 2, 3]}, "one of 0 or more for each of 2 layers"),
        ({"levels": [{"name": "dc", "size": 1, "bandwidth_gbps": 1}]}, r"levels[0].size is 1"),
        ({"levels": [{"name": "dc", "size": 2, "bandwidth_gbps": 0}]}, "its 2 members are disconnected"),
        ({"levels": [{"name": "dc", "size": 2}]}, "must give bandwidth_gbits (Gb/s) or bandwidth_gbps"),
        ({"training": 1}, "training must be true or false, not 1"),
        ({"compression": 0.5}, "compression is 0.5; it must be 1 or more"),
        ({"homes": "far"}, "homes must be chosen or contiguous, not 'far'"),
        ({"data_centres": 3}, "level 'dc' has 4; set its size, or group domains with data_centres"),
        ({"data_centres": 1}, "data_centres is 1; it must lie within 2..4000"),
        ({"data_centres": {"a": ["lima"], "b": ["lma"]}}, "has no domain 'lma'; did you mean 'lima'?"),
        ({"data_centres": {"a": ["lima"], "b": ["lima"]}}, "domain 'lima' is given twice"),
        ({"window_tokens": 800}, "1 windows of 800; one to fit and one to judge are needed"),
        ({"model": SPEC["model"] | {"num_experts": 16}}, "experts is 8, model 'plan' has 16"),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path,
    trace: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    """Exit code 2, one line that names what is wrong, nothing written."""
    output = tmp_path / "plan.json"
    path = spec_file(tmp_path, **changes)
    assert run(["plan", "cross-dc", str(path), "--trace", str(trace), "-o", str(output)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not output.exists()


def test_a_trace_of_one_domain_needs_to_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message says how."""
    made = synthesize(num_tokens=400, num_layers=2, num_experts=8, top_k=2, sequence_tokens=50, seed=1)
    write_npz(Trace(experts_TLK=made.experts_TLK, num_experts=8), tmp_path / "one.npz")
    assert run(["plan", "cross-dc", str(spec_file(tmp_path)), "--trace", str(tmp_path / "one.npz")]) == 2
    assert "set data_centres to a number to cut it into that many stretches" in capsys.readouterr().err
