"""What a migration needs to know of the model, and that all ranks know the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from placement.errors import InputError
from placement.plan import Placement
from placement.runtime.migration.link import MigrationLink
from placement.runtime.migration.nearness import distances
from placement.runtime.migration.plan import MigrationPlan, link_rates, plan_migration
from placement.runtime.migration.rows import LayerRows, layer_rows
from placement.runtime.migration.schedule import schedule_migration
from placement.runtime.parallel.model import ParallelModel
from placement.topology import Topology

__all__ = [
    "Options",
    "agree_on_rows",
    "agree_on_setup",
    "dry_run",
    "has_gradients",
    "may_change",
    "rows_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to migrate.

    Parameters
    ----------
    staging
        Experts that a rank receives in a round. It has memory for them, and for those that it sends: with 1
        as a rule one of each; with several, up to two chunks of what it sends.
    commit
        ``round``: switch over after each round. ``all``: once, at the end.
    pack_layers
        Put rounds of different layers together where `staging` allows.
    exact_rows
        Bring every expert into the very slot that the new placement names.
    overlap
        Transfer while the model runs, if its weights do not change meanwhile.
    chunk_bytes
        Bytes that a rank receives at a time, at most, and in each step where copies overlap with the model;
        default: one expert, or 256 MiB of small ones.
    """

    staging: int = 1
    commit: str = "round"
    pack_layers: bool = False
    exact_rows: bool = False
    overlap: bool = True
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise InputError(f"chunks of {self.chunk_bytes} bytes; they must hold 1 or more")


def dry_run(
    parallel: ParallelModel,
    placement: Placement,
    *,
    optimizers: Iterable[Optimizer] = (),
    options: Options | None = None,
    topology: Topology | None = None,
    gb_per_s: float | None = None,
) -> MigrationPlan:
    """Say what a migration to another placement would do, without doing anything; no other rank is asked.

    Parameters
    ----------
    optimizers
        Whose state would move along.
    topology
        Tiers: copies come from the nearest device. Default: the mesh's nodes.
    gb_per_s
        Measured rate of copies between two devices, GB per second; default: the topology's.

    Raises
    ------
    InputError
        If the placement does not fit what runs, or a tensor cannot be moved.
    """
    options = options or Options()
    parallel.check_slots(placement)
    mesh = parallel.mesh
    schedule = schedule_migration(
        parallel.placement,
        placement,
        staging=options.staging,
        commit=options.commit,
        pack_layers=options.pack_layers,
        exact_rows=options.exact_rows,
        distance_DD=distances(
            mesh.world_size, topology=topology, devices_per_node=None if topology else mesh.devices_per_node
        ),
    )
    layers = range(len(parallel.layers))
    rows = [
        rows_of(parallel, layer, optimizers=optimizers, gradients=has_gradients(parallel, [layer]))
        for layer in layers
    ]
    return plan_migration(
        schedule,
        [one.tensor_bytes for one in rows],
        chunk_bytes=options.chunk_bytes,
        rate_DD=link_rates(mesh.world_size, topology=topology, gb_per_s=gb_per_s),
    )


def rows_of(
    parallel: ParallelModel, layer: int, *, optimizers: Iterable[Optimizer] = (), gradients: bool = False
) -> LayerRows:
    """Return all tensors of one MoE layer's experts on this rank.

    Raises
    ------
    InputError
        As of `layer_rows`.
    """
    found = parallel.layers[layer]
    return layer_rows(
        found.parameters(),
        optimizers=optimizers,
        gradients=gradients,
        where=f"the experts of decoder layer {found.layer.decoder_layer}",
    )


def has_gradients(parallel: ParallelModel, layers: Iterable[int]) -> bool:
    """Whether any expert parameter of some layers has a gradient."""
    return any(
        parameter.grad is not None
        for layer in layers
        for parameter in parallel.layers[layer].parameters().values()
    )


def may_change(parallel: ParallelModel, optimizers: Sequence[Optimizer]) -> bool:
    """Whether the experts' weights may change between two steps: something trains them."""
    layers = range(len(parallel.layers))
    learns = parallel.model.training and any(
        parameter.requires_grad
        for layer in layers
        for parameter in parallel.layers[layer].parameters().values()
    )
    return bool(optimizers) or learns or has_gradients(parallel, layers)


def agree_on_setup(link: MigrationLink, *, mine: object, problem: str) -> None:
    """Check that no rank met a problem, and that all were asked for the same.

    Raises
    ------
    InputError
        On every rank, if not.
    """
    answers = link.gather((problem, _digest(mine)))
    for rank, (text, _) in enumerate(answers):
        if text:
            raise InputError(text if rank == link.mesh.rank else f"rank {rank}: {text}")
    for rank, (_, digest) in enumerate(answers):
        if digest != answers[0][1]:
            raise InputError(
                f"rank {rank} was given another placement or other options to migrate to than rank 0; "
                "call migrate with the same on all ranks"
            )


def agree_on_rows(
    parallel: ParallelModel,
    link: MigrationLink,
    layers: Sequence[int],
    *,
    optimizers: Sequence[Optimizer],
) -> dict[int, LayerRows]:
    """Return the tensors of some layers that move along now; gradients do if any rank has any.

    Raises
    ------
    InputError
        On every rank, if tensors cannot be moved or ranks have different ones.
    """
    problem, layout = "", ""
    try:
        rows = {layer: rows_of(parallel, layer, optimizers=optimizers) for layer in layers}
        layout = _digest([rows[layer].layout for layer in layers])
    except InputError as exc:
        problem = str(exc)
    digest = int(layout[:15] or "0", 16)
    votes = link.vote(int(bool(problem)), digest, int(has_gradients(parallel, layers)))
    if any(has_problem for has_problem, _, _ in votes):
        raise InputError(next(text for text in link.gather(problem) if text))
    if any(other != votes[0][1] for _, other, _ in votes):
        raise InputError(
            "the ranks have different tensors for an expert (weights or optimizer state); "
            "take the same steps on all of them"
        )
    if any(gradients for _, _, gradients in votes):
        rows = {layer: rows_of(parallel, layer, optimizers=optimizers, gradients=True) for layer in layers}
    return rows


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
