"""A dry run: what a migration would copy, how long that takes, and the memory it needs meanwhile.

Shape letters: L layers, D devices (ranks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.runtime.migration.schedule import MigrationSchedule, Round
from placement.runtime.migration.stages import aligned, cut, peak_bytes
from placement.topology import Topology

__all__ = ["MigrationPlan", "link_rates", "plan_migration"]

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MigrationPlan:
    """A schedule with its bytes and seconds.

    Parameters
    ----------
    schedule
        Rounds.
    tensor_bytes_L
        Bytes of one expert in every tensor that moves along (weights, gradients, optimizer state), by name,
        for each layer.
    chunk_bytes
        Bytes of experts that a rank receives at a time, at most; None: as of `cut`.
    seconds
        Sum over rounds of the time that the busiest rank sends or receives; None where no rate is known.
        Rounds that overlap with compute wait for the step's end on top.
    """

    schedule: MigrationSchedule
    tensor_bytes_L: tuple[Mapping[str, int], ...]
    chunk_bytes: int | None
    seconds: float | None

    @property
    def num_moves(self) -> int:
        """Copies between ranks."""
        return self.schedule.num_moves

    @property
    def num_rounds(self) -> int:
        """Times that the ranks switch over."""
        return len(self.schedule.rounds)

    @property
    def total_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(self.bytes_by_tensor.values())

    @property
    def bytes_by_tensor(self) -> dict[str, int]:
        """Bytes of all copies, by the tensor's name."""
        total: dict[str, int] = {}
        for one in self.schedule.rounds:
            for move in one.moves:
                for name, size in self.tensor_bytes_L[move.layer].items():
                    total[name] = total.get(name, 0) + size
        return total

    @property
    def received_bytes_D(self) -> IntArray:
        """Bytes that each rank receives, ``[devices]``."""
        return self._bytes_D("target")

    @property
    def sent_bytes_D(self) -> IntArray:
        """Bytes that each rank sends, ``[devices]``."""
        return self._bytes_D("source")

    @property
    def peak_bytes_D(self) -> IntArray:
        """Memory that each rank needs besides its rows, for what arrives and what leaves, ``[devices]``."""
        peak_D = np.zeros(self.schedule.before.num_devices, dtype=np.int64)
        for one in self.schedule.rounds:
            peak_D = np.maximum(peak_D, self._round_bytes_D(one))
        return peak_D

    def _round_bytes_D(self, one: Round) -> IntArray:
        sizes = {layer: list(self.tensor_bytes_L[layer].values()) for layer in one.expert_LS}
        stages = cut(one.moves, sizes, chunk_bytes=self.chunk_bytes)
        num_devices = self.schedule.before.num_devices
        bytes_D = np.array([sum(peak_bytes(stages, rank)) for rank in range(num_devices)])
        for shift in one.shifts:
            if shift.closed:
                aside = sum(map(aligned, sizes[shift.layer]))
                bytes_D[shift.rank] = max(bytes_D[shift.rank], aside)
        return bytes_D

    def _bytes_D(self, end: str) -> IntArray:
        total_D = np.zeros(self.schedule.before.num_devices, dtype=np.int64)
        for one in self.schedule.rounds:
            for move in one.moves:
                total_D[getattr(move, end)] += sum(self.tensor_bytes_L[move.layer].values())
        return total_D

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "moves": self.num_moves,
            "rounds": self.num_rounds,
            "rounds_lower_bound": self.schedule.lower_bound,
            "total_bytes": self.total_bytes,
            "bytes_by_tensor": self.bytes_by_tensor,
            "received_bytes": self.received_bytes_D.tolist(),
            "sent_bytes": self.sent_bytes_D.tolist(),
            "peak_extra_bytes": self.peak_bytes_D.tolist(),
            "seconds": self.seconds,
        }

    def describe(self) -> str:
        """Return the plan in a few lines for people."""
        if not self.num_rounds:
            return "nothing to migrate: every device holds what it needs"
        received_D, peak_D = self.received_bytes_D, self.peak_bytes_D
        layers = {layer for one in self.schedule.rounds for layer in one.expert_LS}
        lines = [
            f"{_count(self.num_moves, 'copy', 'copies')} of experts in {len(layers)} of "
            f"{_count(self.schedule.before.num_layers, 'layer')}, in {_count(self.num_rounds, 'round')}",
            f"{_bytes(self.total_bytes)} in all, {_bytes(int(received_D.max()))} into the busiest rank"
            + ("" if self.seconds is None else f", {_seconds(self.seconds)} of transfer"),
            f"{_bytes(int(peak_D.max()))} of extra memory on the fullest rank "
            f"({_count(self.schedule.staging, 'expert')} at a time)",
        ]
        width = max((len(name) for name in self.bytes_by_tensor), default=0)
        lines += [f"  {name:<{width}}  {_bytes(size)}" for name, size in self.bytes_by_tensor.items()]
        return "\n".join(lines)


def plan_migration(
    schedule: MigrationSchedule,
    tensor_bytes_L: Sequence[Mapping[str, int]],
    *,
    chunk_bytes: int | None = None,
    rate_DD: FloatArray | None = None,
) -> MigrationPlan:
    """Price a schedule.

    Parameters
    ----------
    tensor_bytes_L
        Bytes of one expert in each tensor, by name, for each layer.
    chunk_bytes
        Bytes that a rank receives at a time, at most; default: as of `cut`.
    rate_DD
        Bytes per second between two devices, as of `link_rates`.

    Raises
    ------
    InputError
        If there are not as many layers as the placement has.
    """
    if len(tensor_bytes_L) != schedule.before.num_layers:
        raise InputError(f"bytes of {len(tensor_bytes_L)} layers for {schedule.before.num_layers} layers")
    expert_bytes_L = [sum(sizes.values()) for sizes in tensor_bytes_L]
    seconds = None
    if rate_DD is not None:
        seconds = sum(_round_seconds(one, expert_bytes_L, rate_DD) for one in schedule.rounds)
    return MigrationPlan(
        schedule=schedule,
        tensor_bytes_L=tuple(tensor_bytes_L),
        chunk_bytes=chunk_bytes,
        seconds=seconds,
    )


def link_rates(
    num_devices: int, *, topology: Topology | None = None, gb_per_s: float | None = None
) -> FloatArray | None:
    """Bytes per second between two devices, ``[devices, devices]``; None where nothing is known.

    Parameters
    ----------
    topology
        Achieved bandwidth of the tier over which two devices talk.
    gb_per_s
        Measured rate of copies between two devices, GB per second; goes before the topology.

    Raises
    ------
    InputError
        If the rate is not positive.
    """
    if gb_per_s is not None:
        if not gb_per_s > 0:
            raise InputError(f"a migration rate of {gb_per_s} GB/s; it must be positive")
        return np.full((num_devices, num_devices), 1e9 * gb_per_s)
    if topology is None:
        return None
    rate_DD = np.zeros((num_devices, num_devices))
    for tier in reversed(topology.tiers):
        same_DD = tier.group_D[:, None] == tier.group_D[None, :]
        bandwidth_D = tier.effective_bandwidth_D
        rate_DD = np.where(same_DD, np.minimum(bandwidth_D[:, None], bandwidth_D[None, :]), rate_DD)
    return rate_DD


def _round_seconds(one: Round, expert_bytes_L: Sequence[int], rate_DD: FloatArray) -> float:
    """Time until the busiest rank has sent and received its share; both ways at once."""
    busy_2D = np.zeros((2, len(rate_DD)))
    for move in one.moves:
        seconds = expert_bytes_L[move.layer] / rate_DD[move.source, move.target]
        busy_2D[0, move.source] += seconds
        busy_2D[1, move.target] += seconds
    return float(busy_2D.max())


def _count(number: int, noun: str, nouns: str = "") -> str:
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
