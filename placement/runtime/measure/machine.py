"""Measures a machine from end to end: the contents of its calibration file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from placement.model_shape import ModelShape
from placement.runtime.measure.bench import Bench
from placement.runtime.measure.exchanges import exchange_figures
from placement.runtime.measure.experts import expert_curves
from placement.runtime.measure.memory import memory_figures
from placement.runtime.measure.migration import migration_figures
from placement.runtime.measure.provenance import provenance
from placement.runtime.measure.rows import row_curves
from placement.runtime.measure.shapes import ExpertShape, models_named, shape_on_rank
from placement.runtime.measure.sizes import Sizes
from placement.runtime.measure.world import agree_on, joined, mesh_over, places, remarks
from placement.runtime.parallel.mesh import Mesh

__all__ = ["calibrate"]

TIMEOUT_S = 60.0


def calibrate(
    *,
    models: Sequence[str],
    devices_per_node: int | None,
    quick: bool,
    progress: Callable[[str], None],
    measured_at: str | None = None,
    sizes: Sizes | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, object] | None:
    """Measure this machine with all processes that the launcher started, or with this one alone.

    Parameters
    ----------
    models
        Presets whose experts are measured; empty for some of different sizes.
    devices_per_node
        Ranks of a node; None for as many as the launcher started on each machine.
    quick
        Fewer points and repeats: about a minute on GPUs, not four.
    progress
        Told in a line what comes next; on the first rank alone.
    measured_at
        ISO 8601 time for the file.
    sizes
        What is measured; default: by `quick` and whether there are GPUs.
    timeout_s
        Limit for the processes to meet, and of each exchange, in seconds.

    Returns
    -------
    dict or None
        Contents of the calibration file on the first rank, None on others.

    Raises
    ------
    InputError
        On every rank, if ranks were given different arguments, a model is unknown, ranks do not fill nodes,
        or GPUs do not suffice.
    BackendError
        If another rank stops or does not answer in time, or memory runs out.
    """
    with joined(timeout_s), torch.no_grad():
        agree_on(
            models=tuple(models),
            devices_per_node=devices_per_node,
            quick=quick,
            sizes=sizes,
            timeout_s=timeout_s,
        )
        shapes = models_named(models)
        place_D = places()
        mesh = mesh_over(place_D, devices_per_node=devices_per_node, timeout_s=timeout_s)
        chosen = sizes or _default_sizes(mesh, quick=quick)
        bench = Bench(
            mesh=mesh,
            sizes=chosen.within(min(place.free_bytes for place in place_D)),
            progress=progress,
            notes=remarks(place_D, mesh),
        )
        head = provenance(place_D, mesh, dtype=bench.dtype, measured_at=measured_at)
        contents = {**head, **_figures(bench, shapes), "notes": bench.notes}
        return contents if mesh.rank == 0 else None


def _default_sizes(mesh: Mesh, *, quick: bool) -> Sizes:
    return Sizes.for_gpu(quick=quick) if mesh.device.type == "cuda" else Sizes.for_cpu(quick=quick)


def _figures(bench: Bench, models: Sequence[ModelShape]) -> dict[str, object]:
    """Everything that is measured, one after the other, in an order that is the same on all ranks."""
    item = bench.dtype.itemsize
    shapes = [
        shape_on_rank(model, world_size=bench.mesh.world_size, sizes=bench.sizes, element_bytes=item)
        for model in models
    ]
    expert_bytes = {shape.label: shape.params_per_expert * item for shape in shapes}
    parts: list[Mapping[str, Any]] = [
        exchange_figures(bench),
        migration_figures(bench, expert_bytes),
        memory_figures(bench),
        row_curves(bench, [shape.hidden_size for shape in shapes]),
        _experts(bench, shapes),
    ]
    spread = {name: value for part in parts for name, value in part.get("spread", {}).items()}
    return {name: value for part in parts for name, value in part.items()} | {"spread": spread}


def _experts(bench: Bench, shapes: Sequence[ExpertShape]) -> dict[str, object]:
    even, uneven = {}, {}
    for shape in shapes:
        bench.tell(f"experts of {shape.label}, {shape.local_experts} on each rank")
        even[shape.label], uneven[shape.label] = expert_curves(bench, shape)
        if bench.mesh.device.type == "cuda":
            # The next model's experts have other sizes; let go of these.
            torch.cuda.empty_cache()
    return {
        # A curve without a point is no curve.
        "expert_ffn_ms": {label: points for label, points in even.items() if points},
        "expert_ffn_uneven_ms": {label: points for label, points in uneven.items() if points},
        "expert_shapes": {shape.label: shape.as_dict() for shape in shapes},
    }
