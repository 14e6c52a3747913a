"""The link of a process alone, and what is refused before anything is sent."""

from __future__ import annotations

import pytest

from placement.errors import InputError
from placement.runtime.migration.link import MigrationError, MigrationLink, first_line
from placement.runtime.migration.setup import Options
from placement.runtime.parallel.mesh import Mesh


def test_a_process_alone_needs_no_group() -> None:
    """It has its own answer."""
    with MigrationLink(Mesh.single()) as link:
        assert link.gather("mine") == ["mine"]
        assert (link.group, link.stream, list(link.peers)) == (None, None, [0])


def test_a_broken_link_says_why() -> None:
    """The first reason stays."""
    link = MigrationLink(Mesh.single())
    link.give_up("rank 3 is gone", None)
    link.give_up("something else", None)
    with pytest.raises(MigrationError, match=r"is broken \(rank 3 is gone\); make a new one"):
        link.gather(1)


def test_limits_must_be_positive() -> None:
    """Time and chunks."""
    with pytest.raises(InputError, match="time limit is 0 s"):
        MigrationLink(Mesh.single(), timeout_s=0)
    with pytest.raises(InputError, match="chunks of 0 bytes"):
        Options(chunk_bytes=0)


def test_one_line_of_an_error() -> None:
    """Without the place in foreign sources."""
    assert first_line(RuntimeError("[/a/b.cc:78] Timed out\nmore")) == "Timed out"
    assert first_line(RuntimeError()) == "RuntimeError"
