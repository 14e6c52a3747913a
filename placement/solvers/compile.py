"""Compiles the search's kernels once and for all: about a minute on one core, cached on disk afterwards.

Run ``python -m placement.solvers.compile`` after an installation so that the first solve need not.
"""

from __future__ import annotations

import sys
from pathlib import Path

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


def main() -> None:
    """Compile, and say so."""
    if kernels_are_compiled():
        sys.stdout.write("kernels are compiled\n")
    else:
        sys.stdout.write("compiling kernels, once (about a minute)\n")
    compile_kernels()


if __name__ == "__main__":
    main()
