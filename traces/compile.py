"""Compiles the kernels of stores and statistics once and for all; cached on disk afterwards.

Run ``python -m traces.compile`` after an installation so that the first pass over a trace need not.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

__all__ = ["compile_kernels"]

TOKENS = 64
WINDOW_TOKENS = 16


def compile_kernels() -> None:
    """Write, read back and count small traces with ids of one byte and of two, from one rank and from two."""
    import numpy as np

    from traces.statistics import collect, merge
    from traces.store import DatasetSource, write_dataset
    from traces.synthesize import synthesize
    from traces.trace import Trace

    for num_experts, top_k in ((8, 2), (300, 8)):
        drawn = synthesize(num_tokens=TOKENS, num_layers=2, num_experts=num_experts, top_k=top_k, seed=0)
        for num_ranks in (1, 2):
            trace = Trace(
                experts_TLK=drawn.experts_TLK,
                num_experts=num_experts,
                sequence_T=drawn.sequence_T,
                position_T=drawn.position_T,
                domain_T=drawn.domain_T,
                domain_names=drawn.domain_names,
                rank_T=np.arange(TOKENS) % num_ranks,
            )
            with tempfile.TemporaryDirectory() as folder:
                write_dataset(trace, Path(folder) / "trace")
                source = DatasetSource(Path(folder) / "trace")
                whole = collect(source, window_tokens=WINDOW_TOKENS)
                half = collect(source, window_tokens=WINDOW_TOKENS, stop=TOKENS // 2)
                merge([half, collect(source, window_tokens=WINDOW_TOKENS, start=TOKENS // 2)])
                whole.profile(None)
                for _ in source.blocks():
                    pass


if __name__ == "__main__":
    sys.stderr.write("compiling the kernels of traces, once (about a minute)\n")
    compile_kernels()
