"""Watches the deployments: measures drift, has placements solved anew, promotes them, takes bad ones back.

A loop in a thread, in every process that works. What a deployment's refresh has come to stands in the
database alone, and every step is one compare-and-set on what was read before, so that a controller may be
killed at any point, and any number of them may run: another one goes on from what is written there.

========== ===============================================================================================
phase      next step
========== ===============================================================================================
idle       new windows: measure drift; if it is due and nothing holds it back, keep the windows to
           fit as a trace, and write down the plan (`starting`)
starting   queue the solve of the plan, under an idempotency key that names this refresh (`solving`)
solving    when the solve has ended: judge its placement on windows that it was not fitted to, and
           promote it or note why not (`idle`)
========== ===============================================================================================

Whatever was promoted is then observed for `judge_windows` windows against the placement before it; an
automatic promotion that turns out worse is taken back.

The lease on a deployment keeps controllers from computing the same thing at the same time; it is kept by
counting beats, watched with one's own monotonic clock, and nothing depends on it but effort.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from placement.errors import PlacementError
from service.deployments import counting
from service.deployments.calculator import Calculator, RefusedError
from service.deployments.leases import LeaseLostError, Leases
from service.deployments.records import Cause, Deployment, NewVersion, Phase, RefreshState, Version
from service.deployments.refresh import (
    CONTROLLER,
    cool_down,
    holds_back,
    refusal,
    restarted,
    solve_of,
)
from service.errors import NotFoundError, PreconditionError, QueueFullError
from service.ids import new_id
from service.settings import Settings
from service.state.database import Database
from service.state.deployments import DeploymentStore
from service.state.jobs import JobStore
from service.state.records import Job

__all__ = ["Controller"]

_log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Seconds between two looks at what is new."""

PAUSE_S = 1.0
"""Least seconds between two measurements of one deployment."""

LONGEST_PAUSE_S = 300.0

STAYS_BEHIND = (PlacementError, SQLAlchemyError, OSError)
"""What may go wrong with one deployment or the database without ending the controller."""


@dataclass(slots=True)
class _Seen:
    """What this controller remembers of a deployment."""

    not_before: float = 0.0
    again_at: float | None = None
    failures: int = 0


class Controller:
    """One of the controllers of all deployments.

    Parameters
    ----------
    database, settings
        As of this process.
    look_s, pause_s
        Seconds between two looks, and between two measurements of one deployment.
    """

    def __init__(
        self, database: Database, settings: Settings, *, look_s: float = LOOK_S, pause_s: float = PAUSE_S
    ) -> None:
        self.id = new_id("w")
        self._settings = settings
        self._deployments = DeploymentStore(database)
        self._jobs = JobStore(database)
        self._leases = Leases(self._deployments, self.id, lease_s=settings.lease_seconds)
        self._calculator = Calculator(settings)
        self._seen: dict[str, _Seen] = {}
        self._newest_seen = -1
        self._newest_of_each: dict[str, int] = {}
        self._look_s = look_s
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="controller", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End soon: what is being computed is dropped, and another controller, or the next one, goes on."""
        self._stop.set()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def run(self) -> None:
        """Look for work until told to stop."""
        try:
            while not self._stop.wait(self._look_s):
                try:
                    self.look()
                except STAYS_BEHIND as exc:
                    _log.warning("the controller cannot look for work: %s", " ".join(str(exc).split()))
                self._calculator.rest()
        finally:
            self._calculator.close()

    def look(self) -> None:
        """Take the next step of every deployment that is due."""
        newest = self._newest_parts()
        states = self._deployments.states()
        self._seen = {name: self._seen.get(name, _Seen()) for name in states}
        for name, state in states.items():
            if self._stop.is_set():
                return
            # Always looked at, so that a lease is known to stand still by the time that there is work.
            is_free = self._leases.is_free(name, state)
            if is_free and self._is_due(name, state, newest.get(name, 0)):
                self._work(name, state)

    def _newest_parts(self) -> dict[str, int]:
        """Return the number of the last part of every deployment, asked for where there is a new one."""
        newest = self._deployments.windows.newest()
        if newest != self._newest_seen:
            self._newest_of_each = self._deployments.windows.newest_of_each()
            self._newest_seen = newest
        return self._newest_of_each

    def _is_due(self, name: str, state: RefreshState, newest: int) -> bool:
        seen = self._seen[name]
        if time.monotonic() < seen.not_before:
            return False
        if state.phase is Phase.STARTING:
            return True
        if state.phase is Phase.SOLVING:
            return self._has_ended(state)
        again = seen.again_at is not None and time.monotonic() >= seen.again_at
        return newest > state.evaluated or again

    def _has_ended(self, state: RefreshState) -> bool:
        job = self._jobs.get(state.job_id or "")
        return job is None or job.is_final

    def _work(self, name: str, state: RefreshState) -> None:
        seen = self._seen[name]
        if not self._leases.take(name, state):
            return
        try:
            self._step(name)
            seen.failures = 0
            seen.not_before = time.monotonic() + self._pause_s
        except (LeaseLostError, NotFoundError, PreconditionError) as exc:
            _log.info("deployment %s has changed meanwhile: %s", name, exc)
        except STAYS_BEHIND as exc:
            seen.failures += 1
            pause_s = min(LONGEST_PAUSE_S, 2.0 ** min(seen.failures, 10))
            seen.not_before = time.monotonic() + pause_s
            _log.warning("deployment %s: %s; next try in %.0f s", name, " ".join(str(exc).split()), pause_s)
        finally:
            self._leases.release(name)

    def _ask(self, task: str, name: str, **question: Any) -> dict[str, Any]:
        """Compute something in the child, and give signs of life meanwhile."""

        def meanwhile() -> None:
            if self._stop.is_set():
                raise LeaseLostError("this controller ends")
            self._leases.keep(name)

        return self._calculator.ask(task, meanwhile=meanwhile, name=name, **question)

    # -- the steps -------------------------------------------------------------------------------------------

    def _step(self, name: str) -> None:
        deployment = self._deployments.get(name)
        phase = deployment.refresh.phase
        if phase is Phase.STARTING:
            self._submit(deployment)
        elif phase is Phase.SOLVING:
            self._conclude(deployment)
        else:
            self._measure(deployment)

    def _measure(self, deployment: Deployment) -> None:
        """Measure drift, and act on what was observed since the last promotion."""
        try:
            evaluation = self._ask("evaluate", deployment.name)
        except RefusedError as exc:
            # Windows that say nothing, such as those of a layer that routed no token.
            state = replace(deployment.refresh, evaluated=self._newest(deployment.name))
            problem = {"problem": str(exc), "measured_at": time.time()}
            self._deployments.save(deployment.name, state, drift=problem)
            return
        now = time.time()
        state = replace(deployment.refresh, evaluated=evaluation["evaluated"])
        state = replace(state, cool_down=restarted(state, now) or state.cool_down)
        observed = evaluation["observed"]
        if observed is not None and self._is_bad(deployment, observed):
            self._take_back(deployment, state, observed)
            return
        if observed is not None and observed["complete"]:
            state = replace(state, watch=None)
        deployment = replace(deployment, refresh=state)
        wait = holds_back(deployment, evaluation, now)
        self._seen[deployment.name].again_at = (
            None if wait is None or wait.seconds is None else time.monotonic() + wait.seconds
        )
        kept = {key: evaluation[key] for key in ("windows", "incomplete", "fresh")}
        drift = {
            **(evaluation["drift"] or {}),
            **kept,
            "measured_at": now,
            "holds_back": None if wait is None else wait.why,
        }
        if wait is None:
            state = self._planned(deployment, state)
        written = self._deployments.save(
            deployment.name,
            state,
            drift=drift,
            observed=None if observed is None else {observed["version"]: observed},
            audit=_started(state, drift) if wait is None else None,
        )
        if written is not None and written.phase is Phase.STARTING:
            self._submit(replace(deployment, refresh=written))

    def _planned(self, deployment: Deployment, state: RefreshState) -> RefreshState:
        plan = self._ask("prepare", deployment.name)
        number = state.number + 1
        return replace(state, phase=Phase.STARTING, number=number, plan={**plan, "number": number})

    def _submit(self, deployment: Deployment) -> None:
        """Queue the solve of the plan; where it is queued already, it is the same one."""
        state = deployment.refresh
        try:
            found = self._jobs.submit(
                [solve_of(deployment, max_threads=self._settings.max_threads)],
                max_queued=self._settings.max_queued,
            )[0]
        except QueueFullError as exc:
            _log.warning("deployment %s: the refresh waits: %s", deployment.name, exc)
            self._seen[deployment.name].not_before = time.monotonic() + self._pause_s
            return
        self._deployments.save(deployment.name, replace(state, phase=Phase.SOLVING, job_id=found.job.id))

    def _conclude(self, deployment: Deployment) -> None:
        """Promote what the solve has found, or note why not."""
        state, plan = deployment.refresh, deployment.refresh.plan or {}
        job = self._jobs.get(state.job_id or "")
        if deployment.version != plan.get("of_version"):
            self._end(deployment, "superseded", f"version {deployment.version} was promoted meanwhile")
        elif deployment.spec["policy"]["mode"] != "auto":
            self._end(deployment, "superseded", "the policy is manual by now")
        elif job is None or job.placement_digest is None:
            self._end(deployment, "failed", _failure(job))
        else:
            self._judge(deployment, job, job.placement_digest)

    def _judge(self, deployment: Deployment, job: Job, candidate: str) -> None:
        plan, policy = deployment.refresh.plan or {}, deployment.spec["policy"]
        try:
            judged = self._ask("judge", deployment.name, candidate=candidate, plan=plan)
        except RefusedError as exc:
            self._end(deployment, "failed", f"the placement cannot be judged: {exc}")
            return
        why = refusal(policy, judged)
        if why is not None:
            # A solve that was cut short does not say what could have been attained.
            was_cut = (job.result or {}).get("termination") not in ("converged", "optimal")
            balance = None if was_cut else min(judged["balance"], judged["previous_balance"])
            self._end(deployment, "refused", why, judged=judged, attainable=balance)
            return
        told = (
            f"drift of {(deployment.drift or {}).get('excess', 0.0):.1%}; {judged['moves']} moves gain "
            f"{judged['gain']:.1%} in balance on {judged['judge_windows']} windows that were not fitted"
        )
        predicted = {**judged, "objective": (job.result or {}).get("objective")}
        new = NewVersion(
            digest=candidate,
            cause=Cause.AUTOMATIC,
            by=CONTROLLER,
            why=told,
            job_id=job.id,
            predicted=predicted,
        )
        self._promote(deployment, deployment.refresh, new, "promoted", told, judged=judged)

    def _is_bad(self, deployment: Deployment, observed: dict[str, Any]) -> bool:
        """Tell whether an automatic promotion turned out worse than what ran before."""
        if not observed["complete"] or observed.get("gain") is None or observed["gain"] >= 0:
            return False
        version = self._deployments.version(deployment.name, observed["version"])
        return (
            deployment.spec["policy"]["rollback"]
            and deployment.version == observed["version"]
            and version is not None
            and version.cause is Cause.AUTOMATIC
        )

    def _take_back(self, deployment: Deployment, state: RefreshState, observed: dict[str, Any]) -> None:
        bad = observed["version"]
        before = self._deployments.version(deployment.name, (state.watch or {})["previous"])
        if before is None:
            raise NotFoundError(f"version {(state.watch or {})['previous']} of {deployment.name} is gone")
        why = (
            f"version {bad} was promoted automatically and is worse than version {before.version}: balance "
            f"{observed['balance']:.4f} against {observed['previous_balance']:.4f} on the "
            f"{observed['windows']} windows since"
        )
        new = NewVersion(
            digest=before.placement_digest,
            cause=Cause.ROLLBACK,
            by=CONTROLLER,
            why=why,
            job_id=before.job_id,
            of_version=before.version,
            predicted=before.predicted,
        )
        self._promote(deployment, state, new, "rolled-back", why, observed={bad: observed})

    # -- the ends --------------------------------------------------------------------------------------------

    def _promote(
        self,
        deployment: Deployment,
        state: RefreshState,
        new: NewVersion,
        outcome: str,
        why: str,
        *,
        judged: dict[str, Any] | None = None,
        observed: dict[int, dict[str, Any]] | None = None,
    ) -> Version:
        now = time.time()
        last = {"outcome": outcome, "why": why, "at": now, "solve_id": new.job_id, "judged": judged}
        made = self._deployments.promote(
            deployment.name,
            new,
            expected=deployment.version,
            state=replace(
                state.ended(),
                cool_down=cool_down(now, self._newest(deployment.name)),
                attainable=None,
                last=last,
            ),
            observed=observed,
            counters=counting.refresh(deployment.name, outcome)
            | counting.promotion(deployment.name, new.cause),
        )
        _log.info("deployment %s: version %d, %s: %s", deployment.name, made.version, outcome, why)
        return made

    def _end(
        self,
        deployment: Deployment,
        outcome: str,
        why: str,
        *,
        judged: dict[str, Any] | None = None,
        attainable: float | None = None,
    ) -> None:
        """Note how a refresh ended that has changed nothing."""
        state, now = deployment.refresh, time.time()
        last = {"outcome": outcome, "why": why, "at": now, "solve_id": state.job_id, "judged": judged}
        if attainable is not None:
            state = replace(state, attainable={"version": deployment.version, "balance": attainable})
        self._deployments.save(
            deployment.name,
            replace(state.ended(), cool_down=cool_down(now, self._newest(deployment.name)), last=last),
            counters=counting.refresh(deployment.name, outcome),
            audit=(f"deployment.refresh-{outcome}", {"why": why, "solve_id": state.job_id}),
        )
        _log.info("deployment %s: refresh %s: %s", deployment.name, outcome, why)

    def _newest(self, name: str) -> int:
        return self._deployments.windows.newest_of_each().get(name, 0)


def _failure(job: Job | None) -> str:
    if job is None:
        return "the solve is gone"
    error = job.error or {}
    return f"the solve is {job.status} and has no placement: {error.get('message', 'no reason given')}"


def _started(state: RefreshState, drift: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the entry of the audit log for the start of a refresh."""
    plan = state.plan or {}
    detail = {
        "number": state.number,
        "of_version": plan.get("of_version"),
        "fitted_windows": len(plan.get("fitted", ())),
        "excess": drift.get("excess"),
    }
    return "deployment.refresh", detail
