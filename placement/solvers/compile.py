"""Compiles the solvers' kernels once and for all: some minutes on one core, cached on disk afterwards.

Run ``python -m placement.solvers.compile`` after an installation so that the first solve need not. The two
parts, ``search`` and ``solvers``, have few kernels in common, and may be compiled at the same time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from placement.errors import InputError

if TYPE_CHECKING:
    from placement.profile import RoutingProfile

__all__ = ["PARTS", "compile_kernels"]


def compile_kernels(parts: Collection[str] = ()) -> None:
    """Compile every kernel for the types that it is used with.

    Parameters
    ----------
    parts
        Names of `PARTS`; all of them if none is given.

    Raises
    ------
    InputError
        If there is no such part.
    """
    for part in parts or PARTS:
        if part not in PARTS:
            raise InputError(f"there is no part {part!r} to compile; name one of {', '.join(PARTS)}")
        PARTS[part]()


def _profile() -> RoutingProfile:
    """Return the routing of 64 tokens over 4 experts, in two windows."""
    import numpy as np

    from placement.profile import RoutingProfile

    experts_TLK = np.stack([np.arange(64) % 4, (np.arange(64) + 1) % 4], axis=1).astype(np.uint8)[:, None, :]
    return RoutingProfile(
        load_WLE=np.full((2, 1, 4), 16.0),
        window_tokens_W=np.full(2, 32.0),
        top_k=2,
        experts_TLK=experts_TLK,
        window_of_token_T=np.repeat(np.arange(2), 32),
    )


def _two_layers(profile: RoutingProfile) -> RoutingProfile:
    from dataclasses import replace

    import numpy as np

    assert profile.experts_TLK is not None
    return replace(
        profile,
        load_WLE=np.repeat(profile.load_WLE, 2, axis=1),
        experts_TLK=np.repeat(profile.experts_TLK, 2, axis=1),
    )


def _compile_search() -> None:
    """Compile costs, the search, and changes within a budget."""
    from dataclasses import replace

    import numpy as np

    from placement.calibration import LinearCalibration
    from placement.cost import CostModel
    from placement.cost.incremental import LayerState
    from placement.optimizer import optimize
    from placement.problem import make_problem
    from placement.topology import parse_shorthand

    profile = _profile()
    assert profile.experts_TLK is not None
    wide = replace(profile, experts_TLK=profile.experts_TLK.astype(np.uint16))
    problem = make_problem(profile, parse_shorthand("h100:1x2"), calibration=LinearCalibration(token_cost=1))
    placement = optimize(problem, work_s=0.01).placement
    CostModel(problem.with_profile(wide)).evaluate(placement)
    state = LayerState(CostModel(problem), placement, 0)
    state.swap_delta(0, 2)
    for split in ("hash", "lp"):
        _solve("split", "h100:1x2", change=True, spare_slots=2, replica_split=split)


def _compile_solvers() -> None:
    """Compile the solvers that have kernels of their own."""
    for solver, topology, options in (
        ("exact", "h100:1x2", {}),
        ("exact", "h100:1x2", {"objective": "traffic"}),
        ("exact", "h100:1x2", {"semantics": "stay-put"}),
        ("exact", "h100:1x2", {"semantics": "stay-put", "objective": "traffic"}),
        ("chain", "h100:1x2", {"semantics": "stay-put", "objective": "traffic", "spare_slots": 2}),
        ("chain", "h100:1x2", {"semantics": "stay-put"}),
        ("balance", "h100:1x2", {"objective": "balance", "spare_slots": 2}),
        ("hierarchy", "h100:2x1", {}),
    ):
        _solve(solver, topology, **options)


def _solve(solver: str, topology: str, *, change: bool = False, **options: Any) -> None:
    """Run a solver on a problem of its field, and on request a change of its placement."""
    from placement.calibration import LinearCalibration
    from placement.optimizer import optimize
    from placement.problem import make_problem
    from placement.topology import parse_shorthand

    problem = make_problem(
        _two_layers(_profile()),
        parse_shorthand(topology),
        calibration=LinearCalibration(token_cost=1),
        max_imbalance=2.0,
        **options,
    )
    start = optimize(problem, solver=solver, work_s=0.01).placement
    if change:
        optimize(problem, start=start, max_moves=1, work_s=0.01)


PARTS: dict[str, Callable[[], None]] = {"search": _compile_search, "solvers": _compile_solvers}
"""What is compiled, by name."""


def main(parts: Sequence[str]) -> None:
    """Compile, and say so."""
    sys.stdout.write(f"compiling {' and '.join(parts or PARTS)}, once (some minutes)\n")
    sys.stdout.flush()
    compile_kernels(parts)


if __name__ == "__main__":
    main(sys.argv[1:])
