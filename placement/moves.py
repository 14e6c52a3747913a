"""What turning one placement into another costs: copies, bytes over which tier, seconds.

Shape letters: L layers, D devices.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from placement.errors import InputError
from placement.model import ModelShape
from placement.plan import Move, Placement, diff
from placement.topology import Topology

__all__ = ["MoveSummary", "nearest_sources", "summarise_moves"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveSummary:
    """Cost of a change of placement.

    Parameters
    ----------
    num_moves
        Expert copies that a device must receive.
    moves_per_layer
        The same, by layer.
    moves_by_tier
        The same, by the tier they travel over; empty without a topology.
    total_bytes
        Bytes of all moves; None without a model.
    seconds
        Time until the busiest device has sent and received its share, at the achieved bandwidth of every
        tier; None without a topology or a model.
    moves
        Every move.
    """

    num_moves: int
    moves_per_layer: tuple[int, ...]
    moves_by_tier: dict[str, int]
    total_bytes: int | None
    seconds: float | None
    moves: tuple[Move, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def nearest_sources(before: Placement, moves: tuple[Move, ...], topology: Topology) -> tuple[Move, ...]:
    """Take every copy from the nearest device that holds the expert, the lowest number among equals."""
    chosen = []
    for move in moves:
        holders = np.nonzero(before.count_LED[move.layer, move.expert])[0]
        tiers = [topology.tier_between(int(holder), move.target) for holder in holders]
        nearest = min(range(len(tiers)), key=lambda index: tiers[index] or 0)
        chosen.append(
            Move(layer=move.layer, expert=move.expert, source=int(holders[nearest]), target=move.target)
        )
    return tuple(chosen)


def summarise_moves(
    before: Placement,
    after: Placement,
    *,
    topology: Topology | None = None,
    model: ModelShape | None = None,
) -> MoveSummary:
    """Count and price the moves from one placement to another.

    Raises
    ------
    InputError
        If the placements, topology or model do not fit together.
    """
    moves = diff(before, after)
    if topology is not None:
        if topology.num_devices != before.num_devices:
            raise InputError(
                f"the placements have {before.num_devices} devices, the topology {topology.num_devices}"
            )
        moves = nearest_sources(before, moves, topology)
    shape = (before.num_layers, before.num_experts)
    if model is not None and (model.num_layers, model.num_experts) != shape:
        raise InputError(
            f"model {model.name} has {model.num_layers} layers of {model.num_experts} experts, "
            f"the placements {shape[0]} of {shape[1]}"
        )
    expert_bytes = None if model is None else model.bytes_per_expert()
    layers = np.bincount([move.layer for move in moves], minlength=before.num_layers)
    by_tier: dict[str, int] = {}
    seconds = None
    if topology is not None:
        by_tier, seconds = _over_tiers(moves, topology, expert_bytes)
    return MoveSummary(
        num_moves=len(moves),
        moves_per_layer=tuple(int(count) for count in layers),
        moves_by_tier=by_tier,
        total_bytes=None if expert_bytes is None else expert_bytes * len(moves),
        seconds=seconds,
        moves=moves,
    )


def _over_tiers(
    moves: tuple[Move, ...], topology: Topology, expert_bytes: int | None
) -> tuple[dict[str, int], float | None]:
    """Moves by tier, and the busiest device's time."""
    by_tier = {tier.name: 0 for tier in topology.tiers}
    busy_2D = np.zeros((2, topology.num_devices))
    for move in moves:
        index = topology.tier_between(move.source, move.target)
        assert index is not None  # a device that holds an expert needs no copy of it
        tier = topology.tiers[index]
        by_tier[tier.name] += 1
        bandwidth = tier.effective_bandwidth_D
        slowest = min(bandwidth[move.source], bandwidth[move.target])
        busy_2D[0, move.source] += 1 / slowest
        busy_2D[1, move.target] += 1 / slowest
    return by_tier, None if expert_bytes is None else float(busy_2D.max() * expert_bytes)
