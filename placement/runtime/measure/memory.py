"""Times the GPU's memory and what it costs the host to launch a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from placement.runtime.measure.bench import Bench
from placement.runtime.measure.timing import pooled

__all__ = ["memory_figures"]


def memory_figures(bench: Bench) -> dict[str, object]:
    """Return ``hbm_gb_s`` (bytes read plus bytes written), ``launch_ms`` and their spread."""
    bench.tell("memory and launches")
    done = bench.sweep(
        ("hbm_gb_s", "launch_ms"),
        what="figures of the memory and of launches",
        amount=lambda _name: 0.0,
        measure=lambda name: (
            bench.alone(_copy(bench)) if name == "hbm_gb_s" else bench.alone_on_host(_launches(bench))
        ),
    )
    figures: dict[str, object] = {}
    spread: dict[str, list[float]] = {}
    for name, timing in bench.over_ranks(done, pooled):
        if name == "hbm_gb_s":
            figures[name], spread[name] = timing.rates(2.0 * bench.sizes.hbm_bytes)
        else:
            launches = bench.sizes.launches
            figures[name], spread[name] = timing.ms / launches, [one / launches for one in timing.spread]
    return {**figures, "spread": spread}


def _copy(bench: Bench) -> Callable[[], object]:
    source = bench.random(bench.sizes.hbm_bytes // bench.dtype.itemsize)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _launches(bench: Bench) -> Callable[[], object]:
    """Kernels too small to keep a GPU busy: their launches are all that takes time."""
    one = torch.zeros(1, device=bench.mesh.device)

    def launch() -> None:
        for _ in range(bench.sizes.launches):
            one.add_(1.0)

    return launch
