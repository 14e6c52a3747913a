"""Tests of the vLLM plugin on stand-ins for vLLM's policy package, as different versions have it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from formats.samples import place

from placement.formats.files import write_as
from placement.formats.protocol import FormatOptions
from placement.runtime import vllm_policy
from placement.runtime.vllm_policy import MAX_MOVES, PLACEMENT, SWITCH, register

L, E, R, G = 2, 4, 6, 2
TRIVIAL = torch.tensor([[0, 1, 2, 3, 0, 1]] * L)

# Expert 3 is hot in the first layer, expert 0 in the second.
WEIGHT = torch.tensor([[1.0, 1.0, 1.0, 30.0], [30.0, 1.0, 1.0, 1.0]])


class DefaultEplbPolicy:
    """vLLM 0.33's interface: one map, the old one as the last argument."""

    @classmethod
    def balanced_packing(cls) -> str:
        """Answer for what vLLM may call beside the one method."""
        return "theirs"

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Place experts round robin."""
        return torch.arange(num_replicas).repeat(len(weight), 1) % weight.shape[1]


class OlderEplbPolicy:
    """An older interface: three maps, and ranks called GPUs."""

    @classmethod
    def rebalance_experts(
        cls, weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Place experts round robin."""
        map_LR = torch.arange(num_replicas).repeat(len(weight), 1) % weight.shape[1]
        return map_LR, map_LR, map_LR


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that puts a vLLM with given policies in place and returns them."""
    for name in (PLACEMENT, MAX_MOVES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(SWITCH, "on")
    vllm_policy._load.cache_clear()
    vllm_policy._warn_once.cache_clear()

    def install(default: Any = DefaultEplbPolicy) -> dict[str, Any]:
        policies = {"default": default, "other": object()}
        for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        module = ModuleType("vllm.distributed.eplb.policy")
        module.EPLB_POLICIES = policies  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return policies

    return install


def rebalance(policy: Any, weight: torch.Tensor = WEIGHT, **changes: Any) -> torch.Tensor:
    """Ask a policy as vLLM does, by position."""
    given = {"replicas": R, "groups": 1, "nodes": 1, "ranks": G, "old": TRIVIAL, **changes}
    answer = policy.rebalance_experts(
        weight, given["replicas"], given["groups"], given["nodes"], given["ranks"], given["old"]
    )
    assert isinstance(answer, torch.Tensor)
    return answer


def check(map_LR: torch.Tensor) -> None:
    """Verify what vLLM needs: on the CPU, 64 bits, every expert there; and no expert twice on a rank."""
    assert (map_LR.device.type, map_LR.dtype, tuple(map_LR.shape)) == ("cpu", torch.int64, (L, R))
    for row in map_LR.tolist():
        assert set(row) == set(range(E))
        for rank in range(G):
            assert len(set(row[rank * R // G : (rank + 1) * R // G])) == R // G


def received(after_LR: torch.Tensor, before_LR: torch.Tensor) -> int:
    """Copies that ranks hold now and did not before."""
    sides = (map_LR.reshape(L * G, -1).tolist() for map_LR in (after_LR, before_LR))
    return sum(len(set(after) - set(before)) for after, before in zip(*sides, strict=True))


# -------------------------------------------------------------------------------------------------
# registering


def test_our_policy_takes_the_place_of_the_default(
    vllm: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """It is one of vLLM's kind, other policies stay, and doing it twice changes nothing."""
    policies = vllm()
    other = policies["other"]
    with caplog.at_level(logging.INFO, logger="vllm"):
        register()
    ours = policies["default"]
    assert issubclass(ours, DefaultEplbPolicy)
    assert ours.balanced_packing() == "theirs"
    assert policies["other"] is other
    assert "balances by its own means" in caplog.text
    register()
    assert policies["default"] is ours


def test_nothing_changes_unasked(
    vllm: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package may be installed for its other uses."""
    policies = vllm()
    monkeypatch.delenv(SWITCH)
    register()
    assert policies["default"] is DefaultEplbPolicy
    monkeypatch.setenv(MAX_MOVES, "8")
    register()
    assert policies["default"] is not DefaultEplbPolicy


def test_a_switch_of_unknown_position_is_named(
    vllm: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt switch is told, and leaves vLLM alone."""
    policies = vllm()
    monkeypatch.setenv(SWITCH, "perhaps")
    with caplog.at_level(logging.WARNING, logger="vllm"):
        register()
    assert policies["default"] is DefaultEplbPolicy
    assert "MOE_PLACEMENT_VLLM is 'perhaps'" in caplog.text


def test_it_may_be_switched_off(vllm: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment leaves vLLM as it is."""
    policies = vllm()
    monkeypatch.setenv(SWITCH, "off")
    register()
    assert policies["default"] is DefaultEplbPolicy


class _Strange:
    """A policy with another interface."""

    @classmethod
    def rebalance_experts(cls, placement: list[int], load: list[int]) -> list[int]:
        return placement


class _Answering(DefaultEplbPolicy):
    """A policy that answers with something unheard of."""

    @classmethod
    def rebalance_experts(cls, *args: Any, **kwargs: Any) -> Any:
        return {"map": 1}


class _Failing(DefaultEplbPolicy):
    """A policy that cannot be asked outside of vLLM."""

    @classmethod
    def rebalance_experts(
        cls, weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
    ) -> Any:
        raise RuntimeError("no process group")


class _Dict(DefaultEplbPolicy):
    @classmethod
    def rebalance_experts(
        cls, weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
    ) -> Any:
        return {}


@pytest.mark.parametrize(
    ("default", "reason"),
    [
        (_Strange, "its rebalance_experts takes placement, load"),
        (_Answering, "its rebalance_experts takes args, kwargs"),
        (_Failing, "RuntimeError: no process group"),
        (_Dict, "its policy answers with a dict"),
        (DefaultEplbPolicy(), "its default policy is a DefaultEplbPolicy, not a class"),
        (type("Empty", (), {}), "has no attribute 'rebalance_experts'"),
    ],
)
def test_an_unknown_version_is_left_alone(
    default: Any, reason: str, vllm: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log, and vLLM's own policy."""
    policies = vllm(default)
    register()
    assert policies["default"] is default
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_vllm_without_policies(
    vllm: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Versions before or after policies, and no vLLM at all, are no error."""
    vllm()
    monkeypatch.setattr(sys.modules["vllm.distributed.eplb.policy"], "EPLB_POLICIES", ["default"])
    register()
    monkeypatch.delattr(sys.modules["vllm.distributed.eplb.policy"], "EPLB_POLICIES")
    register()
    monkeypatch.setitem(sys.modules, "vllm.distributed.eplb.policy", None)
    register()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "its policies are no dictionary" in caplog.text


def test_a_wrong_setting_does_not_stop_the_server(
    vllm: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A number of moves that is none is told, and vLLM is left alone."""
    policies = vllm()
    monkeypatch.setenv(MAX_MOVES, "few")
    register()
    assert policies["default"] is DefaultEplbPolicy
    assert "MOE_PLACEMENT_VLLM_MAX_MOVES is 'few'" in caplog.text


# ---------------------------------------------------------------------------------------------------
# balancing


def test_it_balances(vllm: Callable[..., dict[str, Any]]) -> None:
    """The hot expert of each layer is on both ranks."""
    policies = vllm()
    register()
    map_LR = rebalance(policies["default"])
    check(map_LR)
    assert [row.count(expert) for row, expert in zip(map_LR.tolist(), (3, 0), strict=True)] == [2, 2]
    again = rebalance(policies["default"])
    assert torch.equal(map_LR, again)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bfloat16, torch.float64])
def test_loads_of_any_type(dtype: torch.dtype, vllm: Callable[..., dict[str, Any]]) -> None:
    """Counts are integers or floats, whatever the version."""
    policies = vllm()
    register()
    check(rebalance(policies["default"], WEIGHT.to(dtype)))


def test_a_profile_run_counts_nothing(vllm: Callable[..., dict[str, Any]]) -> None:
    """Zero loads are an answer too: nothing moves for them."""
    policies = vllm()
    register()
    map_LR = rebalance(policies["default"], torch.zeros(L, E))
    check(map_LR)
    assert received(map_LR, TRIVIAL) == 0


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_moves_are_limited(
    moves: int, vllm: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rebalance moves no more copies than allowed."""
    monkeypatch.setenv(MAX_MOVES, str(moves))
    policies = vllm()
    register()
    map_LR = rebalance(policies["default"])
    check(map_LR)
    assert received(map_LR, TRIVIAL) <= moves


@pytest.mark.parametrize(
    "old",
    [
        None,
        torch.tensor([[0, 0, 1, 2, 3, 1]] * L),  # twice on rank 0
        torch.tensor([[0, 1, 2, 3]] * L),  # before the number of slots changed
        torch.tensor([[0, 1, 2, 3, 0, -1]] * L),
        torch.tensor([[0, 1, 2, 0, 1, 2]] * L),  # expert 3 is nowhere
        torch.tensor([[0, 1, 2, 3, 0, 9]] * L),
    ],
)
def test_any_old_map(
    old: torch.Tensor | None, vllm: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the old map is none of ours, the new one is made afresh."""
    monkeypatch.setenv(MAX_MOVES, "0")
    policies = vllm()
    register()
    check(rebalance(policies["default"], old=old))


def test_keywords_and_a_missing_old_map(vllm: Callable[..., dict[str, Any]]) -> None:
    """Callers may name the arguments and leave the optional one out."""
    policies = vllm()
    register()
    map_LR = policies["default"].rebalance_experts(
        weight=WEIGHT, num_replicas=R, num_groups=1, num_nodes=1, num_ranks=G
    )
    check(map_LR)


def test_older_versions_get_three_maps(vllm: Callable[..., dict[str, Any]]) -> None:
    """Slots, slots of each expert padded with -1, and replicas of each expert."""
    policies = vllm(OlderEplbPolicy)
    register()
    map_LR, slots_LEX, count_LE = policies["default"].rebalance_experts(WEIGHT, R, 1, 1, G)
    check(map_LR)
    for layer in range(L):
        for expert in range(E):
            slots = [slot for slot in slots_LEX[layer, expert].tolist() if slot >= 0]
            assert slots == [slot for slot in range(R) if int(map_LR[layer, slot]) == expert]
            assert len(slots) == int(count_LE[layer, expert])


def test_what_we_cannot_place_vllm_does(
    vllm: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Loads that are no numbers end in one warning and vLLM's own answer."""
    policies = vllm()
    register()
    broken = torch.tensor([[float("nan")] * E] * L)
    for _ in range(3):
        assert torch.equal(rebalance(policies["default"], broken), TRIVIAL)
    assert len([record for record in caplog.records if "cannot place the experts" in record.message]) == 1


def test_whatever_is_passed_the_engine_goes_on(
    vllm: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Arguments of a kind that no version has are answered by vLLM's own policy."""
    policies = vllm()
    register()
    answer = rebalance(policies["default"], groups="many")
    assert torch.equal(answer, TRIVIAL)
    assert "ValueError: invalid literal for int()" in caplog.text


# ------------------------------------------------------------------------------------------ an offline
# placement

WANTED = [[3, 0, 1, 2, 1, 3], [0, 1, 2, 3, 2, 0]]


@pytest.mark.parametrize("name", ["vllm", "native", "vllm-ascend"])
def test_an_offline_placement_is_kept(
    name: str,
    tmp_path: Path,
    vllm: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first rebalance puts it in place, whatever the loads are; the next moves nothing."""
    path = tmp_path / "placement.json"
    write_as(place(WANTED), path, name, FormatOptions(num_devices=G))
    monkeypatch.setenv(PLACEMENT, str(path))
    policies = vllm()
    with caplog.at_level(logging.INFO, logger="vllm"):
        register()
    assert f"keeps the placement of {path}" in caplog.text
    first = rebalance(policies["default"])
    check(first)
    for row, wanted in zip(first.tolist(), WANTED, strict=True):
        assert [sorted(row[:3]), sorted(row[3:])] == [sorted(wanted[:3]), sorted(wanted[3:])]
    path.unlink()  # it is read once
    assert torch.equal(rebalance(policies["default"], WEIGHT.flip(0), old=first), first)


def test_what_stays_on_a_rank_keeps_its_slot(
    tmp_path: Path, vllm: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 holds 0, 1, 2 and wants 3, 0, 1: only the slot of expert 2 changes."""
    path = tmp_path / "placement.json"
    write_as(place(WANTED), path, "vllm", FormatOptions(num_devices=G))
    monkeypatch.setenv(PLACEMENT, str(path))
    policies = vllm()
    register()
    first = rebalance(policies["default"])
    assert first[0].tolist() == [0, 1, 3, 3, 2, 1]
    assert np.array_equal(rebalance(policies["default"], old=None).numpy(), np.array(WANTED))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([WANTED[0]]), "in 6 slots of 1 layers, the engine runs 4 in 6 of 2"),
        (json.dumps([[0, 1, 2, 3]] * 2), "places 4 experts in 4 slots of 2 layers"),
        (json.dumps([[0, 1, 2, 3, 4, 5]] * 2), "places 6 experts in 6 slots"),
        ("{", "is not JSON"),
        (json.dumps({"expert_to_ep_rank": [0, 1, 0, 1]}), "name the model with --model"),
        (
            json.dumps(
                {"physical_to_logical_map": [[0, 1, 2, 3, 0, 1]] * 2, "device_of_slot": [0, 0, 1, 1, 2, 2]}
            ),
            "is for 3 devices, the engine runs 2",
        ),
    ],
)
def test_a_placement_that_does_not_fit(
    content: str,
    message: str,
    tmp_path: Path,
    vllm: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning that says what does not fit, and vLLM's own answer."""
    path = tmp_path / "placement.json"
    path.write_text(content)
    monkeypatch.setenv(PLACEMENT, str(path))
    policies = vllm()
    register()
    assert torch.equal(rebalance(policies["default"]), TRIVIAL)
    assert message in caplog.text
