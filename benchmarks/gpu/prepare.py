"""Fits every policy and cuts the held-out routing: all that needs solvers and traces, done beforehand.

Placements are fitted on even windows; odd windows alone are replayed. An emulated instance is fitted at the
size of its largest batch.

Shape letters: W windows, L layers, E experts, S slots, D devices.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import data_folder, environment
from benchmarks.gpu.folder import Array, Fitted, Prepared, read_prepared, write_prepared
from benchmarks.gpu.instances import Instance
from benchmarks.gpu.policies import Policy, policies_of
from benchmarks.gpu.traffic import (
    SEED,
    choose_slots,
    expert_loads,
    held_out_windows,
    received_tokens,
    trace_of,
    window_experts,
)
from placement import CostModel, PlacementProblem, make_problem, optimize, parse_topology
from placement.calibration import Calibration, DataSheetCalibration, read_calibration
from placement.profile import RoutingProfile
from traces.statistics import build_profile
from traces.trace import Trace

__all__ = ["default_calibrations", "prepare"]

TRANSPORTS = ("nvlink", "shm")
FOLDS = 2


def default_calibrations() -> dict[str, Path]:
    """Return the measured curves that are at hand, by transport."""
    files = {name: data_folder() / "measured" / f"h100x2_{name}_curves.json" for name in TRANSPORTS}
    return {name: file for name, file in files.items() if file.exists()}


def prepare(
    instance: Instance,
    folder: Path,
    *,
    calibrations: Mapping[str, Path],
    work_s: float | None = None,
    refit: bool = True,
) -> None:
    """Fit all policies of an instance and write its files.

    Parameters
    ----------
    instance
        What to prepare.
    folder
        Where the files go.
    calibrations
        Calibration file by transport; the data sheet serves a transport without one.
    work_s
        Effort of each solve, in seconds of one thread.
    refit
        Whether to solve what the folder has an answer for already, by the same calibration.
    """
    trace = trace_of(instance)
    profile = build_profile(trace, window_tokens=instance.window_tokens)
    windows = held_out_windows(profile.num_windows, instance.num_windows)
    policies = {} if refit else _known(instance, folder, calibrations)
    fit, held = _scaled(profile, instance).split_alternate()
    for policy in _policies(instance):
        if policy.name not in policies:
            policies[policy.name] = _fit(instance, policy, fit, held, calibrations, work_s)
        told = policies[policy.name].about
        print(f"  {policy.name:22} {told['seconds']:6.1f} s  balance {told['balance']:.4f}", file=sys.stderr)
    cut = _emulated_arrays if instance.emulated else _replayed_arrays
    write_prepared(
        folder,
        Prepared(
            instance=instance,
            policies=policies,
            windows=tuple(int(window) for window in windows),
            arrays=cut(instance, trace, windows, policies),
            about=_about(profile, calibrations),
        ),
    )


def _known(instance: Instance, folder: Path, calibrations: Mapping[str, Path]) -> dict[str, Fitted]:
    """Return what was fitted before for the same instance, by the same calibration."""
    if not (folder / f"{instance.name}.json").exists():
        return {}
    before = read_prepared(folder, instance.name)
    # How much is measured changes nothing about what is fitted.
    same = replace(before.instance, num_windows=instance.num_windows, note=instance.note)
    if same != instance:
        return {}
    wanted = {policy.name: _digest(policy, calibrations) for policy in _policies(instance)}
    return {
        name: one for name, one in before.policies.items() if one.about.get("calibration") == wanted.get(name)
    }


def _policies(instance: Instance) -> tuple[Policy, ...]:
    # Emulated ranks talk over no link: their exchange is predicted for the fast one.
    names = TRANSPORTS[:1] if instance.emulated else TRANSPORTS
    return tuple(dict.fromkeys(policy for name in names for policy in policies_of(name)))


def _about(profile: RoutingProfile, calibrations: Mapping[str, Path]) -> dict[str, Any]:
    return {
        **environment(),
        "seed": SEED,
        "trace_windows": profile.num_windows,
        "fitted_windows": (profile.num_windows + 1) // FOLDS,
        "calibrations": {name: file.name for name, file in calibrations.items()},
    }


def _digest(policy: Policy, calibrations: Mapping[str, Path]) -> str:
    """Return the digest of the calibration that a policy is fitted with; empty for the data sheet's."""
    if policy.transport not in calibrations:
        return ""
    return hashlib.sha256(calibrations[policy.transport].read_bytes()).hexdigest()[:12]


def _calibration(policy: Policy, calibrations: Mapping[str, Path]) -> Calibration:
    if policy.transport in calibrations:
        return read_calibration(calibrations[policy.transport])
    return DataSheetCalibration()


def _scaled(profile: RoutingProfile, instance: Instance) -> RoutingProfile:
    """Return the profile at the size of the largest batch: costs are not linear in tokens."""
    factor = max(instance.batches.values(), default=instance.window_tokens) / instance.window_tokens
    return replace(
        profile,
        load_WLE=profile.load_WLE * factor,
        window_tokens_W=profile.window_tokens_W * factor,
        tail_tokens=0 if factor != 1 else profile.tail_tokens,
    )


def _fit(
    instance: Instance,
    policy: Policy,
    fit: RoutingProfile,
    held: RoutingProfile,
    calibrations: Mapping[str, Path],
    work_s: float | None,
) -> Fitted:
    problem = make_problem(
        fit,
        parse_topology(f"h100:1x{instance.num_ranks}"),
        model=instance.shape.model(len(instance.layers)),
        calibration=_calibration(policy, calibrations),
        objective=policy.objective,
        spare_slots=instance.spare_slots if policy.spare else 0,
        replica_split=policy.split,
    )
    began_s = time.perf_counter()
    solution = optimize(problem, solver=policy.solver, seed=SEED, work_s=work_s)
    about = {
        "solver": solution.solver,
        "calibration": _digest(policy, calibrations),
        "seconds": round(time.perf_counter() - began_s, 2),
        **_held_out(problem, solution.placement, held),
    }
    return Fitted(placement=solution.placement, split=policy.split, about=about)


def _held_out(problem: PlacementProblem, placement: Any, held: RoutingProfile) -> dict[str, float]:
    breakdown = CostModel(problem.with_profile(held)).evaluate(placement)
    return {"balance": float(breakdown.balance_WL.mean()), "predicted_step_s": breakdown.step}


def _loads(instance: Instance, trace: Trace, window: int) -> Array:
    experts_TLK = window_experts(trace, window, instance.window_tokens)
    return expert_loads(experts_TLK, trace.num_experts)


def _replayed_arrays(
    instance: Instance, trace: Trace, windows: Array, policies: Mapping[str, Fitted]
) -> dict[str, Array]:
    cut = [window_experts(trace, int(window), instance.window_tokens) for window in windows]
    recent = [_loads(instance, trace, int(window) - 1) for window in windows]
    return {"experts_WTLK": np.stack(cut), "recent_WLE": np.stack(recent)}


def _emulated_arrays(
    instance: Instance, trace: Trace, windows: Array, policies: Mapping[str, Fitted]
) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for batch, tokens in instance.batches.items():
        for name, fitted in policies.items():
            counted = [_count(instance, fitted, trace, int(window), tokens) for window in windows]
            arrays[f"rows/{name}/{batch}"] = np.stack([rows_LS for rows_LS, _ in counted])
            arrays[f"received/{name}/{batch}"] = np.stack([received_LD for _, received_LD in counted])
    return arrays


def _count(instance: Instance, fitted: Fitted, trace: Trace, window: int, tokens: int) -> tuple[Array, Array]:
    """Tokens of each slot ``[layers, slots]``, and received by each device ``[layers, devices]``."""
    experts_TLK = window_experts(trace, window, instance.window_tokens)
    recent_LE = _loads(instance, trace, window - 1)
    experts_TLK = experts_TLK[:: max(1, len(experts_TLK) // tokens)]
    factor = tokens / len(experts_TLK)
    rows, received = [], []
    for layer, recent_E in enumerate(recent_LE):
        slot_TK = choose_slots(
            experts_TLK[:, layer], fitted.placement, layer, split=fitted.split, recent_E=recent_E
        )
        rows.append(np.bincount(slot_TK.ravel(), minlength=fitted.placement.num_slots) * factor)
        received.append(received_tokens(slot_TK, fitted.placement) * factor)
    return np.stack(rows).astype(np.int32), np.stack(received).astype(np.int32)
