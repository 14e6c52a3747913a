"""Files that say what to plan: what they name is found, what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from placement.errors import InputError
from placement.tasks.plan_spec import read_spec, read_traffic
from traces.store import write_npz
from traces.trace import Trace

MODEL = {"num_layers": 2, "num_experts": 4, "top_k": 2, "hidden_size": 8, "expert_hidden_size": 16}


def spec_of(folder: Path, text: str) -> Path:
    """Write a spec."""
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


def test_files_are_found_from_the_spec(tmp_path: Path) -> None:
    """A name beside the spec wins; another stays as it is, for the working folder."""
    (tmp_path / "trace.npz").touch()
    spec = read_spec(spec_of(tmp_path, "model: x"))
    assert spec.found("trace.npz") == str(tmp_path / "trace.npz")
    assert spec.found("elsewhere.npz") == "elsewhere.npz"


def test_topologies_by_name_file_and_mapping(tmp_path: Path) -> None:
    """All three ways give devices."""
    (tmp_path / "racks.yaml").write_text("nodes: [{kind: a40, devices: 2, count: 3}]")
    spec = read_spec(spec_of(tmp_path, "model: x"))
    assert spec.topology("h100:2x4").num_devices == 8
    assert spec.topology("racks.yaml").num_devices == 6
    assert spec.topology({"nodes": [{"kind": "t4", "devices": 5}]}).num_devices == 5


def test_models_by_name_and_mapping(tmp_path: Path) -> None:
    """A preset, and the fields of a model file; with attention where it is asked for."""
    spec = read_spec(spec_of(tmp_path, "model: x"))
    assert spec.model("olmoe").num_experts == 64
    model = spec.model(MODEL)
    assert (model.name, model.num_experts) == ("plan", 4)
    shape = spec.transformer({"num_attention_heads": 2, "vocabulary_size": 100}, model=model)
    assert (shape.num_attention_heads, shape.vocabulary_size, shape.attention_params) == (2, 100, 256)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold a mapping"),
        ("a: 1\na: 2", "given twice"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_no_spec_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """With the file's name."""
    with pytest.raises(InputError, match=f"plan.yaml.*{message}"):
        read_spec(spec_of(tmp_path, text))


def test_wrong_parts_are_named(tmp_path: Path) -> None:
    """Every message says where."""
    spec = read_spec(spec_of(tmp_path, "model: x"))
    with pytest.raises(InputError, match=r"plan.yaml: topology.*nodes is missing"):
        spec.topology({})
    with pytest.raises(InputError, match=r"transformer.num_attention_heads is missing"):
        spec.transformer({}, model=spec.model(MODEL))
    with pytest.raises(InputError, match=r"calibration must name a calibration file"):
        spec.calibration(3)
    with pytest.raises(InputError, match=r"unknown key 'modle'; did you mean 'model'\?"):
        read_spec(spec_of(tmp_path, "modle: x")).fields(known=("model",))


def test_traffic_keeps_tokens_and_domains(tmp_path: Path) -> None:
    """Expert ids, domains and their names; -1 where a trace knows no domain."""
    ids_TLK = np.array([[[0, 1]], [[2, 3]], [[1, 3]]], dtype=np.uint8)
    domains = np.array([0, 1, 1])
    known = Trace(experts_TLK=ids_TLK, num_experts=4, domain_T=domains, domain_names=("a", "b"))
    write_npz(known, tmp_path / "known.npz")
    write_npz(Trace(experts_TLK=ids_TLK, num_experts=4), tmp_path / "plain.npz")
    traffic, plain = (read_traffic(str(tmp_path / f"{name}.npz")) for name in ("known", "plain"))
    assert traffic.experts_TLK.tolist() == ids_TLK.tolist()
    assert (traffic.domain_T.tolist(), traffic.domain_names) == ([0, 1, 1], ("a", "b"))
    assert plain.domain_T.tolist() == [-1, -1, -1]
    assert (plain.num_experts, plain.origin.num_layers) == (4, 1)
