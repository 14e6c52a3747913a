"""Begins a live change of placement, once all ranks know that they mean the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from placement.errors import InputError
from placement.plan import Placement
from placement.runtime.migration.link import MigrationError, MigrationLink
from placement.runtime.migration.migration import Migration
from placement.runtime.migration.plan import MigrationPlan
from placement.runtime.migration.rows import LayerRows
from placement.runtime.migration.setup import Options, agree_on_rows, agree_on_setup, dry_run, may_change
from placement.runtime.migration.transfer import Fault
from placement.runtime.parallel.model import ParallelModel
from placement.topology import Topology

__all__ = ["migrate"]


def migrate(
    parallel: ParallelModel,
    placement: Placement,
    *,
    optimizers: Sequence[Optimizer] = (),
    options: Options | None = None,
    topology: Topology | None = None,
    link: MigrationLink | None = None,
    timeout_s: float | None = None,
    version: int | None = None,
    fault: Fault | None = None,
) -> Migration:
    """Begin to change the placement of a running model; all ranks call this between the same two steps.

    Call `Migration.advance` between steps until it says that it is done, or `Migration.run` to wait for the
    end. Devices end up with the experts that `placement` gives them; `ParallelModel.placement` says in which
    rows. The model's outputs stay the same throughout.

    Parameters
    ----------
    placement
        Wanted; on the same slots of the same devices.
    optimizers
        Optimizers of the experts' parameters; their `state` moves along (copies of the weights that an
        optimizer keeps elsewhere are not found). Without them the weights must not change until the
        migration has ended, unless the model is in training mode.
    options
        Memory, order, overlap; by default one expert at a time and a switch after every round.
    topology
        Tiers, for the choice of sources; default: the mesh's nodes.
    link
        Groups to use; by default new ones, which cost time and are given up at the end.
    timeout_s
        Limit of each stage of copies and each agreement when `link` is not given; default: the mesh's.
    version
        Number of the new placement; default: the next.
    fault
        For tests: may spoil what arrives.

    Raises
    ------
    InputError
        On every rank, if the placement does not fit what runs, ranks were given different ones, a tensor
        cannot be moved, or the link carries another migration.
    MigrationError
        If a rank does not answer.

    Notes
    -----
    What a failure leaves behind, the same on all ranks that are left:

    - ``commit="round"`` (memory: one expert to receive and as a rule one to send): the placement after the
      last round that all ranks had. It is whole: what a wrong checksum or a failed copy spoils was waiting
      memory only. If a rank dies, though, experts that earlier rounds gave to it alone die with it, as they
      would with any placement.
    - ``commit="all"`` (memory: all experts that a rank receives, and two stages of what it sends): the old
      placement, untouched, until everything has arrived everywhere; survivors of a lost rank hold all that
      they held before.
    """
    options = options or Options()
    owns_link = link is None
    link = link or MigrationLink(parallel.mesh, timeout_s=timeout_s)
    if link.is_busy:
        raise InputError("the link carries another migration; wait for its end, or run it")
    try:
        plan = _agreed_plan(parallel, placement, optimizers, options, topology, link)
        changes = any(link.gather(may_change(parallel, optimizers)))
        overlapped = options.overlap and parallel.mesh.group is not None and not changes
        rows = _all_rows(parallel, plan, link) if overlapped else {}
    except (InputError, MigrationError):
        if owns_link and not link.broken:
            link.close()
        raise
    migration = Migration(
        parallel,
        plan,
        link,
        options,
        optimizers=optimizers,
        overlapped_rows=rows,
        overlapped=overlapped,
        owns_link=owns_link,
        version=version,
        fault=fault,
    )
    migration.begin()
    return migration


def _agreed_plan(
    parallel: ParallelModel,
    placement: Placement,
    optimizers: Sequence[Optimizer],
    options: Options,
    topology: Topology | None,
    link: MigrationLink,
) -> MigrationPlan:
    """Return the plan, once it is sure that all ranks have the same."""
    problem, plan = "", None
    try:
        plan = dry_run(parallel, placement, optimizers=optimizers, options=options, topology=topology)
    except InputError as exc:
        problem = str(exc)
    digests = [] if plan is None else [one.physical_to_logical_map_LS.tobytes() for one in _ends(plan)]
    agree_on_setup(link, mine=(digests, options), problem=problem)
    assert plan is not None  # else there was a problem
    return plan


def _ends(plan: MigrationPlan) -> tuple[Placement, Placement]:
    return plan.schedule.before, plan.schedule.after


def _all_rows(parallel: ParallelModel, plan: MigrationPlan, link: MigrationLink) -> dict[int, LayerRows]:
    layers = sorted({layer for one in plan.schedule.rounds for layer in one.expert_LS})
    return agree_on_rows(parallel, link, layers, optimizers=())
