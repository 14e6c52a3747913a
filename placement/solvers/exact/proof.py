"""Tolerances: how far a proof steps back, and what a load limit allows."""

from __future__ import annotations

__all__ = ["LIMIT_SLACK", "PROOF_STEP"]

PROOF_STEP = 1.0 - 1e-10
"""A proof is the cost model's objective of the placement found, times this factor: that is more than rounding
and the search's own tolerance, and less than the gap at which a solution counts as optimal."""

LIMIT_SLACK = 1.0 + 1e-9
"""Relative excess over the load limit that the optimizer tolerates; what is proved must allow it too."""
