"""Verification accepts every correct placement and catches a wrong one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from placement.cli.verify import verify
from placement.errors import InputError, PlacementError
from placement.plan import EMPTY, Placement
from placement.runtime.hook import SlotRemap
from placement.runtime.samples import resolve_model
from placement.runtime.tiny import tiny_model
from placement.runtime.verify import RELATIVE_TOLERANCE, VerifyReport, verify_placement


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level model of 3 layers, 6 experts, context 32, in bfloat16."""
    folder = tmp_path_factory.mktemp("verify") / "tiny"
    model: Any = tiny_model("qwen3_moe", vocab_size=256, context=32)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two text files of 100 and 40 bytes."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("The quick brown fox jumps over it. " * 3)
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(bytes(range(48, 88)))
    return files


def _placement(num_layers: int = 3, num_experts: int = 6) -> Placement:
    """Reversed experts on two devices; expert 0 has two replicas, and one slot is empty."""
    row = [*range(num_experts - 1, -1, -1), EMPTY, 0]
    map_LS = np.tile(row, (num_layers, 1))
    half = num_experts // 2
    device_S = [0] * half + [1] * half + [0, 0]
    return Placement(
        physical_to_logical_map_LS=map_LS,
        device_of_slot_S=np.array(device_S),
        num_experts=num_experts,
        num_devices=2,
    )


def test_a_correct_placement_passes(checkpoint: Path, texts: list[Path]) -> None:
    """Outputs agree to float32 rounding, routing is the same, all weights come back."""
    report = verify_placement(checkpoint, _placement(), text_files=texts)
    assert report.ok
    assert report.restored
    assert report.max_abs_diff_restored == 0.0
    assert report.mean_abs_diff <= report.max_abs_diff <= 1e-5
    assert report.top1_agreement == report.routing_agreement == 1.0
    assert (report.tokens, report.dtype) == (140, "float32")
    assert report.tolerance == RELATIVE_TOLERANCE * report.logit_scale
    report.check()


def test_tokens_are_shared_between_files(checkpoint: Path, texts: list[Path]) -> None:
    """50 tokens of two files are 25 each; one token is of the first file alone."""
    assert verify_placement(checkpoint, _placement(), text_files=texts, max_tokens=50).tokens == 50
    assert verify_placement(checkpoint, _placement(), text_files=texts, max_tokens=1).tokens == 1


def test_short_files_are_not_filled_up(checkpoint: Path, texts: list[Path]) -> None:
    """A share larger than a file takes the file whole: 60 and 40 of 120."""
    assert verify_placement(checkpoint, _placement(), text_files=texts, max_tokens=120).tokens == 100


def test_a_wrong_slot_is_caught(checkpoint: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """When two experts answer for each other, the report fails and says by how much."""
    real = SlotRemap.slots
    swap = torch.tensor([1, 0, 2, 3, 4, 5, 6])
    monkeypatch.setattr(SlotRemap, "slots", lambda self, experts_TK: swap[real(self, experts_TK)])
    report = verify_placement(checkpoint, _placement(), text_files=texts)
    assert not report.ok
    assert report.restored
    assert report.max_abs_diff > 100 * report.tolerance
    with pytest.raises(PlacementError, match=r"changes the model's outputs: logits differ by up to [\d.]+, "):
        report.check()


def _report(**changes: Any) -> VerifyReport:
    fields: dict[str, Any] = {
        "max_abs_diff": 1e-6,
        "mean_abs_diff": 1e-7,
        "logit_scale": 4.0,
        "tolerance": 4e-4,
        "tokens": 10,
        "top1_agreement": 1.0,
        "routing_agreement": 1.0,
        "restored": True,
        "max_abs_diff_restored": 0.0,
        "dtype": "float32",
    }
    return VerifyReport(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restored": False}, "not bit for bit the same"),
        ({"max_abs_diff": 5e-4}, r"up to 0.0005, allowed are 0.0004 \(0.0001 of 4\)"),
        ({"max_abs_diff": float("inf")}, "up to inf"),
        ({"max_abs_diff_restored": 0.5}, r"up to 0\.5"),
    ],
)
def test_a_failing_report_says_why(changes: dict[str, Any], message: str) -> None:
    """Each way to fail has its line and the exit code 1."""
    assert _report().ok
    with pytest.raises(PlacementError, match=message) as caught:
        _report(**changes).check()
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "0 tokens to verify on"),
        ({"context": 33}, "33 tokens exceeds the model's 32"),
        ({"text_files": []}, "no text file given"),
    ],
)
def test_bad_options_are_refused(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    """Numbers out of range and an empty list of texts are input errors."""
    with pytest.raises(InputError, match=message):
        verify_placement(checkpoint, _placement(), **options)


def test_a_placement_of_another_model_is_refused(checkpoint: Path, texts: list[Path]) -> None:
    """Layers are compared before anything runs with the placement."""
    with pytest.raises(InputError, match="has 5 MoE layers, the model 3"):
        verify_placement(checkpoint, _placement(5), text_files=texts)


@pytest.mark.model
def test_the_sample_model_passes_on_the_sample_texts() -> None:
    """byte16 with reversed experts and a replica gives the same outputs on all ten domains."""
    report = verify_placement(resolve_model("byte16"), _placement(6, 16), max_tokens=1000)
    report.check()
    assert report.tokens == 1000
    assert report.max_abs_diff < 1e-4
    assert report.routing_agreement == 1.0


def _run_cli(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(verify)
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def placement_file(tmp_path: Path) -> Path:
    """The reversed placement as a file."""
    placement = _placement()
    content = {
        "format": "moe-placement/1",
        "model": {},
        "num_layers": placement.num_layers,
        "num_experts": placement.num_experts,
        "num_devices": placement.num_devices,
        "physical_to_logical_map": placement.physical_to_logical_map_LS.tolist(),
        "device_of_slot": placement.device_of_slot_S.tolist(),
    }
    file = tmp_path / "placement.json"
    file.write_text(json.dumps(content))
    return file


def test_the_command_prints_one_json_object(
    checkpoint: Path, texts: list[Path], placement_file: Path
) -> None:
    """--json gives the report's fields, and both texts were run."""
    result = _run_cli(
        str(placement_file),
        "--model",
        str(checkpoint),
        "--text",
        str(texts[0]),
        "--text",
        str(texts[1]),
        "--json",
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["ok"] is True
    assert printed["tokens"] == 140
    assert printed["max_abs_diff"] <= 1e-5


def test_the_command_prints_lines(checkpoint: Path, texts: list[Path], placement_file: Path) -> None:
    """Without --json a person reads the verdict first."""
    result = _run_cli(
        str(placement_file), "--model", str(checkpoint), "--text", str(texts[1]), "--context", "16"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("outputs unchanged on 40 tokens (float32)\n")
    assert "restored bit for bit           yes" in result.stdout


def test_the_command_fails_when_outputs_change(
    checkpoint: Path, texts: list[Path], placement_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong slot is printed and raised."""
    real = SlotRemap.slots
    monkeypatch.setattr(SlotRemap, "slots", lambda self, experts_TK: real(self, experts_TK).clamp(max=2))
    result = _run_cli(str(placement_file), "--model", str(checkpoint), "--text", str(texts[0]))
    assert result.stdout.startswith("OUTPUTS CHANGED")
    assert isinstance(result.exception, PlacementError)
