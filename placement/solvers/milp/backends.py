"""Backends by name, imported only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

from placement._suggest import did_you_mean
from placement.errors import InputError
from placement.solvers.milp.backend import Backend

__all__ = ["BACKENDS", "make_backend"]


def _highs() -> Backend:
    from placement.solvers.milp.highs import HighsBackend

    return HighsBackend()


def _cp_sat() -> Backend:
    from placement.solvers.milp.cpsat import CpSatBackend

    return CpSatBackend()


def _mathopt_highs() -> Backend:
    from placement.solvers.milp.mathopt import MathOptBackend

    return MathOptBackend("highs")


def _mathopt_scip() -> Backend:
    from placement.solvers.milp.mathopt import MathOptBackend

    return MathOptBackend("scip")


def _pulp_highs() -> Backend:
    from placement.solvers.milp.pulp_highs import PulpHighsBackend

    return PulpHighsBackend()


def _pulp_cbc() -> Backend:
    from placement.solvers.milp.pulp_cbc import PulpCbcBackend

    return PulpCbcBackend()


_BACKENDS: dict[str, Callable[[], Backend]] = {
    "highs": _highs,
    "cp-sat": _cp_sat,
    "mathopt-highs": _mathopt_highs,
    "mathopt-scip": _mathopt_scip,
    "pulp-highs": _pulp_highs,
    "pulp-cbc": _pulp_cbc,
}

BACKENDS = tuple(_BACKENDS)
"""Names of all backends; the first is the default."""


def make_backend(name: str) -> Backend:
    """Return the backend of a name.

    Raises
    ------
    InputError
        If there is none, with the nearest one.
    """
    if name not in _BACKENDS:
        raise InputError(f"unknown backend {name!r}; {did_you_mean(name, BACKENDS)}")
    return _BACKENDS[name]()
