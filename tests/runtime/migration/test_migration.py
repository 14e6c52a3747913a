"""Live migration over gloo ranks: outputs stay, optimizer state follows, failures leave a whole placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import migration_checks as checks
import numpy as np
import pytest
import torch
from parallel_checks import loss_of, outputs_of, tokens_of, whole_model
from ranks import Ranks, ranks

from placement.errors import InputError
from placement.plan import Placement
from placement.runtime.migration.migrate import migrate
from placement.runtime.migration.setup import Options
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import expert_parallel

pytestmark = [pytest.mark.model, pytest.mark.slow]

TOLERANCE = 1e-5


def same_on_all(results: list[dict[str, Any]], *names: str) -> None:
    for name in names:
        for one in results[1:]:
            assert np.array_equal(one[name], results[0][name]), name


@pytest.mark.parametrize(
    ("seed", "how"),
    [
        (1, {}),
        (2, {"staging": 2}),
        (3, {"commit": "all"}),
        (4, {"pack_layers": True, "exact_rows": True}),
        (5, {"chunk_bytes": 3000}),
        (6, {"commit": "all", "chunk_bytes": 10**9, "exact_rows": True}),
    ],
)
def test_a_model_that_runs(group: Ranks, seed: int, how: dict[str, Any]) -> None:
    """Every pass gives the same outputs, all ranks switch after the same pass, every bit arrives."""
    results = group.run(checks.migrate_while_running, seed, how)
    same_on_all(results, "map_LS", "passes", "status", "version")
    for one in results:
        assert one["status"] == "done"
        assert one["overlapped"]
        assert one["sets_are_wanted"]
        assert one["rows_are_wanted"] or not how.get("exact_rows")
        assert one["wrong_rows"] == []
        assert max(one["worst"], one["difference"]) <= TOLERANCE
        assert one["version"] == 1
    check_reports(results)


def test_experts_with_biases(group: Ranks) -> None:
    """Four tensors an expert, in other orders of memory."""
    for one in group.run(checks.migrate_while_running, 7, {}, "gpt_oss"):
        assert one["status"] == "done"
        assert one["wrong_rows"] == []
        assert max(one["worst"], one["difference"]) <= TOLERANCE


def test_advancing_waits_for_nobody(group: Ranks) -> None:
    """A rank may advance while the others do not even look; nothing is switched without them."""
    assert group.run(checks.advance_alone) == [True] * 3


def test_part_of_the_ranks(group: Ranks) -> None:
    """A mesh of some ranks migrates by itself, and again with other groups."""
    assert group.run(checks.migrate_some_ranks) == [[True, True], [], [True, True]]


def check_reports(results: list[dict[str, Any]]) -> None:
    """What was planned is sent and received in the memory foreseen, and every tensor was checked."""
    reports, plan = [one["report"] for one in results], results[0]["plan"]
    assert [one.sent_bytes for one in reports] == plan["sent_bytes"]
    assert [one.received_bytes for one in reports] == plan["received_bytes"]
    assert [one.extra_bytes for one in reports] == plan["peak_extra_bytes"]
    assert sum(plan["received_bytes"]) == plan["total_bytes"] > 0
    # A message holds one expert or several, or a chunk of one.
    assert all((one.checks > 0) == (one.received_bytes > 0) for one in reports)
    assert all(one.rounds == one.rounds_planned for one in reports)
    assert all((one.transfer_s > 0) == (one.gb_per_s > 0) for one in reports)


@pytest.mark.parametrize("how", [{}, {"commit": "all", "overlap": False}, {"exact_rows": True, "staging": 3}])
def test_all_at_once(group: Ranks, how: dict[str, Any]) -> None:
    """`run` carries everything out in one call."""
    results = group.run(checks.migrate_now, 11, how)
    same_on_all(results, "map_LS")
    for one in results:
        assert one["sets_are_wanted"]
        assert one["wrong_rows"] == []
        assert one["difference"] <= TOLERANCE
        assert one["version"] == 41
    check_reports(results)


@pytest.mark.parametrize("how", ["step by step", "between micro-batches"])
def test_training_goes_on_as_if_nothing_had_moved(group: Ranks, how: str) -> None:
    """Weights, both moments and gradients follow their experts."""
    for one in group.run(checks.train, 3, how):
        assert max(one.values()) <= TOLERANCE, max(one, key=lambda name: one[name])


@pytest.mark.parametrize("how", [{}, {"commit": "all"}, {"overlap": False}, {"staging": 2}])
def test_a_spoilt_copy_is_dropped_by_all(group: Ranks, how: dict[str, Any]) -> None:
    """All ranks say why and go on with the placement of the last switch; the next migration works."""
    results = group.run(checks.spoil_then_mend, 21, how)
    for index in (0, 1):
        check_spoilt([one[index] for one in results])
    mended = [one[2] for one in results]
    same_on_all(mended, "map_LS")
    for one in mended:
        assert one["status"] == "done"
        assert np.array_equal(one["map_LS"], one["wanted"])
        assert one["wrong_rows"] == []


def check_spoilt(results: list[dict[str, Any]]) -> None:
    """Failed on all, the last switch's placement whole on all."""
    same_on_all(results, "map_LS", "failure")
    for one in results:
        assert one["status"] == "failed"
        assert "to rank 1 with a wrong checksum" in one["failure"]
        rounds = one["report"].rounds
        assert rounds < one["report"].rounds_planned
        if rounds:
            assert np.array_equal(one["map_LS"], one["states"][rounds - 1])
        assert one["wrong_rows"] == []
        assert one["difference"] <= TOLERANCE


def test_a_rank_that_comes_late(group: Ranks) -> None:
    """All drop the round and say why; copies may still be under way, so that a new link is needed."""
    results = group.run(checks.come_late)
    same_on_all(results, "failure")
    for one in results:
        assert one["status"] == "failed"
        assert "were not through within 2 s" in one["failure"]
        assert one["report"].rounds == 0
        assert one["wrong_rows"] == []
        assert [message.startswith("this link of migrations is broken") for message in one["messages"]] == [
            True
        ]
        assert one["sets_are_wanted"]  # after the last try, over a new link


def test_no_memory_on_one_rank(group: Ranks) -> None:
    """It says so with the next pass, and all stay where they are."""
    results = group.run(checks.run_out_of_memory)
    same_on_all(results, "failure", "map_LS")
    for one in results:
        assert one["status"] == "failed"
        assert "rank 1 has no memory for 1 waiting experts" in one["failure"]
        assert one["report"].rounds == 0
        assert one["difference"] <= TOLERANCE


def test_weights_that_change_on_the_way(group: Ranks) -> None:
    """Copies of weights that somebody trains unsaid are dropped, not used."""
    for one in group.run(checks.change_weights_meanwhile):
        assert one["overlapped"]
        assert one["status"] == "failed"
        assert "changed while they were copied: pass the optimizers" in one["failure"]
        assert one["report"].rounds == 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("slots", "slots lie on other devices|slots on the devices, in an order of its own"),
        ("other", "another placement or other options"),
        ("options", "another placement or other options"),
        ("state", r"preconditioner of .* is \[3, 3\]"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(group: Ranks, what: str, message: str) -> None:
    """One clear line each, and nothing hangs."""
    for one in group.outcomes(checks.refuse, what):
        with pytest.raises(InputError, match=message):
            raise one


def test_a_failure_that_cannot_be_told(group: Ranks) -> None:
    """Without passes a rank that failed ends by itself, after the time limit."""
    messages = group.run(checks.never_pass)
    assert "wrong checksum" in messages[1]
    assert "the other ranks did not answer" in messages[1]


@pytest.mark.parametrize(("world_size", "commit", "at_round"), [(3, "round", 1), (2, "all", 0)])
def test_a_lost_rank(tmp_path: Path, world_size: int, commit: str, at_round: int) -> None:
    """Survivors raise one clear line within the time limit and hold the placement of the last switch."""
    with ranks(world_size, tmp_path) as group:
        outcomes = group.outcomes(checks.lose_a_rank, commit, at_round, within_s=30.0)
    assert "died" in str(outcomes[1])
    survivors = [outcomes[rank] for rank in range(world_size) if rank != 1]
    same_on_all(survivors, "map_LS")
    for one in survivors:
        assert one["status"] == "failed"
        assert "the placement of the last switch is whole" in one["message"]
        assert "\n" not in one["message"]
        assert any(np.array_equal(one["map_LS"], state) for state in one["states"][: 1 + at_round])
        assert one["wrong_rows"] == []


def test_a_lost_rank_while_the_model_runs(tmp_path: Path) -> None:
    """The pass says so; the migration is abandoned and the old placement is whole."""
    with ranks(2, tmp_path) as group:
        outcomes = group.outcomes(checks.lose_a_rank_while_running, within_s=30.0)
    assert "died" in str(outcomes[1])
    for one in outcomes[:1]:
        assert "a rank is lost" in one["message"]
        assert one["failed"]
        assert one["kept"]
        assert one["wrong_rows"] == []


def test_one_rank_turns_its_rows() -> None:
    """Without other ranks only rows change places; Adam's moments with them."""
    placement = Placement(
        physical_to_logical_map_LS=np.array([[0, 1, 2, 3, 4, -1, 5]] * 2),
        device_of_slot_S=np.zeros(7, dtype=np.int64),
        num_experts=6,
        num_devices=1,
    )
    parallel = expert_parallel(whole_model("olmoe"), placement, Mesh.single())
    optimizer = torch.optim.AdamW(parallel.model.parameters(), lr=1e-3)
    tokens = tokens_of(0, 7)
    loss_of(outputs_of(parallel.model, tokens), 1).backward()
    optimizer.step()
    parameter = parallel.layers[0].parameters()["down_proj"]
    before = outputs_of(parallel.model, tokens)
    tensors = [parameter.detach(), parameter.grad, optimizer.state[parameter]["exp_avg"]]
    old = [one.clone() for one in tensors]
    after = placement.with_layers(np.array([[1, 2, 0, -1, 3, 4, 5], [5, 4, -1, 3, 2, 1, 0]]))
    migration = migrate(parallel, after, optimizers=[optimizer], options=Options(exact_rows=True))
    assert migration.run().moves == 0
    assert np.array_equal(parallel.placement.physical_to_logical_map_LS, after.physical_to_logical_map_LS)
    torch.testing.assert_close(outputs_of(parallel.model, tokens), before)
    for now, one in zip(tensors, old, strict=True):
        assert torch.equal(now[[0, 1, 2, 4, 5, 6]], one[[1, 2, 0, 3, 4, 6]])
        assert not now[3].any()
