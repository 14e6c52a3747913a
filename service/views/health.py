"""The health of a deployment: balance of its posted windows under the versions that ran, and its drift.

Shape letters: W windows, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.plan import Placement
from placement.report.figures.health import DriftLine, health_figure
from placement.report.numbers import number, percent, plural
from service.deployments.analysis import promised_balance
from service.deployments.loads import Windows, merge_parts
from service.deployments.records import Deployment, StoredPart, Version
from service.deployments.resolve import Resolved, resolve
from service.views.figures import figure_entry

__all__ = ["MOST_WINDOWS", "History", "health_entry"]

TITLE = "Balance over posted windows"
MOST_WINDOWS = 200
"""Latest windows that are drawn."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What is stored of a deployment.

    Parameters
    ----------
    versions
        Newest first.
    parts
        Parts of load windows, in order of arrival.
    arrived_at
        Seconds since the epoch at which each part came, by its number.
    """

    deployment: Deployment
    versions: Sequence[Version]
    parts: Sequence[StoredPart]
    arrived_at: Mapping[int, float]


def health_entry(history: History, placement_of: Callable[[str], Placement]) -> dict[str, Any]:
    """Return title, caption and figure; where nothing can be drawn the caption says what to do.

    Parameters
    ----------
    placement_of
        Returns the placement of a digest.
    """
    deployment = history.deployment
    name = deployment.name
    if deployment.version is None:
        return _empty(f"No placement runs yet: promote one with PUT /v1/deployments/{name}/placement.")
    found = resolve(deployment.spec)
    windows = _latest(history, found)
    version_W = _versions_of(history, windows)
    drawn = version_W > 0
    if not drawn.any():
        waiting = f", {plural(windows.num_incomplete, 'window')} so far incomplete" * bool(
            windows.num_incomplete
        )
        return _empty(
            "No complete load window has come since the first promotion"
            f"{waiting}: have every rank post what it counts to /v1/deployments/{name}/windows."
        )
    windows, version_W = windows.select(drawn), version_W[drawn]
    balance_W = _balances(history, found, windows, version_W, placement_of)
    figure = health_figure(
        window_W=windows.window_W.tolist(),
        balance_W=balance_W,
        version_W=version_W.tolist(),
        predicted={one.version: promised_balance(one.predicted) for one in history.versions},
        drift=_drift_line(deployment),
    )
    return figure_entry(TITLE, _caption(history, balance_W, version_W), figure)


def _empty(caption: str) -> dict[str, Any]:
    return figure_entry(TITLE, caption, None)


def _latest(history: History, found: Resolved) -> Windows:
    newest: dict[int, int] = {}
    for part in history.parts:
        newest[part.window] = part.number
    kept = set(sorted(newest, key=lambda window: newest[window])[-MOST_WINDOWS:])
    return merge_parts(
        [part for part in history.parts if part.window in kept],
        num_ranks=history.deployment.spec["num_ranks"],
        num_layers=found.num_layers,
        num_experts=found.num_experts,
    )


def _versions_of(history: History, windows: Windows) -> npt.NDArray[np.int64]:
    """Return the version that ran in each window: as a rank says, else the one at its arrival; 0 for none."""
    known = {one.version for one in history.versions}
    told = {part.number: part.version for part in history.parts if part.version in known}
    return np.array(
        [
            told.get(last) or _version_at(history, history.arrived_at.get(last))
            for last in windows.last_W.tolist()
        ],
        dtype=np.int64,
    )


def _version_at(history: History, at: float | None) -> int:
    if at is None:
        return 0
    return next((one.version for one in history.versions if one.promoted_at <= at), 0)


def _balances(
    history: History,
    found: Resolved,
    windows: Windows,
    version_W: npt.NDArray[np.int64],
    placement_of: Callable[[str], Placement],
) -> FloatArray:
    """Return the balance of each window by the cost model, mean over layers."""
    balance_W = np.empty(len(windows))
    digests = {one.version: one.placement_digest for one in history.versions}
    for version in np.unique(version_W).tolist():
        own = version_W == version
        placement = placement_of(digests[version])
        problem = found.problem(windows.select(own).load_WLE, device_of_slot_S=placement.device_of_slot_S)
        balance_W[own] = CostModel(problem).evaluate(placement).balance_WL.mean(axis=1)
    return balance_W


def _drift_line(deployment: Deployment) -> DriftLine | None:
    drift = deployment.drift
    if drift is None or drift.get("version") != deployment.version:
        return None
    reference, windows = drift.get("reference"), drift.get("windows")
    if not isinstance(reference, int | float) or not math.isfinite(reference) or not isinstance(windows, int):
        return None
    return DriftLine(num_windows=windows, due=reference * (1 + deployment.spec["policy"]["drift_threshold"]))


def _caption(history: History, balance_W: FloatArray, version_W: npt.NDArray[np.int64]) -> str:
    deployment = history.deployment
    own = version_W == deployment.version
    if not own.any():
        return f"Version {deployment.version} runs now; no load window has come since it was promoted."
    current = next(one for one in history.versions if one.version == deployment.version)
    promised = promised_balance(current.predicted)
    balance = number(float(balance_W[own].mean()), digits=4)
    told = (
        f"Version {deployment.version} runs at a balance of {balance}, "
        f"mean of {plural(int(own.sum()), 'window')}"
    )
    told += "." if promised is None else f"; {number(promised, digits=4)} was predicted."
    excess = (deployment.drift or {}).get("excess")
    if _drift_line(deployment) is not None and isinstance(excess, int | float):
        side = "above" if excess > 0 else "below"
        off = f"{percent(abs(excess))} {side}" if abs(excess) >= 5e-4 else "at"
        told += f" Drift: the latest windows are {off} what can be expected."
    return f"{told} 1 would be perfectly even."
