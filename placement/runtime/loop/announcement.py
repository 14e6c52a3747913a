"""What rank 0 tells the others: the placement that all are to change over to."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from placement.io import dump_json, placement_from_dict, placement_to_dict
from placement.plan import Placement

__all__ = ["Announcement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A placement and its version."""

    placement: Placement
    version: int | None

    def encode(self) -> bytes:
        """Return it as bytes; what else its file said stays behind."""
        plain = replace(self.placement, extra={})
        return dump_json({"version": self.version, "placement": placement_to_dict(plain)}).encode()

    @classmethod
    def decode(cls, content: bytes) -> Announcement:
        """Read what `encode` wrote.

        Raises
        ------
        InputError
            If it holds no placement.
        """
        told = json.loads(content)
        placement = placement_from_dict(told["placement"], source="the placement of rank 0")
        return cls(placement=placement, version=told["version"])
