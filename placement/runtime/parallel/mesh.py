"""The process group that runs a placement: rank r is device r, ranks in order fill the nodes."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from placement.errors import InputError
from placement.runtime.parallel.alltoall import naming_lost_ranks

__all__ = ["TIMEOUT_S", "Mesh"]

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mesh:
    """Ranks of an expert-parallel group and how they can reach each other.

    Parameters
    ----------
    rank, world_size
        Of this process within the group.
    devices_per_node
        Ranks of each node; rank ``r`` is in node ``r // devices_per_node``.
    device
        Where this rank computes.
    timeout_s
        Seconds after which an exchange with a rank that does not answer fails.
    group
        All ranks; None where there is only this one.
    node_group, rail_group
        Ranks of this rank's node, and ranks of the same place in every node; None where that is this one
        alone.
    """

    rank: int
    world_size: int
    devices_per_node: int
    device: torch.device
    timeout_s: float = TIMEOUT_S
    group: dist.ProcessGroup | None = None
    node_group: dist.ProcessGroup | None = None
    rail_group: dist.ProcessGroup | None = None

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Mesh:
        """Return a mesh of this process alone, which needs no process group."""
        return cls(rank=0, world_size=1, devices_per_node=1, device=torch.device(device))

    @classmethod
    def create(
        cls,
        *,
        devices_per_node: int | None = None,
        timeout_s: float = TIMEOUT_S,
        group: dist.ProcessGroup | None = None,
    ) -> Mesh:
        """Return the mesh of a process group; every one of its ranks has to call this.

        Parameters
        ----------
        devices_per_node
            Ranks of a node. Default: ``LOCAL_WORLD_SIZE`` as torchrun sets it, where it divides the group.
        timeout_s
            Limit of each exchange, in seconds.
        group
            Ranks that share the experts; default: all.

        Raises
        ------
        InputError
            If torch.distributed was not initialised, the group does not fill whole nodes, or ranks were given
            different numbers.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "no process group: start with torchrun and call torch.distributed.init_process_group first"
            )
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        per_node = _per_node(devices_per_node, world_size)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        mesh = cls(
            rank=rank,
            world_size=world_size,
            devices_per_node=per_node,
            device=_device(group),
            timeout_s=timeout_s,
            group=_subgroup(ranks, timeout_s),
            node_group=_subgroup(_node_of(ranks, rank, per_node), timeout_s),
            rail_group=_subgroup(ranks[rank % per_node :: per_node], timeout_s),
        )
        mesh.agree("devices_per_node", per_node)
        return mesh

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks fill."""
        return self.world_size // self.devices_per_node

    @property
    def node(self) -> int:
        """Node of this rank."""
        return self.rank // self.devices_per_node

    def check_devices(self, num_devices: int) -> None:
        """Check that a placement has one device for each rank.

        Raises
        ------
        InputError
            If it has not; the same on every rank that was given the same placement.
        """
        if num_devices != self.world_size:
            raise InputError(
                f"the placement is for {num_devices} devices, the process group has {self.world_size} "
                f"ranks; start {num_devices} ranks or solve for {self.world_size} devices"
            )

    def agree(self, what: str, value: Hashable) -> None:
        """Check that all ranks have the same value.

        Raises
        ------
        InputError
            On every rank, if they do not.
        """
        values = self.gather(value)
        if len(set(values)) > 1:
            other = next(rank for rank, one in enumerate(values) if one != values[0])
            raise InputError(
                f"the ranks disagree about {what}: rank 0 has {_short(values[0])}, "
                f"rank {other} has {_short(values[other])}; start all ranks with the same"
            )

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank has, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with naming_lost_ranks("an agreement"):
            dist.all_gather_object(values, value, group=self.group)
        return values


def _per_node(given: int | None, world_size: int) -> int:
    if given is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
        given = local if local and world_size % local == 0 else world_size
    if given < 1 or world_size % given:
        raise InputError(
            f"{world_size} ranks do not fill nodes of {given} devices; give a divisor of {world_size}"
        )
    return given


def _node_of(ranks: Sequence[int], rank: int, per_node: int) -> Sequence[int]:
    first = rank // per_node * per_node
    return ranks[first : first + per_node]


def _subgroup(ranks: Sequence[int], timeout_s: float) -> dist.ProcessGroup | None:
    """Return a group of its own, so that its exchanges have their own time limit."""
    if len(ranks) == 1:
        return None
    limit = timedelta(seconds=timeout_s)
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=limit, use_local_synchronization=True)
    return group


def _device(group: dist.ProcessGroup | None) -> torch.device:
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
