"""The answer: strategies ranked, what each stage holds, where experts go, and why the rest is not taken.

Shape letter: P stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placement.io import placement_to_dict
from placement.plan import Placement
from placement.planning.parallelism.experts import OURS, ExpertPlan
from placement.planning.parallelism.migration import Migration
from placement.planning.parallelism.question import ParallelismQuestion
from placement.planning.parallelism.search import Candidate, Reason, SearchResult

__all__ = ["FORMAT", "ParallelismPlan", "PlacedExperts", "RankedStrategy"]

FORMAT = "moe-placement-plan/1"

MOST_TOLD = 20
"""Strategies and rejections that the JSON form spells out; the rest are counted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedExperts:
    """What real loads make of a strategy.

    Parameters
    ----------
    experts
        Placements on the strategy's expert-parallel groups.
    skewed
        The strategy's step for the loads held out, under every policy, by name.
    migration
        Moving from experts in order to our placement.
    """

    experts: ExpertPlan
    skewed: Mapping[str, Candidate]
    migration: Migration


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankedStrategy:
    """A strategy that fits.

    Parameters
    ----------
    balanced
        The strategy with balanced loads.
    placed
        What real loads make of it; None where no traffic was given or experts were not placed for it.
    evaluated
        Whether `best` is what is predicted; else real loads can only be worse.
    """

    balanced: Candidate
    placed: PlacedExperts | None = None
    evaluated: bool = True

    @property
    def best(self) -> Candidate:
        """The strategy with our placement where there is one, else with balanced loads."""
        return self.balanced if self.placed is None else self.placed.skewed[OURS]

    @property
    def lower_bound_s(self) -> float:
        """Step with balanced loads, which no placement can beat."""
        return self.balanced.step.total_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParallelismPlan:
    """The answer of `plan_parallelism`.

    Parameters
    ----------
    question
        What was asked.
    ranked
        Strategies that fit, best first.
    search
        All that was looked at.
    """

    question: ParallelismQuestion
    ranked: tuple[RankedStrategy, ...]
    search: SearchResult

    @property
    def best(self) -> RankedStrategy:
        """The recommended strategy."""
        return self.ranked[0]

    @property
    def utilisation_bound(self) -> float:
        """Utilisation that no strategy of the search exceeds with real loads as placed here, at best."""
        rest = [ranked.balanced.utilisation for ranked in self.ranked if not ranked.evaluated]
        return max([self.best.best.utilisation, *rest])

    @property
    def rejected_by_reason(self) -> dict[Reason, int]:
        """Meshes that are not taken, by reason, in the order of the checks."""
        counts = Counter(rejection.reason for rejection in self.search.rejections)
        return {reason: counts[reason] for reason in Reason if counts[reason]}

    def to_dict(self) -> dict[str, Any]:
        """Return the machine-readable plan."""
        short = [rejection for rejection in self.search.rejections if rejection.reason is Reason.MEMORY]
        short.sort(key=lambda rejection: rejection.missing_bytes)
        return {
            "format": FORMAT,
            "plan": "parallelism",
            "question": _question_entry(self.question),
            "strategies": [self._strategy_entry(ranked) for ranked in self.ranked[:MOST_TOLD]],
            "utilisation_bound": self.utilisation_bound,
            "num_fitting": len(self.ranked),
            "num_meshes": self.search.num_meshes,
            "num_strategies": self.search.num_strategies,
            "rejected_by_reason": {str(reason): count for reason, count in self.rejected_by_reason.items()},
            "nearest_rejected_for_memory": [rejection.to_dict() for rejection in short[:MOST_TOLD]],
            "placement": self._placements(),
        }

    def _strategy_entry(self, ranked: RankedStrategy) -> dict[str, Any]:
        best, job = ranked.best, self.question.job
        devices = best.strategy.mesh.num_devices
        entry: dict[str, Any] = {
            "strategy": best.strategy.to_dict(),
            "step_s": best.step.total_s,
            "balanced_step_s": ranked.lower_bound_s,
            "evaluated": ranked.evaluated,
            "model_flops_utilisation": best.utilisation,
            "tflops_per_device": job.model_flops_per_step / (devices * best.step.total_s) / 1e12,
            "tokens_per_s": job.tokens_per_step / best.step.total_s,
            "step_parts_s": best.step.parts(),
            "slowest_stage": best.step.slowest_stage,
            "peak_bytes": best.memory.peak_bytes,
            "stages": _stages_entry(best),
        }
        if ranked.placed is not None:
            entry["experts"] = _experts_entry(ranked.placed)
        return entry

    def _placements(self) -> list[dict[str, Any]] | None:
        """Return the best strategy's placements, one for each stage with experts; None without any."""
        placed = self.best.placed
        if placed is None:
            return None
        model = self.question.job.transformer.moe
        return [
            {
                "stage": stage,
                "placement": placement_to_dict(
                    _stage_placement(placed.experts.ours.placement, held, model.name, model.moe_layer_ids)
                ),
            }
            for stage, held in enumerate(self.best.balanced.layers.moe_layers)
            if held
        ]


def _stage_placement(
    whole: Placement, held: tuple[int, ...], name: str, moe_layer_ids: tuple[int, ...]
) -> Placement:
    return replace(
        whole,
        physical_to_logical_map_LS=whole.physical_to_logical_map_LS[list(held)],
        model_name=name,
        moe_layer_ids=tuple(moe_layer_ids[layer] for layer in held),
    )


def _question_entry(question: ParallelismQuestion) -> dict[str, Any]:
    job = question.job
    return {
        "model": job.transformer.moe.name,
        "num_params": job.num_params,
        "topology": question.topology.name,
        "num_devices": question.topology.num_devices,
        "memory_bytes": question.device_memory_bytes,
        "fast_domain_devices": question.fast_domain_devices,
        "sequence_length": job.sequence_length,
        "global_batch": job.global_batch,
        "state_bytes_per_param": job.state.total,
        "flash_attention": job.flash_attention,
        "shard_optimizer": job.shard_optimizer,
    }


def _stages_entry(candidate: Candidate) -> list[dict[str, Any]]:
    memory, layers = candidate.memory, candidate.layers
    parts = memory.parts()
    return [
        {
            "decoder_layers": list(layers.decoder_layers[stage]),
            "peak_bytes": float(memory.total_P[stage]),
            "parts_bytes": {name: float(part_P[stage]) for name, part_P in parts.items()},
            "micro_batch_s": float(candidate.step.stage_P[stage]),
        }
        for stage in range(candidate.strategy.mesh.pipeline)
    ]


def _experts_entry(placed: PlacedExperts) -> dict[str, Any]:
    experts = placed.experts
    policies = {
        name: {
            "fitted": score.fitted,
            "held_out_factor": score.held_out_factor,
            "held_out_factor_worst_layer": float(np.max(score.held_out_factor_L)),
            "step_s": placed.skewed[name].step.total_s,
        }
        for name, score in experts.policies.items()
    }
    return {
        "objective": str(experts.objective),
        "policies": policies,
        "lower_bound": experts.lower_bound,
        "gap": experts.gap,
        "migration": placed.migration.to_dict(),
    }
