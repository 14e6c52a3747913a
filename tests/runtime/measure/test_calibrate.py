"""Calibrations from end to end: alone, by three ranks of a node, and by two nodes of two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import placement
from placement.calibration import read_calibration
from placement.errors import InputError
from placement.model import preset_model
from placement.runtime.measure import Pace, Sizes, calibrate
from placement.topology import parse_topology

SCRIPT = Path(__file__).with_name("one_rank.py")
ROOT = Path(placement.__file__).parents[1]
LIMIT_S = 90.0

TINY = Sizes(
    tokens_per_expert=(1, 4),
    active_shares=(1.0, 0.5),
    uneven_tokens=(4,),
    uneven_exponents=(1.0,),
    exchange_MiB=(0.0625, 0.25),
    pairs=(16, 64),
    hbm_bytes=1 << 20,
    flush_bytes=0,
    launches=3,
    shrink=64,
    pace=Pace(warmups=1, least=2, most=3, budget_ms=1.0, longest_ms=60_000.0),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(folder: Path, *, world: int) -> list[dict[str, Any]]:
    """Start ranks as a launcher does, wait for all and return what each wrote."""
    shared = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(SCRIPT), str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + LIMIT_S
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Four ranks, of which three run most."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), world=4)


@pytest.fixture(scope="module")
def three_ranks(four_ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The three."""
    return four_ranks[:3]


@pytest.fixture(scope="module")
def two_nodes(four_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What all four measured as two nodes of two."""
    contents: dict[str, Any] = four_ranks[0]["results"]["all: nodes of 2"]
    return contents


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    told: list[str] = []
    contents = calibrate(
        models=("olmoe",), devices_per_node=None, quick=True, progress=told.append, sizes=TINY
    )
    assert contents is not None
    return {**json.loads(json.dumps(contents)), "told": told}


def check_points(points: Sequence[Mapping[str, Any]]) -> None:
    """Every point has a positive time within its spread."""
    for point in points:
        low, high = point["spread"]
        assert 0 < low <= point["ms"] <= high


def check_curve(curve: Sequence[Sequence[float]], spread: Sequence[Sequence[float]]) -> None:
    """Every point has a positive time within its spread."""
    assert len(curve) == len(spread)
    for (mib, ms), (low, high) in zip(curve, spread, strict=True):
        assert mib > 0
        assert 0 < low <= ms <= high


def test_one_process_measures_what_needs_no_other(alone: dict[str, Any]) -> None:
    """Experts, memory and rows are there; exchanges are not, and the file says so."""
    (points,) = alone["expert_ffn_ms"].values()
    assert [(point["active_experts"], point["tokens_per_expert"]) for point in points] == [
        (64, 1),
        (64, 4),
        (32, 1),
        (32, 4),
    ]
    check_points(points)
    assert alone["hbm_gb_s"] > 0
    assert alone["launch_ms"] > 0
    assert not {"all_to_all_ms_by_MiB_sent_per_rank", "migration_gb_s", "counts_exchange_ms"} & set(alone)
    assert any("exchanges between GPUs" in note for note in alone["notes"])
    assert alone["transport"] == "none: one process"
    assert [line for line in alone["told"] if "olmoe-1b-7b" in line]


def test_uneven_loads_keep_their_counts(alone: dict[str, Any]) -> None:
    """An uneven point tells every expert's tokens: here 4 each on average, the most popular far more."""
    (points,) = alone["expert_ffn_uneven_ms"].values()
    (point,) = points
    assert sum(point["counts"]) == 4 * 64
    assert max(point["counts"]) > 16
    check_points(points)


def test_rows_are_measured_for_every_width(alone: dict[str, Any]) -> None:
    """Every step has every number of pairs; 2048 / 64 is the width."""
    for step in ("prepare_ms", "unpermute_ms", "expand_ms", "reduce_ms"):
        assert [(point["rows"], point["hidden"]) for point in alone[step]] == [(16, 32), (64, 32)]
        check_points(alone[step])


def test_what_takes_too_long_is_left_out_and_told() -> None:
    """A limit of no time leaves every curve out, and notes say which."""
    contents = calibrate(
        models=("olmoe",),
        devices_per_node=None,
        quick=True,
        progress=lambda _line: None,
        sizes=replace(TINY, pace=Pace(warmups=0, longest_ms=0.0)),
    )
    assert contents is not None
    assert contents["expert_ffn_ms"] == {}
    assert "hbm_gb_s" not in contents
    assert "prepare_ms" not in contents
    notes = contents["notes"]
    assert isinstance(notes, list)
    assert "loads of olmoe-1b-7b: 4 of 4 took too long and were left out" in notes


def test_loads_that_do_not_fit_are_left_out_and_told() -> None:
    """Rows for 64 experts with 1 token fit here, with 4 they do not."""
    contents = calibrate(
        models=("olmoe",),
        devices_per_node=None,
        quick=True,
        progress=lambda _line: None,
        # Widths 32 and 16: a pair takes 2 bytes of 2 * 32 + 2 * 16 + 2 * 16 numbers.
        sizes=replace(TINY, activation_bytes=128 * 2 * 100, pairs=(16,)),
    )
    assert contents is not None
    curves, notes = contents["expert_ffn_ms"], contents["notes"]
    assert isinstance(curves, dict)
    assert isinstance(notes, list)
    assert [point["tokens_per_expert"] for point in curves["olmoe-1b-7b"]] == [1, 1]
    assert any("more than 100 pairs do not fit" in note for note in notes)


def test_an_unknown_model_is_one_line() -> None:
    """The nearest preset is named."""
    with pytest.raises(InputError, match="unknown model 'olmo'"):
        calibrate(models=("olmo",), devices_per_node=None, quick=True, progress=lambda _line: None)


def test_one_process_is_no_two_devices() -> None:
    """Nodes of two are not filled by one rank."""
    with pytest.raises(InputError, match="1 ranks do not fill nodes of 2 devices"):
        calibrate(models=(), devices_per_node=2, quick=True, progress=lambda _line: None)


def test_gradients_stay_on_afterwards(alone: dict[str, Any]) -> None:
    """Measuring switches gradients off for itself alone."""
    assert alone["dtype"] == "bfloat16"
    assert torch.is_grad_enabled()


def test_all_ranks_end_and_the_first_has_the_contents(three_ranks: list[dict[str, Any]]) -> None:
    """The first rank alone has contents, and alone tells of progress."""
    assert three_ranks[0]["results"]["good"]["world_size"] == 3
    assert [rank["results"]["good"] for rank in three_ranks[1:]] == [None, None]
    assert three_ranks[0]["told"]
    assert [rank["told"] for rank in three_ranks[1:]] == [[], []]


def test_provenance_is_complete(three_ranks: list[dict[str, Any]]) -> None:
    """The file says what was measured, when, and over what."""
    contents = three_ranks[0]["results"]["good"]
    head = {key: contents[key] for key in ("format", "gpu", "dtype", "measured_at", "devices_per_node")}
    assert head == {
        "format": "moe-placement-calibration/1",
        "gpu": "CPU",
        "dtype": "bfloat16",
        "measured_at": "2026-01-02T03:04:05Z",
        "devices_per_node": 3,
    }
    assert contents["torch"] == torch.__version__
    assert "gloo" in contents["transport"]


def test_curves_have_the_points_asked_for(three_ranks: list[dict[str, Any]]) -> None:
    """Experts are split over the ranks: 64 and 8 over 3 are 22 and 3; exchanges are rounded to whole rows."""
    contents = three_ranks[0]["results"]["good"]
    for label, local in (("olmoe-1b-7b", 22), ("mixtral-8x7b", 3)):
        points = contents["expert_ffn_ms"][label]
        assert len(points) == 4
        assert {point["local_experts"] for point in points} == {local}
        check_points(points)
        check_points(contents["expert_ffn_uneven_ms"][label])
        assert contents["expert_shapes"][label]["local_experts"] == local
    curve = contents["all_to_all_ms_by_MiB_sent_per_rank"]
    assert [point[0] for point in curve] == [21 * 3 / 1024, 85 * 3 / 1024]
    check_curve(curve, contents["spread"]["all_to_all_ms_by_MiB_sent_per_rank"])
    assert contents["counts_exchange_ms"] > 0


def test_an_odd_rank_only_watches_migration(three_ranks: list[dict[str, Any]]) -> None:
    """Two of three ranks exchange experts; there is a rate for either model, one way and both ways."""
    contents = three_ranks[0]["results"]["good"]
    assert set(contents["migration_gb_s"]) == {"node"}
    assert [(row["bytes"], row["both_ways"]) for row in contents["migration"]] == [
        (3 * 32 * 16 * 2, False),
        (3 * 32 * 16 * 2, True),
        (3 * 64 * 224 * 2, False),
        (3 * 64 * 224 * 2, True),
    ]
    assert contents["migration_gb_s"]["node"] == contents["migration"][-1]["gb_s"] > 0


def test_nodes_of_one_have_the_outer_tier_alone(three_ranks: list[dict[str, Any]]) -> None:
    """There is nothing inside a node to measure."""
    contents = three_ranks[0]["results"]["few: nodes of 1"]
    assert list(contents["all_to_all_ms_by_tier"]) == ["cluster"]
    assert list(contents["migration_gb_s"]) == ["cluster"]
    assert contents["tier_ranks"] == {"cluster": 3}


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("nodes of 2", "3 ranks do not fill nodes of 2 devices; give --devices-per-node a divisor of 3"),
        ("no such model", "unknown model 'no-such-model'"),
        ("other models", "the ranks disagree about models: rank 0 has ('olmoe', 'mixtral-8x7b'), rank 1 has"),
        ("other nodes", "the ranks disagree about devices_per_node: rank 0 has None, rank 1 has 1"),
    ],
)
def test_every_rank_says_what_is_wrong(
    three_ranks: list[dict[str, Any]], scenario: str, message: str
) -> None:
    """The same line on each rank, and none hangs."""
    errors = [rank["results"][f"few: {scenario}"]["error"] for rank in three_ranks]
    assert len(set(errors)) == 1
    assert errors[0].startswith(message)
    assert "\n" not in errors[0]


def test_a_lost_rank_is_told_by_the_others(four_ranks: list[dict[str, Any]]) -> None:
    """One of four left before the measurement: the others end, with a line each."""
    results = [rank["results"]["all: one is lost"] for rank in four_ranks]
    assert results.pop(1) is None
    for result in results:
        assert "could not go on" in result["error"]
        assert "\n" not in result["error"]


def test_tiers_are_measured_apart(two_nodes: dict[str, Any]) -> None:
    """Two nodes of two: within them, and along rails between them."""
    assert two_nodes["tier_ranks"] == {"node": 2, "cluster": 2}
    for tier in ("node", "cluster"):
        curve = two_nodes["all_to_all_ms_by_tier"][tier]
        assert [point[0] for point in curve] == [0.0625, 0.25]
        check_curve(curve, two_nodes["spread"]["all_to_all_ms_by_tier"][tier])
        assert two_nodes["migration_gb_s"][tier] > 0
    assert any("emulated" in note for note in two_nodes["notes"])


def test_the_file_reads_back(
    three_ranks: list[dict[str, Any]], two_nodes: dict[str, Any], tmp_path: Path
) -> None:
    """The cost model's curves come from it."""
    for contents in (three_ranks[0]["results"]["good"], two_nodes):
        path = tmp_path / "calibration.json"
        path.write_text(json.dumps(contents), encoding="utf-8")
        calibration = read_calibration(path)
        topology = parse_topology("h100:1x2")
        olmoe = preset_model("olmoe")
        assert calibration.unit == "s"
        expert = calibration.expert_curve(topology.kinds[0], olmoe)
        assert float(expert(0)) == 0 < float(expert(4))
        exchange = calibration.exchange_curve(topology.tiers[0], olmoe, phase="dispatch")
        assert 0 < float(exchange(0)) <= float(exchange(1000))
