"""A placement with where it came from, and the shelf on which a job keeps its last good one."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from placement.errors import InputError, ServiceError
from service.client.cache import Kept, PlacementCache
from service.client.fallback import Fallback
from service.client.results import DeploymentPlacement, PlacementFile

if TYPE_CHECKING:
    from placement.plan import Placement

__all__ = ["Fetched", "Shelf", "Source"]

Source = Literal["service", "cache", "contiguous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A placement, and where it came from.

    Parameters
    ----------
    content
        The placement file.
    version, etag
        As the service named it; None for experts in order.
    said
        What was told on stderr, a line each.
    """

    placement: Placement = field(repr=False)
    content: bytes = field(repr=False)
    source: Source
    version: int | None = None
    etag: str | None = None
    said: tuple[str, ...] = ()

    @property
    def file(self) -> PlacementFile:
        """The placement file."""
        return PlacementFile(content=self.content, etag=self.etag)

    def encode(self) -> bytes:
        """Return it as it goes to the other ranks."""
        told = {
            "content": self.content.decode(),
            "source": self.source,
            "version": self.version,
            "etag": self.etag,
            "said": list(self.said),
        }
        return json.dumps(told).encode()

    @classmethod
    def decode(cls, content: bytes) -> Fetched:
        """Read what another rank encoded.

        Raises
        ------
        ServiceError
            If that rank had none; as it was raised there.
        """
        told = json.loads(content)
        if "error" in told:
            error = ServiceError(f"rank 0: {told['error']}")
            error.exit_code = told["exit_code"]
            raise error
        file = PlacementFile(content=told["content"].encode())
        return cls(
            placement=file.placement(),
            content=file.content,
            source=told["source"],
            version=told["version"],
            etag=told["etag"],
            said=tuple(told["said"]),
        )


class Shelf:
    """What a job has at hand, and what it says about it."""

    def __init__(
        self, deployment: str, *, cache_dir: str | os.PathLike[str] | None, fallback: Fallback | None
    ) -> None:
        self._deployment = deployment
        self._cache = None if cache_dir is None else PlacementCache(cache_dir)
        self._fallback = fallback
        self._said: list[str] = []

    def say(self, text: str) -> None:
        """Tell something on stderr, loudly."""
        line = " ".join(text.split())
        self._said.append(line)
        sys.stderr.write(f"moe-placement: WARNING: {line}\n")

    def kept(self) -> Fetched | None:
        """Return the last good one, if there is one and it fits."""
        if self._cache is None:
            return None
        try:
            kept = self._cache.read(self._deployment)
            return None if kept is None else self._checked(kept.as_answer(), "cache")
        except InputError as exc:
            self.say(f"the kept placement is not used: {exc}")
            return None

    def taken(self, answer: DeploymentPlacement | None) -> Fetched:
        """Check what the service answered, and keep it.

        Raises
        ------
        InputError
            If it is no placement, or does not fit the job.
        """
        if answer is None:
            raise ServiceError("it says that nothing has changed, and nothing is known")
        fetched = self._checked(answer, "service")
        if self._cache is not None:
            kept = Kept(
                label=self._deployment, content=answer.content, version=answer.version, etag=answer.etag
            )
            try:
                self._cache.write(self._deployment, kept)
            except InputError as exc:
                self.say(f"the placement could not be kept for later: {exc}")
                return replace(fetched, said=tuple(self._said))
        return fetched

    def current(self, kept: Fetched) -> Fetched:
        """Return the kept one, which the service says is the one to run."""
        return replace(kept, source="service", said=tuple(self._said))

    def last_resort(self, kept: Fetched | None) -> Fetched:
        """Return the kept one, else experts in order.

        Raises
        ------
        ServiceError
            If neither can be had.
        """
        if kept is not None:
            named = "" if kept.version is None else f", version {kept.version}"
            self.say(f"running {self._deployment} with the last good placement{named}")
            return replace(kept, said=tuple(self._said))
        if self._fallback is None:
            raise ServiceError(
                f"{self._said[-1]}; none is kept, and no topology and model to put experts in order"
            )
        from placement.io import dump_json, placement_to_dict

        placement = self._fallback.contiguous()
        self.say(f"running {self._deployment} with experts in order, which nothing has optimised")
        provenance = {"solver": "contiguous", "why": self._said[0]}
        content = dump_json(placement_to_dict(placement, provenance=provenance)).encode()
        return Fetched(placement=placement, content=content, source="contiguous", said=tuple(self._said))

    def _checked(self, answer: DeploymentPlacement, source: Source) -> Fetched:
        placement = answer.placement()
        if self._fallback is not None:
            self._fallback.check(placement)
        return Fetched(
            placement=placement,
            content=answer.content,
            source=source,
            version=answer.version,
            etag=answer.etag,
            said=tuple(self._said),
        )
