"""Times experts on the move: point to point, buffers as large as experts, one way and both ways at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from placement.runtime.measure.bench import Bench
from placement.runtime.measure.exchanges import tiers_of
from placement.runtime.measure.timing import Timing, slowest

__all__ = ["migration_figures", "partner_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """Buffers on the move between the ranks of each pair."""

    num_bytes: int
    both_ways: bool


def partner_of(rank: int, num_ranks: int) -> int | None:
    """Return the rank that this one exchanges experts with: its neighbour, None for a last odd one."""
    partner = rank ^ 1
    return partner if partner < num_ranks else None


def migration_figures(bench: Bench, expert_bytes: Mapping[str, int]) -> dict[str, object]:
    """Return the rates of migration over each tier; nothing for one rank.

    ``migration_gb_s`` is what one rank sends while it receives as much, with the largest expert;
    ``migration`` has every model's experts, one way and both ways. All pairs of a tier move at once.

    Parameters
    ----------
    expert_bytes
        Bytes of one expert of each model.
    """
    moves = [
        _Move(num_bytes=num_bytes, both_ways=both)
        for num_bytes in sorted(set(expert_bytes.values()))
        for both in (False, True)
    ]
    rates: dict[str, float] = {}
    spreads: dict[str, list[float]] = {}
    table: list[dict[str, object]] = []
    for tier, group in tiers_of(bench.mesh).items():
        bench.tell(f"migration by tier: {tier}")
        for move, timing in _timed(bench, group, moves, tier):
            rate, spread = timing.rates(float(move.num_bytes))
            table.append(_row(tier, move, timing, rate, spread))
            if move.both_ways:
                rates[tier], spreads[tier] = rate, spread
    if not table:
        return {}
    return {"migration_gb_s": rates, "migration": table, "spread": {"migration_gb_s": spreads}}


def _row(tier: str, move: _Move, timing: Timing, rate: float, spread: Sequence[float]) -> dict[str, object]:
    return {
        "tier": tier,
        "bytes": move.num_bytes,
        "both_ways": move.both_ways,
        "ms": timing.ms,
        "gb_s": rate,
        "spread": list(spread),
    }


def _timed(
    bench: Bench, group: dist.ProcessGroup, moves: Sequence[_Move], tier: str
) -> list[tuple[_Move, Timing]]:
    done = bench.sweep(
        moves,
        what=f"moves over {tier}",
        amount=lambda move: float(move.num_bytes),
        measure=lambda move: bench.together(_call(bench, group, move), group),
    )
    return bench.over_ranks(done, slowest)


def _call(bench: Bench, group: dist.ProcessGroup, move: _Move) -> Callable[[], object]:
    """Return what moves this rank's buffers."""
    rank = dist.get_rank(group)
    partner = partner_of(rank, dist.get_world_size(group))
    if partner is None:
        return lambda: None
    sent = bench.random(move.num_bytes // bench.dtype.itemsize)
    received = torch.empty_like(sent)
    sends = dist.P2POp(dist.isend, sent, group=group, group_peer=partner)
    receives = dist.P2POp(dist.irecv, received, group=group, group_peer=partner)
    one_way = [sends if rank % 2 == 0 else receives]
    operations = [sends, receives] if move.both_ways else one_way

    def run() -> None:
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return run
