"""Live migration: its rate against the link's, and what it costs the steps that it overlaps with.

A whole model of few layers changes from contiguous to our placement and back. The link's bandwidth is that of
plain sends and receives of large buffers, both ways at once, on the same ranks. Steps are forward passes with
held-out routing; the impact is the median step while experts travel against the median step before and after.
Run by torchrun.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gpu.folder import Prepared
from benchmarks.gpu.policies import CONTIGUOUS
from benchmarks.gpu.shapes import whole_model
from benchmarks.gpu.timing import marks_for, synchronize
from benchmarks.gpu.whole import ForcedRouting
from placement.plan import Placement
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.migration.link import MigrationLink
from placement.runtime.migration.migrate import migrate
from placement.runtime.migration.migration import Migration
from placement.runtime.migration.report import MigrationStatus
from placement.runtime.migration.setup import Options, dry_run
from placement.runtime.migration.stages import cut
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import ParallelModel, expert_parallel

__all__ = ["link_gb_per_s", "migration"]

Row = dict[str, Any]

OURS = "balance"
MOST_STEPS = 400
SEQUENCES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """How to migrate."""

    name: str
    options: Options


VARIANTS = (
    _Variant(name="one expert at a time", options=Options()),
    _Variant(name="four experts at a time", options=Options(staging=4, pack_layers=True)),
    _Variant(name="sixteen experts at a time", options=Options(staging=16, pack_layers=True)),
    _Variant(name="everything at once", options=Options(commit="all")),
)


def migration(prepared: Prepared, mesh: Mesh, *, repeats: int = 6, steps: int = 40) -> list[Row]:
    """Measure all variants on one instance; every rank has to call this.

    Parameters
    ----------
    prepared
        A replayed instance; the model has as many layers as it has.
    repeats
        Migrations that are waited for, and migrations that run along with steps.
    steps
        Steps before, and after, from which the undisturbed step is taken.
    """
    bench = _Bench(prepared, mesh)
    with MigrationLink(mesh) as link:
        return [bench.measure(variant, link, repeats=repeats, steps=steps) for variant in VARIANTS]


def link_gb_per_s(mesh: Mesh, *, num_bytes: int = 256 * 10**6, repeats: int = 8) -> float:
    """Return the rate at which neighbours exchange messages both ways, each direction, GB per second."""
    sent, received = (torch.ones(num_bytes, dtype=torch.uint8, device=mesh.device) for _ in range(2))
    peer = mesh.rank ^ 1

    def exchange() -> None:
        both = [
            dist.P2POp(dist.isend, sent, peer, group=mesh.group),
            dist.P2POp(dist.irecv, received, peer, group=mesh.group),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    seconds = [_timed_s(exchange, mesh) for _ in range(repeats + 2)][2:]
    return float(np.median([num_bytes / 1e9 / max(mesh.gather(one)) for one in seconds]))


def _timed_s(call: Callable[[], object], mesh: Mesh) -> float:
    synchronize(mesh.device)
    dist.barrier(group=mesh.group)
    marks = marks_for(mesh.device)
    marks.mark("start")
    call()
    marks.mark("end")
    synchronize(mesh.device)
    return 1e-3 * marks.spans_ms()["total"]


class _Bench:
    """One model that goes back and forth between two placements."""

    def __init__(self, prepared: Prepared, mesh: Mesh) -> None:
        self.prepared, self.mesh = prepared, mesh
        self.placements = [prepared.policies[name].placement for name in (CONTIGUOUS, OURS)]
        dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
        shape, num_layers = prepared.instance.shape, len(prepared.instance.layers)
        model = whole_model(shape, num_layers, device=mesh.device, dtype=dtype).eval().requires_grad_(False)
        routing = ForcedRouting(model, moe_layers_of(model))
        tokens = prepared.instance.tokens_per_rank
        window_TLK = prepared.arrays["experts_WTLK"][0, mesh.rank * tokens : (mesh.rank + 1) * tokens]
        index_LTK = torch.from_numpy(window_TLK.swapaxes(0, 1).astype(np.int64))
        routing.index_LTK = index_LTK.to(mesh.device)
        rows = min(SEQUENCES, tokens)
        self.ids = torch.arange(tokens, device=mesh.device).remainder(32).view(rows, tokens // rows)
        self.parallel: ParallelModel = expert_parallel(model, self.placements[0], mesh)
        self.planned_bytes = 0
        self.link_gb_s = link_gb_per_s(mesh, num_bytes=10**6 * (256 if mesh.device.type == "cuda" else 1))

    def measure(self, variant: _Variant, link: MigrationLink, *, repeats: int, steps: int) -> Row:
        """Time one variant, waited for and overlapped."""
        before = self._output()
        stage_bytes = self._stage_bytes(variant)
        alone = link_gb_per_s(self.mesh, num_bytes=stage_bytes)
        waited = [self._begin(variant, link).run() for _ in range(repeats)]
        calm_ms = [self._step_ms() for _ in range(steps)]
        busy_ms: list[float] = []
        overlapped = [self._overlap(variant, link, busy_ms) for _ in range(repeats)]
        calm_ms += [self._step_ms() for _ in range(steps)]
        calm, busy = (float(np.median(np.max(self.mesh.gather(ms), axis=0))) for ms in (calm_ms, busy_ms))
        rate = self._rate([report.gb_per_s for report in waited])
        total_gb = sum(report.received_bytes for report in waited) / len(waited) / 1e9
        return {
            "instance": self.prepared.instance.name,
            "variant": variant.name,
            "experts moved": waited[0].moves,
            "GB into this rank": total_gb,
            "GB/s": rate,
            "link GB/s": self.link_gb_s,
            "share of link": rate / self.link_gb_s,
            "MB a message": stage_bytes / 1e6,
            "GB/s of such messages alone": alone,
            "share of such messages": rate / alone,
            "messages into this rank": waited[0].checks,
            "rounds": waited[0].rounds,
            "extra MB": max(report.extra_bytes for report in waited) / 1e6,
            "planned extra MB": self.planned_bytes / 1e6,
            "GB/s with agreements and switches": self._rate(
                [report.received_bytes / report.wall_s / 1e9 for report in waited]
            ),
            "s, waited for": float(np.median([report.wall_s for report in waited])),
            "s, overlapped": float(np.median([report.wall_s for report in overlapped])),
            "GB/s overlapped": self._rate([report.gb_per_s for report in overlapped]),
            "steps overlapped": len(busy_ms) / repeats,
            "step ms": calm,
            "step ms while overlapped": busy,
            "impact": busy / calm - 1,
            "output changed by": max(self.mesh.gather(_relative(self._output(), before))),
        }

    def _stage_bytes(self, variant: _Variant) -> int:
        """Bytes of the largest message on the way to the other placement; notes the memory planned."""
        plan = dry_run(self.parallel, self._other(), options=variant.options)
        self.planned_bytes = int(plan.peak_bytes_D[self.mesh.rank])
        messages = [
            message.num_bytes
            for one in plan.schedule.rounds
            for stage in cut(
                one.moves, {layer: list(plan.tensor_bytes_L[layer].values()) for layer in one.expert_LS}
            )
            for message in stage
        ]
        return max(messages, default=1)

    def _rate(self, mine: list[float]) -> float:
        """Median over migrations of the slowest rank's rate."""
        return float(np.median(np.min(self.mesh.gather(mine), axis=0)))

    def _begin(self, variant: _Variant, link: MigrationLink) -> Migration:
        wanted = self._other()
        synchronize(self.mesh.device)
        return migrate(self.parallel, wanted, options=variant.options, link=link)

    def _other(self) -> Placement:
        """Return the placement of the two that does not run."""
        running = self.parallel.placement.count_LED
        same = bool((running == self.placements[0].count_LED).all())
        return self.placements[1 if same else 0]

    def _overlap(self, variant: _Variant, link: MigrationLink, busy_ms: list[float]) -> Any:
        """Run steps until a migration is done; note each step's time, switches included."""
        under_way = self._begin(variant, link)
        for _ in range(MOST_STEPS):
            busy_ms.append(self._step_ms(under_way))
            if under_way.status is not MigrationStatus.RUNNING:
                return under_way.report
        return under_way.run()

    def _step_ms(self, under_way: Migration | None = None) -> float:
        """Time one step on the host, from the ranks' meeting on."""
        self._finish_step()
        began_s = time.perf_counter()
        with torch.no_grad():
            self.parallel.model(self.ids, use_cache=False)
        if under_way is not None:
            under_way.advance()
        self._finish_step()
        return 1e3 * (time.perf_counter() - began_s)

    def _finish_step(self) -> None:
        """Wait for the step's own work; what travels on the side goes on."""
        if self.mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _output(self) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = self.parallel.model(self.ids, use_cache=False)[0]
        return output.float()


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm
    return float(norm(value - reference) / norm(reference).clamp(min=1e-30))
