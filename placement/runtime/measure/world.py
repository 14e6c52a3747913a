"""The processes that measure together: joined as the launcher says, told the same, and what they run on."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from placement.errors import BackendError, InputError
from placement.runtime.parallel.mesh import Mesh

__all__ = ["Place", "agree_on", "gather_all", "joined", "mesh_over", "places", "remarks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one rank runs.

    Parameters
    ----------
    host
        Name of its machine, for messages.
    machine
        What no other machine has: names of containers may be the same.
    gpu
        Name of its GPU, or ``CPU``.
    gpu_id
        What no other GPU has; empty without one.
    index
        Its device as this process counts them, -1 without one.
    free_bytes
        Free memory of the GPU; 0 without one.
    ranks_of_host
        Ranks that the launcher started on that machine; 0 where it does not say.
    """

    host: str
    machine: str
    gpu: str
    gpu_id: str
    index: int
    free_bytes: int
    ranks_of_host: int

    @classmethod
    def here(cls) -> Place:
        """Return where this rank runs."""
        local = os.environ.get("LOCAL_WORLD_SIZE", "")
        with_gpu = _on_gpu()
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            gpu=torch.cuda.get_device_name() if with_gpu else "CPU",
            gpu_id=_gpu_id() if with_gpu else "",
            index=torch.cuda.current_device() if with_gpu else -1,
            free_bytes=torch.cuda.mem_get_info()[0] if with_gpu else 0,
            ranks_of_host=int(local) if local.isdecimal() else 0,
        )


def _machine() -> str:
    """What the kernel of this machine calls this run of it; elsewhere its name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _gpu_id() -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return str(getattr(properties, "uuid", "")) or f"{_machine()} {torch.cuda.current_device()}"


def _on_gpu() -> bool:
    """Whether this rank measures a GPU; a group that is there already may be one of CPUs."""
    together = dist.is_available() and dist.is_initialized()
    return torch.cuda.is_available() and not (together and "nccl" not in dist.get_backend())


@contextmanager
def joined(timeout_s: float) -> Iterator[None]:
    """Join the launcher's processes for a while, unless that was done before or there is no launcher.

    Raises
    ------
    InputError
        If there are more processes than GPUs, the launcher's environment is broken, or not all come in time.
    BackendError
        If another process stops or does not answer in time, or memory runs out.
    """
    if not dist.is_available() or dist.is_initialized() or not _launched():
        with _failures_told():
            yield
        return
    _use_gpu()
    _join(timeout_s)
    try:
        with _failures_told():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _failures_told() -> Iterator[None]:
    """Say in a line what broke; with several ranks it is often another one."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise BackendError(
            f"the GPU's memory ran out: {_line(exc)}; free memory or measure fewer models"
        ) from exc
    except RuntimeError as exc:
        if not (dist.is_available() and dist.is_initialized()):
            raise
        raise BackendError(
            f"rank {dist.get_rank()} could not go on: {_line(exc)}; if another rank stopped, its own message "
            "says why"
        ) from exc


def _launched() -> bool:
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _use_gpu() -> None:
    """Choose the GPU of this rank."""
    if not torch.cuda.is_available():
        return
    local, needed, there = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
    if needed > there:
        raise InputError(
            f"{needed} processes were started on {socket.gethostname()}, which has {there} GPUs; start "
            f"one for each GPU (--nproc-per-node {there})"
        )
    torch.cuda.set_device(local)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise InputError(f"the launcher set RANK but {name} is {text!r}; start with torchrun")
    return int(text)


def _join(timeout_s: float) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, ValueError) as exc:
        raise InputError(
            f"the {os.environ['WORLD_SIZE']} processes of the launcher did not find each other within "
            f"{timeout_s:g} s: {_line(exc)}; start all of them, with one address"
        ) from exc


def _line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]


def gather_all(value: Any) -> list[Any]:
    """Return what every rank has, by rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree_on(**given: Any) -> None:
    """Check that all ranks were given the same.

    Raises
    ------
    InputError
        On every rank, if they were not, with the first that differs.
    """
    given_D = gather_all(given)
    for name in given:
        for rank, other in enumerate(given_D):
            if other[name] != given_D[0][name]:
                raise InputError(
                    f"the ranks disagree about {name}: rank 0 has {given_D[0][name]}, rank {rank} has "
                    f"{other[name]}; start all ranks with the same"
                )


def places() -> list[Place]:
    """Return where every rank runs, by rank.

    Raises
    ------
    InputError
        On every rank, if two of them use the same GPU, or only some have one.
    """
    place_D = gather_all(Place.here())
    if len({place.index < 0 for place in place_D}) > 1:
        rank = next(rank for rank, place in enumerate(place_D) if place.index < 0)
        raise InputError(f"rank {rank} on {place_D[rank].host} has no GPU, others have; start all on GPUs")
    used = Counter(place.gpu_id for place in place_D if place.index >= 0)
    for place in place_D:
        if used[place.gpu_id] > 1:
            raise InputError(
                f"{used[place.gpu_id]} ranks use GPU {place.index} of {place.host}; start one process for "
                "each GPU, each with its own"
            )
    return place_D


def mesh_over(place_D: Sequence[Place], *, devices_per_node: int | None, timeout_s: float) -> Mesh:
    """Return the mesh of all ranks; nodes are the launcher's unless `devices_per_node` is given.

    Raises
    ------
    InputError
        On every rank, if the ranks do not fill whole nodes.
    """
    world = len(place_D)
    per_node = _per_node(place_D) if devices_per_node is None else devices_per_node
    if per_node < 1 or world % per_node:
        raise InputError(
            f"{world} ranks do not fill nodes of {per_node} devices; give --devices-per-node "
            f"a divisor of {world}"
        )
    if world == 1:
        return Mesh.single(torch.device("cuda", place_D[0].index) if place_D[0].index >= 0 else "cpu")
    return Mesh.create(devices_per_node=per_node, timeout_s=timeout_s)


def _per_node(place_D: Sequence[Place]) -> int:
    counts = {place.ranks_of_host for place in place_D}
    if len(counts) > 1:
        raise InputError(
            f"nodes have different numbers of ranks ({', '.join(map(str, sorted(counts)))}); start "
            "equally many on each, or give --devices-per-node"
        )
    return counts.pop() or len(place_D)


def remarks(place_D: Sequence[Place], mesh: Mesh) -> list[str]:
    """Return what a reader of the figures has to know of the machines."""
    found = []
    gpus = Counter(place.gpu for place in place_D)
    if len(gpus) > 1:
        listed = ", ".join(f"{count} x {name}" for name, count in gpus.items())
        found.append(f"ranks have different GPUs ({listed}); what they measured is pooled")
    if mesh.world_size == 1:
        found.append("one process: exchanges between GPUs and migration were not measured")
    machines = len({place.machine for place in place_D})
    if mesh.num_nodes > machines:
        found.append(f"{mesh.num_nodes} nodes are emulated; machines: {machines}")
    if place_D[0].index < 0:
        found.append("measured on CPUs: good to try the way, not to plan for GPUs")
    return found
