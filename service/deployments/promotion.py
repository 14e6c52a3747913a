"""From what a caller names to a placement that may be promoted: found, read, and checked against the spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.artifacts import ArtifactFiles
from service.deployments.documents import Promotion
from service.deployments.records import Deployment, Version
from service.errors import ConflictError, InvalidError, NotFoundError
from service.state.artifacts import ArtifactStore
from service.state.deployments import DeploymentStore
from service.state.jobs import JobStore

__all__ = ["Candidate", "Candidates", "previous_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement that a deployment can run, and what is promised of it."""

    digest: str
    job_id: str | None
    predicted: dict[str, Any] | None


class Candidates:
    """Finds and checks placements to promote; needs numpy once it checks one."""

    def __init__(self, jobs: JobStore, artifacts: ArtifactStore, files: ArtifactFiles) -> None:
        self._jobs = jobs
        self._artifacts = artifacts
        self._files = files

    def find(self, body: Promotion, deployment: Deployment) -> Candidate:
        """Return what a caller wants promoted.

        Raises
        ------
        InvalidError
            If not exactly one of both ids is given, or the placement does not fit the deployment.
        NotFoundError, ConflictError
            If there is no such solve or placement, or the solve has none yet.
        """
        given = [one for one in (body.solve_id, body.placement_id) if one is not None]
        if len(given) != 1:
            raise InvalidError("name either solve_id or placement_id")
        named = given[0]
        if body.solve_id is not None or not named.startswith("sha256:"):
            return self._of_solve(named, deployment)
        return self.check(named, deployment)

    def _of_solve(self, job_id: str, deployment: Deployment) -> Candidate:
        job = self._jobs.get(job_id) if job_id.isascii() and job_id.isprintable() else None
        if job is None:
            raise NotFoundError(f"solve_id: there is no solve {job_id.encode('ascii', 'replace').decode()!r}")
        if job.placement_digest is None or not job.is_final:
            raise ConflictError(f"solve_id: {job_id} is {job.status} and has no final placement")
        found = self.check(job.placement_digest, deployment)
        result = job.result or {}
        predicted = _predicted(result.get("objective"), result.get("metrics"))
        return Candidate(digest=found.digest, job_id=job_id, predicted=predicted or found.predicted)

    def check(self, digest: str, deployment: Deployment) -> Candidate:
        """Return a stored placement that fits a deployment.

        Raises
        ------
        NotFoundError
            If there is no such placement.
        InvalidError
            If it does not fit, with the numbers.
        """
        artifact = self._artifacts.get(digest) if digest.isascii() and digest.isprintable() else None
        if artifact is None or artifact.kind != "placement":
            shown = digest.encode("ascii", "replace").decode()
            raise NotFoundError(f"there is no placement {shown!r}; upload it with POST /v1/placements")
        document = self._read(digest)
        predicted = _predicted(document.get("objective"), document.get("metrics"))
        self._check_fits(document, deployment)
        # Named now, so that it is not taken for unused before it is promoted.
        self._artifacts.touch([digest])
        return Candidate(digest=digest, job_id=None, predicted=predicted)

    def _read(self, digest: str) -> Mapping[str, Any]:
        from placement.formats.document import parse_document

        document = parse_document(self._files.read(digest).decode("utf-8-sig"))
        return document if isinstance(document, Mapping) else {}

    def _check_fits(self, document: Mapping[str, Any], deployment: Deployment) -> None:
        from placement.errors import InfeasibleError, InputError
        from placement.formats.files import placement_from_document
        from service.deployments.resolve import check_fits, resolve

        try:
            check_fits(resolve(deployment.spec), placement_from_document(document))
        except (InputError, InfeasibleError) as exc:
            raise InvalidError(f"deployment {deployment.name} cannot run it: {exc}") from exc


def _predicted(objective: Any, metrics: Any) -> dict[str, Any] | None:
    """Return what a solve, or the file that it wrote, says of a placement."""
    if not isinstance(objective, Mapping):
        return None
    figures = {
        key: objective[key] for key in ("name", "value", "unit", "lower_bound", "gap") if key in objective
    }
    balance = metrics.get("balance") if isinstance(metrics, Mapping) else None
    return {"objective": figures, "balance": balance}


def previous_of(deployments: DeploymentStore, found: Deployment, to: int | None) -> Version:
    """Return the version that a rollback goes back to.

    Parameters
    ----------
    to
        Its number; None for the last one with another placement than the current one.

    Raises
    ------
    NotFoundError
        If there is no such version.
    ConflictError
        If there is none to go back to.
    """
    if to is not None:
        version = deployments.version(found.name, to)
        if version is None:
            raise NotFoundError(f"deployment {found.name} has no version {to}")
        return version
    current = None if found.version is None else deployments.version(found.name, found.version)
    before = None if current is None else current.version
    while current is not None and (page := deployments.versions(found.name, before=before)):
        for version in page:
            if version.placement_digest != current.placement_digest:
                return version
        before = page[-1].version
    raise ConflictError(f"deployment {found.name} has run no other placement that it could return to")
