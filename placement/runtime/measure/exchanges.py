"""Times all-to-alls by bytes, among all ranks and tier by tier, and the small exchange of counts.

Shape letters: N rows sent by a rank, H row width, D ranks of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from placement.runtime.measure.bench import Bench
from placement.runtime.measure.timing import Samples, Timing, slowest
from placement.runtime.parallel.alltoall import exchange_equal, exchange_rows
from placement.runtime.parallel.mesh import Mesh

__all__ = ["exchange_figures", "tiers_of"]

_ROW_BYTES = 1024
_MIB = 1 << 20


def tiers_of(mesh: Mesh) -> dict[str, dist.ProcessGroup]:
    """Return this rank's group of each tier that joins more than one rank, the inner tier first."""
    groups = {"node": mesh.node_group, "cluster": mesh.rail_group}
    return {name: group for name, group in groups.items() if group is not None}


def exchange_figures(bench: Bench) -> dict[str, object]:
    """Return the all-to-all curves and the time of an exchange of counts; nothing for one rank.

    A point is ``[MiB sent by a rank, its own part included, ms]``. Exchanges of a tier run in all of its
    groups at once: within every node, or among the ranks of the same place in every node.
    """
    group = bench.mesh.group
    if group is None:
        return {}
    bench.tell("all-to-all among all ranks")
    world = _curve(bench, group)
    figures: dict[str, object] = {"all_to_all_ms_by_MiB_sent_per_rank": _points(world)}
    spread: dict[str, object] = {"all_to_all_ms_by_MiB_sent_per_rank": _spreads(world)}
    figures |= _counts_exchange(bench, group, spread)
    tiers = tiers_of(bench.mesh) if bench.mesh.num_nodes > 1 else {}
    curves = {}
    for name, tier_group in tiers.items():
        bench.tell(f"all-to-all by tier: {name}")
        curves[name] = _curve(bench, tier_group)
    if curves:
        figures["all_to_all_ms_by_tier"] = {name: _points(curve) for name, curve in curves.items()}
        figures["tier_ranks"] = {name: dist.get_world_size(group) for name, group in tiers.items()}
        spread["all_to_all_ms_by_tier"] = {name: _spreads(curve) for name, curve in curves.items()}
    return {**figures, "spread": spread}


def _points(curve: Sequence[tuple[float, Timing]]) -> list[list[float]]:
    return [[mib, timing.ms] for mib, timing in curve]


def _spreads(curve: Sequence[tuple[float, Timing]]) -> list[list[float]]:
    return [timing.spread for _mib, timing in curve]


def _curve(bench: Bench, group: dist.ProcessGroup) -> list[tuple[float, Timing]]:
    """Timings by MiB that a rank sends."""
    ranks = dist.get_world_size(group)
    # Rows to each rank: whole ones, so that what is sent may differ a little from what was asked for.
    rows = dict.fromkeys(
        max(1, round(mib * _MIB / _ROW_BYTES / ranks)) for mib in sorted(bench.sizes.exchange_MiB)
    )
    done = bench.sweep(
        list(rows),
        what=f"exchanges among {ranks} ranks",
        amount=float,
        measure=lambda rows_to_each: _exchange(bench, group, rows_to_each, ranks),
    )
    return [
        (rows_to_each * ranks * _ROW_BYTES / _MIB, timing)
        for rows_to_each, timing in bench.over_ranks(done, slowest)
    ]


def _exchange(bench: Bench, group: dist.ProcessGroup, rows_to_each: int, ranks: int) -> Samples:
    sent_NH = bench.random(rows_to_each * ranks, _ROW_BYTES // bench.dtype.itemsize)
    rows_D = [rows_to_each] * ranks
    return bench.together(lambda: exchange_rows(sent_NH, rows_D, rows_D, group), group)


def _counts_exchange(bench: Bench, group: dist.ProcessGroup, spread: dict[str, object]) -> dict[str, float]:
    """Time of telling each other how much comes, until the host knows it."""
    counts_D3 = torch.randint(0, 4096, (bench.mesh.world_size, 3), device=bench.mesh.device)
    done = bench.sweep(
        ("counts_exchange_ms",),
        what="exchange of counts",
        amount=lambda _name: 0.0,
        measure=lambda _name: bench.together(
            lambda: exchange_equal(counts_D3, group).tolist(), group, on_host=True
        ),
    )
    timings = dict(bench.over_ranks(done, slowest))
    spread.update({name: timing.spread for name, timing in timings.items()})
    return {name: timing.ms for name, timing in timings.items()}
