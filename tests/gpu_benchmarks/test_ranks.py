"""The measurements themselves, on two ranks without GPUs."""

import csv
from collections.abc import Iterator
from pathlib import Path

import gpu_benchmark_checks as checks
import pytest
from ranks import Ranks, ranks

from benchmarks.gpu.replay import columns, write_layers
from placement.tasks.measured_layers import read_measured_layers


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Return two ranks."""
    with ranks(2, tmp_path_factory.mktemp("ranks")) as group:
        yield group


def test_replay_measures_alike_on_all_ranks(two: Ranks, prepared: Path, tmp_path: Path) -> None:
    """Layers, windows, exchanges and policies; the file of layers is what predictions are held against."""
    (cases, layers), other = two.run(checks.run_replay, str(prepared))
    assert [case["layer_ms"] for case in cases] == [case["layer_ms"] for case in other[0]]
    # 2 layers x 2 windows, 9 policies of the link and contiguous again; by pairs twice, without spare slots.
    assert len(cases) == 4 * 10 + 2 * 5
    assert len(layers) == 4 * 9 + 2 * 4
    assert all("training_ms" in case for case in cases)
    file = tmp_path / "layers.csv"
    write_layers(file, layers[:5])
    write_layers(file, layers[5:])
    with file.open() as text:
        assert next(csv.reader(text)) == columns(2)
    measured = read_measured_layers(file)
    assert len(measured) == len(layers)
    # 32 tokens a rank, 2 experts each.
    assert all(sum(row[f"pairs_0{j}"] for j in range(2)) == 64 for row in layers)
    assert all(0 < row["tokens_01"] <= 32 for row in layers)


def test_whole_models_run_with_forced_routing(two: Ranks, prepared: Path) -> None:
    """Forward passes and training steps of every window and policy with equal slots."""
    rows = two.run(checks.run_whole, str(prepared))[0]
    assert {(row["window"], row["training"]) for row in rows} == {
        (window, training) for window in {row["window"] for row in rows} for training in (False, True)
    }
    assert len(rows) == 2 * 2 * 5


def test_smoke_passes(two: Ranks) -> None:
    """All checks pass, and say what they checked."""
    rows = two.run(checks.run_smoke)[0]
    assert [row["check"] for row in rows if not row["passed"]] == []
    assert {"gpt_oss hierarchical gradients", "combine_rows torch.bfloat16"} <= {row["check"] for row in rows}


def test_migration_moves_and_changes_no_output(two: Ranks, prepared: Path) -> None:
    """Every variant moves the same experts back and forth."""
    rows = two.run(checks.run_migration, str(prepared))[0]
    assert len(rows) == 4
    assert all(row["experts moved"] > 0 and row["output changed by"] < 1e-5 for row in rows)
