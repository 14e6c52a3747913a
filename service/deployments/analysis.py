"""What the controller must compute: drift, what to fit, and whether a new placement is worth it.

Runs in a process of its own, since it needs numpy and time; see `service.deployments.child`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from placement.cost import CostBreakdown, CostModel
from placement.errors import InputError
from placement.formats.document import parse_document
from placement.formats.files import placement_from_document
from placement.moves import summarise_moves
from placement.plan import Placement
from service.artifacts import ArtifactFiles
from service.deployments.drift import measure_drift, noise_balance
from service.deployments.loads import Windows, merge_parts
from service.deployments.records import Deployment
from service.deployments.resolve import Resolved, check_fits, resolve
from service.state.artifacts import ArtifactStore
from service.state.database import Database
from service.state.deployments import DeploymentStore
from service.state.jobs import JobStore

__all__ = ["Analysis", "promised_balance"]

Array = npt.NDArray[Any]

LARGEST_FITTED_BYTES = 64 << 20
"""Traces up to this size are read again to know the loads that a placement was fitted to."""


def promised_balance(predicted: Mapping[str, Any] | None) -> float | None:
    """Return the balance that a version promised, if it did."""
    value = (predicted or {}).get("balance")
    if isinstance(value, int | float) and math.isfinite(value) and value >= 1:
        return float(value)
    return None


class Analysis:
    """Answers the controller's questions about one deployment at a time."""

    def __init__(self, database: Database, files: ArtifactFiles) -> None:
        self._deployments = DeploymentStore(database)
        self._artifacts = ArtifactStore(database)
        self._jobs = JobStore(database)
        self._files = files
        self._placement = lru_cache(maxsize=16)(self._read_placement)
        self._fitted = lru_cache(maxsize=16)(self._read_fitted)

    # -- drift -----------------------------------------------------------------------------------------------

    def evaluate(self, name: str) -> dict[str, Any]:
        """Measure the drift of a deployment, and what was observed since its last promotion.

        Returns
        -------
        dict
            ``evaluated`` (number of the last part seen), ``windows`` (complete ones kept), ``fresh`` (those
            since the last change), ``drift`` and ``observed`` (None where there is nothing to say).
        """
        deployment, found, windows, newest = self._read(name)
        policy, state = deployment.spec["policy"], deployment.refresh
        behind = (state.cool_down or {}).get("after", 0)
        answer: dict[str, Any] = {
            "evaluated": newest,
            "windows": len(windows),
            "incomplete": windows.num_incomplete,
            "fresh": len(windows.behind(behind)),
            "drift": None,
            "observed": None,
        }
        if deployment.version is None or not len(windows):
            return answer
        drift = self._drift(deployment, found, windows.latest(policy["min_windows"]))
        observed = self._observed(deployment, found, windows) if state.watch else None
        return {**answer, "drift": drift, "observed": observed}

    def _drift(self, deployment: Deployment, found: Resolved, recent: Windows) -> dict[str, Any]:
        version = self._deployments.version(deployment.name, deployment.version or 0)
        assert version is not None
        metrics = self._evaluate(found, recent, version.placement_digest).metrics
        attainable = deployment.refresh.attainable or {}
        drift = measure_drift(
            balance=metrics.balance,
            floor=metrics.balance_floor,
            noise_floor=noise_balance(recent.load_WLE, found.topology.num_devices),
            predicted=promised_balance(version.predicted),
            attainable=attainable.get("balance") if attainable.get("version") == version.version else None,
            recent_WLE=recent.load_WLE,
            fitted_LE=self._loads_fitted(version.job_id, found),
        )
        due = drift.is_due(deployment.spec["policy"]["drift_threshold"])
        return {"version": version.version, "due": due, **drift.to_dict()}

    def _observed(self, deployment: Deployment, found: Resolved, windows: Windows) -> dict[str, Any] | None:
        """Compare the watched version with the one before it, on the windows since its promotion."""
        watch, wanted = deployment.refresh.watch or {}, deployment.spec["policy"]["judge_windows"]
        since = windows.behind(watch["after"])
        if not len(since):
            return None
        judged = since.select(np.arange(min(len(since), wanted)))
        version = self._deployments.version(deployment.name, watch["version"])
        assert version is not None
        balance = self._evaluate(found, judged, version.placement_digest).metrics.balance
        seen: dict[str, Any] = {"windows": len(judged), "balance": balance, "complete": len(judged) >= wanted}
        before = watch["previous"] and self._deployments.version(deployment.name, watch["previous"])
        if before:
            previous = self._evaluate(found, judged, before.placement_digest).metrics.balance
            seen |= {"previous_balance": previous, "gain": 1 - balance / previous}
        return {"version": watch["version"], **seen}

    # -- refresh ---------------------------------------------------------------------------------------------

    def prepare(self, name: str) -> dict[str, Any]:
        """Keep every other one of the latest windows as a trace to fit; the rest is to judge on.

        Returns
        -------
        dict
            ``trace_digest``, ``start_digest``, ``of_version``, ``fitted`` (numbers of the windows), and
            ``from`` (number of the first part that belongs to the windows of this refresh).
        """
        deployment, found, windows, _ = self._read(name)
        chosen = windows.latest(deployment.spec["policy"]["min_windows"])
        fitted = chosen.select(np.arange(0, len(chosen), 2))
        version = self._deployments.version(name, deployment.version or 0)
        if version is None or len(chosen) < 2:
            raise InputError(f"deployment {name} has no placement, or no two complete windows")
        model_name = None if found.model is None else found.model.name
        content = orjson.dumps(
            {"logical_count": fitted.load_WLE.tolist(), "top_k": found.top_k, "model_name": model_name}
        )
        digest = self._files.put(content)
        summary = {
            "format": "sglang-counts",
            "layers": found.num_layers,
            "experts": found.num_experts,
            "top_k": found.top_k,
            "tokens": round(float(fitted.load_WLE.sum()) / (found.num_layers * found.top_k)),
            "model_name": model_name,
        }
        self._artifacts.add(
            digest=digest,
            kind="trace",
            size_bytes=len(content),
            format="sglang-counts",
            summary=summary,
            created_by="controller",
        )
        return {
            "trace_digest": digest,
            "start_digest": version.placement_digest,
            "of_version": version.version,
            "fitted": fitted.window_W.tolist(),
            "from": int(chosen.first_W.min()),
        }

    def judge(self, name: str, *, candidate: str, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Compare a new placement with the running one on windows that it was not fitted to.

        Returns
        -------
        dict
            ``balance``, ``previous_balance``, ``gain``, ``moves``, ``bytes``, ``transfer_s``,
            ``saved_per_step_s``, ``pay_back_steps``, ``pay_back_s``: None where sizes are not known; with
            ``"pays_back": False`` where nothing is saved.
        """
        deployment, found, windows, _ = self._read(name)
        held = windows.select(
            (windows.last_W >= plan["from"]) & ~np.isin(windows.window_W, np.array(plan["fitted"]))
        )
        if not len(held):
            raise InputError("no window is left that was not fitted; keep more with policy.min_windows")
        before, after = self._placement(plan["start_digest"]), self._placement(candidate)
        check_fits(found, after)
        steps = deployment.spec["policy"]["window_steps"]
        old = self._evaluate(found, held, plan["start_digest"], window_steps=steps)
        new = self._evaluate(found, held, candidate, window_steps=steps)
        moves = summarise_moves(before, after, topology=found.topology, model=found.model)
        return {
            "balance": new.metrics.balance,
            "previous_balance": old.metrics.balance,
            "gain": 1 - new.metrics.balance / old.metrics.balance,
            "judge_windows": len(held),
            "fit_windows": len(plan["fitted"]),
            "moves": moves.num_moves,
            "bytes": moves.total_bytes,
            "transfer_s": moves.seconds,
            **_pay_back(found, old, new, moves.seconds),
        }

    # -- reading ---------------------------------------------------------------------------------------------

    def _read(self, name: str) -> tuple[Deployment, Resolved, Windows, int]:
        deployment = self._deployments.get(name)
        found = resolve(deployment.spec)
        parts = self._deployments.windows.recent(name)
        windows = merge_parts(
            parts,
            num_ranks=deployment.spec["num_ranks"],
            num_layers=found.num_layers,
            num_experts=found.num_experts,
        )
        return deployment, found, windows, max((part.number for part in parts), default=0)

    def _evaluate(
        self, found: Resolved, windows: Windows, digest: str, *, window_steps: int = 1
    ) -> CostBreakdown:
        placement = self._placement(digest)
        problem = found.problem(
            windows.load_WLE, device_of_slot_S=placement.device_of_slot_S, window_steps=window_steps
        )
        return CostModel(problem).evaluate(placement)

    def _read_placement(self, digest: str) -> Placement:
        document = parse_document(self._files.read(digest).decode("utf-8-sig"))
        return placement_from_document(document, source=digest)

    def _loads_fitted(self, job_id: str | None, found: Resolved) -> Array | None:
        """Return the loads of the trace that a solve was fitted to; None where that is not known."""
        job = None if job_id is None else self._jobs.get(job_id)
        if job is None or job.trace_digest is None:
            return None
        fitted_LE = self._fitted(job.trace_digest)
        shape = (found.num_layers, found.num_experts)
        return fitted_LE if fitted_LE is not None and fitted_LE.shape == shape else None

    def _read_fitted(self, digest: str) -> Array | None:
        from traces.counts import ExpertCounts
        from traces.readers import open_trace
        from traces.statistics import RoutingStatistics

        artifact = self._artifacts.get(digest)
        if artifact is None or artifact.size_bytes > LARGEST_FITTED_BYTES:
            return None
        path = self._files.local(digest)
        if not path.is_file():
            return None
        try:
            traffic = open_trace(path)
            if isinstance(traffic, ExpertCounts):
                return np.asarray(traffic.load_WLE.sum(axis=0))
            if isinstance(traffic, RoutingStatistics):
                return np.asarray(traffic.load_LE)
            return _loads_of(traffic)
        except InputError:
            # Counts that only its solve's model explains, or a folder in an archive: drift does without.
            return None


def _loads_of(source: Any) -> Array:
    header = source.header
    load_LE = np.zeros((header.num_layers, header.num_experts), dtype=np.int64)
    offset_L = (np.arange(header.num_layers) * header.num_experts)[None, :, None]
    for block in source.blocks(0, None):
        cell = block.experts_TLK.astype(np.int64) + offset_L
        load_LE += np.bincount(cell.ravel(), minlength=load_LE.size).reshape(load_LE.shape)
    return load_LE


def _pay_back(
    found: Resolved, old: CostBreakdown, new: CostBreakdown, transfer_s: float | None
) -> dict[str, Any]:
    """Say after how many steps the transfer has paid back.

    Where loads do not tell the exchange (dispatch of tokens), the experts' part of a step alone counts: what
    is saved is then at least this.
    """
    unknown = {"saved_per_step_s": None, "pay_back_steps": None, "pay_back_s": None, "pays_back": None}
    if transfer_s is None or not found.has_costs or old.step_unit != "s":
        return unknown
    step_s = [cost.step if math.isfinite(cost.step) else _experts_s(cost) for cost in (old, new)]
    saved_s = step_s[0] - step_s[1]
    if saved_s <= 0:
        return {**unknown, "saved_per_step_s": saved_s, "pays_back": False}
    steps = transfer_s / saved_s
    return {
        "saved_per_step_s": saved_s,
        "pay_back_steps": steps,
        "pay_back_s": steps * step_s[1],
        "pays_back": True,
    }


def _experts_s(cost: CostBreakdown) -> float:
    return float(cost.experts_WL.sum(axis=1).mean())
