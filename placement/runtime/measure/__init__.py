"""Measures a machine for the cost model: expert products, exchanges, memory, rows, migration.

Run by all processes of a launcher, one for each GPU; one process alone measures what needs no others.
"""

from placement.runtime.measure.machine import calibrate
from placement.runtime.measure.sizes import DEFAULT_MODELS, Pace, Sizes

__all__ = ["DEFAULT_MODELS", "Pace", "Sizes", "calibrate"]
