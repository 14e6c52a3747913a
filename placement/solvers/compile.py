"""Compiles the solvers' kernels once and for all: some minutes on one core, cached on disk afterwards.

Run ``python -m placement.solvers.compile`` after an installation so that the first solve need not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from placement.profile import RoutingProfile

__all__ = ["compile_kernels", "kernels_are_compiled"]


def kernels_are_compiled() -> bool:
    """Return whether compiled kernels lie in the cache beside the package (a guess that touches no numba)."""
    folder = Path(__file__).parent / "__pycache__"
    return any(folder.glob("search_kernels.search_layer-*.nbi"))


def compile_kernels() -> None:
    """Compile every kernel for the types that it is used with."""
    from dataclasses import replace

    import numpy as np

    from placement.calibration import LinearCalibration
    from placement.cost import CostModel
    from placement.cost.incremental import LayerState
    from placement.optimizer import optimize
    from placement.problem import make_problem
    from placement.profile import RoutingProfile
    from placement.topology import parse_shorthand

    experts_TLK = np.stack([np.arange(64) % 4, (np.arange(64) + 1) % 4], axis=1).astype(np.uint8)[:, None, :]
    profile = RoutingProfile(
        load_WLE=np.full((2, 1, 4), 16.0),
        window_tokens_W=np.full(2, 32.0),
        top_k=2,
        experts_TLK=experts_TLK,
        window_of_token_T=np.repeat(np.arange(2), 32),
    )
    wide = replace(profile, experts_TLK=experts_TLK.astype(np.uint16))
    problem = make_problem(profile, parse_shorthand("h100:1x2"), calibration=LinearCalibration(token_cost=1))
    placement = optimize(problem, work_s=0.01).placement
    CostModel(problem.with_profile(wide)).evaluate(placement)
    state = LayerState(CostModel(problem), placement, 0)
    state.swap_delta(0, 2)
    _compile_other_solvers(profile)


def _compile_other_solvers(profile: RoutingProfile) -> None:
    """Run every solver that has kernels of its own on a problem of its field."""
    from dataclasses import replace

    import numpy as np

    from placement.calibration import LinearCalibration
    from placement.optimizer import optimize
    from placement.problem import make_problem
    from placement.topology import parse_shorthand

    two_layers = replace(
        profile,
        load_WLE=np.repeat(profile.load_WLE, 2, axis=1),
        experts_TLK=None if profile.experts_TLK is None else np.repeat(profile.experts_TLK, 2, axis=1),
    )
    linear = LinearCalibration(token_cost=1)
    for solver, topology, options in (
        ("exact", "h100:1x2", {}),
        ("exact", "h100:1x2", {"objective": "traffic"}),
        ("exact", "h100:1x2", {"semantics": "stay-put"}),
        ("exact", "h100:1x2", {"semantics": "stay-put", "objective": "traffic"}),
        ("chain", "h100:1x2", {"semantics": "stay-put", "objective": "traffic", "spare_slots": 2}),
        ("chain", "h100:1x2", {"semantics": "stay-put"}),
        ("balance", "h100:1x2", {"objective": "balance", "spare_slots": 2}),
        ("hierarchy", "h100:2x1", {}),
        ("split", "h100:1x2", {"spare_slots": 2, "replica_split": "hash"}),
        ("split", "h100:1x2", {"spare_slots": 2, "replica_split": "lp"}),
    ):
        problem = make_problem(
            two_layers, parse_shorthand(topology), calibration=linear, max_imbalance=2.0, **options
        )
        start = optimize(problem, solver=solver, work_s=0.01).placement
        if solver == "split":
            optimize(problem, start=start, max_moves=1, work_s=0.01)


def main() -> None:
    """Compile, and say so."""
    if kernels_are_compiled():
        sys.stdout.write("kernels are compiled\n")
    else:
        sys.stdout.write("compiling kernels, once (some minutes)\n")
    compile_kernels()


if __name__ == "__main__":
    main()
