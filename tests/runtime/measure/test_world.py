"""Ranks, their places, and what they are told when the launcher's set-up is wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from placement.errors import BackendError, InputError
from placement.runtime.measure import provenance as provenance_module
from placement.runtime.measure import world
from placement.runtime.measure.provenance import provenance
from placement.runtime.measure.world import Place, agree_on, joined, mesh_over, places, remarks
from placement.runtime.parallel.mesh import Mesh

GPU = Place(host="a", machine="1", gpu="NVIDIA H100", gpu_id="u0", index=0, free_bytes=2**30, ranks_of_host=2)
CPU = torch.device("cpu")


def mesh(world_size: int, devices_per_node: int) -> Mesh:
    """A mesh that nothing is sent over."""
    return Mesh(rank=0, world_size=world_size, devices_per_node=devices_per_node, device=CPU)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher's variables."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_launcher_there_is_no_group(no_launcher: pytest.MonkeyPatch) -> None:
    """One process agrees with itself."""
    with joined(1.0):
        assert not torch.distributed.is_initialized()
        agree_on(models=("olmoe",))
        (place,) = places()
    assert (place.gpu, place.index, place.ranks_of_host) == ("CPU", -1, 0)
    assert mesh_over([place], devices_per_node=None, timeout_s=1.0).world_size == 1


def test_a_launcher_of_one_process_needs_no_group(no_launcher: pytest.MonkeyPatch) -> None:
    """A world of one is a process alone."""
    no_launcher.setenv("RANK", "0")
    no_launcher.setenv("WORLD_SIZE", "1")
    with joined(1.0):
        assert not torch.distributed.is_initialized()


def test_ranks_that_never_come_are_one_line(no_launcher: pytest.MonkeyPatch) -> None:
    """The second of two processes was not started."""
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        no_launcher.setenv(name, value)
    with (
        pytest.raises(InputError, match="the 2 processes of the launcher did not find each other within 1 s"),
        joined(1.0),
    ):
        raise AssertionError("joined without the other")


def test_a_broken_launcher_is_one_line(no_launcher: pytest.MonkeyPatch) -> None:
    """No address to meet at."""
    no_launcher.setenv("RANK", "0")
    no_launcher.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="MASTER_ADDR"), joined(1.0):
        raise AssertionError("joined without an address")


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, "3 processes were started on .*, which has 2 GPUs"),
        ({}, "LOCAL_RANK is ''; start with torchrun"),
    ],
)
def test_more_processes_than_gpus_are_one_line(
    no_launcher: pytest.MonkeyPatch, local: dict[str, str], message: str
) -> None:
    """Said by every rank of the machine, before anything waits for the others."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", **local}.items():
        no_launcher.setenv(name, value)
    no_launcher.setattr(torch.cuda, "is_available", lambda: True)
    no_launcher.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=message), joined(1.0):
        raise AssertionError("joined with too few GPUs")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([GPU], "2 ranks use GPU 0 of a"),
        ([replace(GPU, gpu="CPU", gpu_id="", index=-1)], "rank 1 on a has no GPU, others have"),
    ],
)
def test_every_rank_needs_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, others: list[Place], message: str
) -> None:
    """Found out from all ranks' places, so that all say so."""
    monkeypatch.setattr(world, "gather_all", lambda _mine: [GPU, *others])
    with pytest.raises(InputError, match=message):
        places()


def test_nodes_of_different_sizes_are_one_line() -> None:
    """Two ranks here and one there."""
    place_D = [GPU, replace(GPU, index=1), replace(GPU, host="b", ranks_of_host=1)]
    with pytest.raises(InputError, match=r"nodes have different numbers of ranks \(1, 2\)"):
        mesh_over(place_D, devices_per_node=None, timeout_s=1.0)


@pytest.mark.parametrize("per_node", [0, -1, 2])
def test_ranks_fill_whole_nodes(per_node: int) -> None:
    """Three ranks are no pairs."""
    with pytest.raises(InputError, match=f"3 ranks do not fill nodes of {per_node} devices"):
        mesh_over([GPU] * 3, devices_per_node=per_node, timeout_s=1.0)


def test_memory_that_runs_out_is_one_line(no_launcher: pytest.MonkeyPatch) -> None:
    """The first line of what the allocator says, and what to do."""
    with (
        pytest.raises(BackendError, match="memory ran out: tried 5 GiB; free memory or measure fewer models"),
        joined(1.0),
    ):
        raise torch.OutOfMemoryError("tried 5 GiB\nand more lines")


def test_own_mistakes_stay_as_they_are(no_launcher: pytest.MonkeyPatch) -> None:
    """One process alone blames no other."""
    with pytest.raises(RuntimeError, match="a mistake"), joined(1.0):
        raise RuntimeError("a mistake")


def test_different_gpus_are_noted() -> None:
    """What they measured is pooled, and the file says so."""
    place_D = [GPU, replace(GPU, index=1, gpu="NVIDIA A100")]
    assert remarks(place_D, mesh(2, 2)) == [
        "ranks have different GPUs (1 x NVIDIA H100, 1 x NVIDIA A100); what they measured is pooled"
    ]


def test_nothing_is_noted_of_two_equal_gpus() -> None:
    """All is as it should be."""
    assert remarks([GPU, replace(GPU, index=1)], mesh(2, 2)) == []


@pytest.mark.parametrize(
    ("environment", "reached", "hosts", "expected"),
    [
        ("0", True, ("a", "a"), "NVLink (2 links), NCCL default"),
        ("1", True, ("a", "a"), "host memory (NCCL_P2P_DISABLE is set)"),
        ("", False, ("a", "a"), "host memory (GPUs have no peer access)"),
        ("", True, ("a", "b"), "NVLink (2 links), NCCL default; network between machines"),
    ],
)
def test_the_way_between_gpus_is_told(
    monkeypatch: pytest.MonkeyPatch, environment: str, reached: bool, hosts: tuple[str, str], expected: str
) -> None:
    """NVLink, or host memory and why."""
    tool = "GPU 0: NVIDIA H100\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n"
    monkeypatch.setenv("NCCL_P2P_DISABLE", environment)
    monkeypatch.setattr(provenance_module, "_nvidia_smi", lambda *_arguments: tool)
    monkeypatch.setattr(provenance_module, "_nccl", lambda: "2.28.9")
    monkeypatch.setattr(provenance_module, "_reaches_peers", lambda *_places: reached)
    place_D = [replace(GPU, machine=host, index=index) for index, host in enumerate(hosts)]
    head = provenance(place_D, mesh(2, 2), dtype=torch.bfloat16, measured_at=None)
    assert head["transport"] == expected
    assert head["hosts"] == len(set(hosts))
    assert head["nccl"] == "2.28.9"
    assert "measured_at" not in head


def test_a_missing_driver_tool_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file goes without the driver's version."""
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.setattr(provenance_module, "_nccl", lambda: "2.28.9")
    head = provenance([GPU], mesh(1, 1), dtype=torch.bfloat16, measured_at="2026-01-02T03:04:05Z")
    assert "driver" not in head
    assert head["measured_at"] == "2026-01-02T03:04:05Z"


@pytest.mark.parametrize("tool", ["false", "sleep"])
def test_a_failing_driver_tool_is_no_failure(monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    """It prints nothing that could be read."""
    monkeypatch.setattr(shutil, "which", lambda _name: f"/bin/{tool}")
    assert provenance_module._nvidia_smi() == ""
