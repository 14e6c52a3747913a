"""What moving experts costs, and when it pays."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from placement.plan import Move, Placement, diff
from placement.planning.parallelism.experts import CONTIGUOUS, ExpertPlan
from placement.planning.parallelism.job import TrainingJob
from placement.planning.parallelism.layers import StageLayers
from placement.planning.parallelism.network import Network
from placement.planning.parallelism.strategy import Mesh

__all__ = ["MOST_MIGRATION_SHARE", "Migration", "expert_state_bytes", "moves_between", "plan_migration"]

MOST_MIGRATION_SHARE = 0.05
"""Share of the training time that migration may take: Piper's limit (arXiv 2605.05049)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """Moving from experts in order to the planned placement.

    Parameters
    ----------
    moves
        Expert copies that devices receive, over all layers of one expert-parallel group.
    busiest_device_bytes
        Weights, gradients and optimizer state that the busiest device receives.
    seconds
        How long that takes.
    worst_layer_bytes, worst_layer_s
        What each device sends, and how long it takes, when all experts of a layer change places (Piper's
        ``48 E d f / G``).
    step_before_s, step_after_s
        Step with experts in order, and as planned, for the loads held out.
    factor_before, factor_after
        Load of the fullest device over the mean, before and after.
    interval_steps
        Steps between migrations.
    """

    moves: tuple[Move, ...]
    busiest_device_bytes: float
    seconds: float
    worst_layer_bytes: float
    worst_layer_s: float
    step_before_s: float
    step_after_s: float
    factor_before: float
    factor_after: float
    interval_steps: int

    @property
    def share_of_time(self) -> float:
        """Share of the training time that migrating once an interval takes."""
        return self.seconds / (self.interval_steps * self.step_after_s + self.seconds)

    @property
    def break_even_steps(self) -> int | None:
        """Steps after which moving has paid; None where it never does."""
        saved_s = self.step_before_s - self.step_after_s
        return math.ceil(self.seconds / saved_s) if saved_s > 0 else None

    @property
    def trigger_factor(self) -> float | None:
        """Load factor above which moving pays within an interval; None where it never does.

        The step is taken to grow in proportion between the two factors that were evaluated.
        """
        saved_s = self.step_before_s - self.step_after_s
        if saved_s <= 0 or self.factor_before <= self.factor_after:
            return None
        s_per_factor = saved_s / (self.factor_before - self.factor_after)
        return self.factor_after + self.seconds / (self.interval_steps * s_per_factor)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "num_moves": len(self.moves),
            "moves": [asdict(move) for move in self.moves],
            "busiest_device_bytes": self.busiest_device_bytes,
            "migration_s": self.seconds,
            "worst_layer_bytes": self.worst_layer_bytes,
            "worst_layer_s": self.worst_layer_s,
            "step_before_s": self.step_before_s,
            "step_after_s": self.step_after_s,
            "interval_steps": self.interval_steps,
            "share_of_time": self.share_of_time,
            "break_even_steps": self.break_even_steps,
            "trigger_factor": self.trigger_factor,
        }


def expert_state_bytes(job: TrainingJob, mesh: Mesh) -> float:
    """Return the bytes that move with one expert, on each tensor-parallel device: all of its state."""
    state = job.state.sharded(mesh.data) if job.shard_optimizer else job.state.total
    return state * job.transformer.moe.params_per_expert / mesh.tensor


def moves_between(before: Placement, after: Placement, layers: StageLayers) -> tuple[tuple[Move, ...], int]:
    """Return all moves, and those into the busiest device of the busiest stage."""
    moves = diff(before, after)
    stage_of_layer = {layer: stage for stage, held in enumerate(layers.moe_layers) for layer in held}
    received_PD = np.zeros((len(layers.moe_layers), after.num_devices), dtype=np.int64)
    for move in moves:
        received_PD[stage_of_layer[move.layer], move.target] += 1
    return moves, int(received_PD.max())


def plan_migration(
    job: TrainingJob,
    mesh: Mesh,
    layers: StageLayers,
    experts: ExpertPlan,
    *,
    network: Network,
    step_before_s: float,
    step_after_s: float,
    interval_steps: int | None = None,
) -> Migration:
    """Reckon the migration from experts in order to our placement.

    Parameters
    ----------
    interval_steps
        Steps between migrations; None, or too few, for the fewest that keep migration within
        `MOST_MIGRATION_SHARE` of the training time.
    """
    before, after = experts.policies[CONTIGUOUS], experts.ours
    moves, busiest = moves_between(before.placement, after.placement, layers)
    state_bytes = expert_state_bytes(job, mesh)
    members = network.members(count=mesh.expert, stride=mesh.tensor)
    # A group that leaves the node moves experts at the network's speed.
    level = next(
        level for level, within in zip(network.levels, members, strict=True) if within >= mesh.expert
    )
    seconds = busiest * state_bytes / level.bandwidth
    worst_bytes = state_bytes * job.transformer.moe.num_experts / mesh.expert
    fewest = max(1, math.ceil(seconds * (1 / MOST_MIGRATION_SHARE - 1) / step_after_s))
    return Migration(
        moves=moves,
        busiest_device_bytes=busiest * state_bytes,
        seconds=seconds,
        worst_layer_bytes=worst_bytes,
        worst_layer_s=worst_bytes / level.bandwidth,
        step_before_s=step_before_s,
        step_after_s=step_after_s,
        factor_before=before.held_out_factor,
        factor_after=after.held_out_factor,
        interval_steps=max(fewest, interval_steps or 1),
    )
