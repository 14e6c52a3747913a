"""How the tables became what they are: one revision for each change since the first release.

A new revision is a file ``versions/NNNN_what.py`` after its predecessor, and an entry here; a test holds that
all of them together give exactly the tables that the code describes.
"""

from __future__ import annotations

from typing import Final

__all__ = ["HEAD", "REVISIONS"]

REVISIONS: Final = ("0001",)
"""Known revisions, oldest first; written out so that a start with a current schema need not load alembic."""

HEAD: Final = REVISIONS[-1]
"""What this release works with."""
