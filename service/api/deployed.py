"""What the routes of deployments have in common: who may, which one, and as it is expected to stand."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Header

from service.api.context import Context, context_of
from service.api.describe import problems
from service.api.security import Caller, Scope, require
from service.api.stored import in_thread
from service.deployments.records import Deployment
from service.deployments.serving import digest_of_etag
from service.errors import InvalidError, NotFoundError, PreconditionError
from service.state.deployments import ANY, Expected

__all__ = [
    "BUSY",
    "MOST_SPEC_BYTES",
    "NAME",
    "Here",
    "IfMatch",
    "Reader",
    "Writer",
    "check_name",
    "deployment_of",
    "revision_expected",
    "unknown",
    "version_expected",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
MOST_SPEC_BYTES = 4 << 20

Reader = Annotated[Caller, Depends(require(Scope.READ))]
Writer = Annotated[Caller, Depends(require(Scope.SUBMIT))]
Here = Annotated[Context, Depends(context_of)]
IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match",
        max_length=1000,
        description="Change only what stands so: the ETag that was read, or for placements the version.",
    ),
]

BUSY = problems(404, 409, 412, 413, 415)


async def deployment_of(context: Context, name: str) -> Deployment:
    """Return a deployment; raises `NotFoundError` if there is none."""
    if NAME.fullmatch(name) is None:
        raise unknown(name)
    return await in_thread(context.deployments.get, name)


def check_name(name: str) -> None:
    """Refuse what is no name of a deployment."""
    if NAME.fullmatch(name) is None:
        shown = name[:80].encode("ascii", "replace").decode()
        raise InvalidError(
            f"name: {shown!r} is no name: up to 64 letters, digits, '.', '_' and '-', a letter or digit first"
        )


def unknown(name: str) -> NotFoundError:
    """Return the problem of a deployment that is not there."""
    shown = name[:80].encode("ascii", "replace").decode()
    return NotFoundError(f"there is no deployment {shown!r}; make it with PUT /v1/deployments/NAME")


def revision_expected(if_match: str | None, if_none_match: str | None) -> Expected:
    """Return the revision that must stand for a change of the spec."""
    if if_none_match is not None:
        if if_none_match.strip() != "*":
            raise InvalidError(
                "If-None-Match: only * is of use here: create, and change nothing that is there"
            )
        return None
    if if_match is None:
        return ANY
    revisions = re.findall(r'"r(\d{1,18})"', if_match)
    if if_match.strip() != "*" and len(revisions) != 1:
        raise PreconditionError("If-Match names no revision of this deployment; send the ETag that was read")
    return int(revisions[0]) if revisions else ANY


def version_expected(
    if_match: str | None, if_none_match: str | None, context: Context, found: Deployment
) -> Expected:
    """Return the version that must be current for a promotion: as its number, or by the placement's ETag."""
    if if_none_match is not None:
        if if_none_match.strip() != "*":
            raise InvalidError("If-None-Match: only * is of use here: promote the first placement")
        return None
    if if_match is None:
        return ANY
    current = None if found.version is None else context.deployments.version(found.name, found.version)
    tags = [tag.strip() for tag in if_match.split(",")]
    if tags == ["*"] and current is not None:
        return current.version
    for tag in tags:
        number = re.fullmatch(r'"?v?(\d{1,9})"?', tag)
        if number is not None and len(tags) == 1:
            return int(number[1])
        if current is not None and digest_of_etag(tag) == current.placement_digest:
            return current.version
    raise PreconditionError(
        f"If-Match names another placement than the current one of {found.name} "
        f"({'none yet' if current is None else f'version {current.version}'}); read it again"
    )
