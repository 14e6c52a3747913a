"""Whole models with few layers, attention included, run by two ranks with held-out routing forced on them.

Routers run, and their choice of experts is replaced by the trace's, so that everything but the routing is
what the model does. Policies take turns pass by pass, as in `replay`.

Shape letters: T tokens, L layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gpu.folder import Prepared
from benchmarks.gpu.policies import CONTIGUOUS, policies_of
from benchmarks.gpu.ranks import Budget
from benchmarks.gpu.replay import AGAIN, Options
from benchmarks.gpu.shapes import whole_model
from benchmarks.gpu.timing import marks_for, summary, synchronize
from placement.runtime.families.protocol import MoELayer
from placement.runtime.families.registry import family_of, moe_layers_of
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import Execution, ParallelModel, expert_parallel

__all__ = ["ForcedRouting", "whole"]

Row = dict[str, Any]

SEQUENCES = 4


class ForcedRouting:
    """Replaces what routers choose by given expert ids; `index_LTK` may change between passes."""

    def __init__(self, model: Any, layers: tuple[MoELayer, ...]) -> None:
        self.index_LTK: torch.Tensor | None = None
        family = family_of(model)

        def hook(number: int, layer: MoELayer) -> Callable[..., Any]:
            def replaced(_module: Any, _inputs: Any, output: Any) -> Any:
                if self.index_LTK is None:
                    return output
                return family.replace_top_k(output, self.index_LTK[number], layer, layer.num_experts)

            return replaced

        for number, layer in enumerate(layers):
            layer.router.register_forward_hook(hook(number, layer))


def whole(prepared: Prepared, mesh: Mesh, options: Options) -> list[Row]:
    """Time forward passes and training steps of a whole model; every rank has to call this.

    Parameters
    ----------
    prepared
        A replayed instance; the model has as many layers as it has.
    options
        Training adds the backward pass and an AdamW step, without exchange of the dense part's gradients.
    """
    names = [p.name for p in policies_of(options.transport) if not p.spare and p.name in prepared.policies]
    placements = {name: prepared.policies[name].placement for name in names}
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    model = whole_model(
        prepared.instance.shape, len(prepared.instance.layers), device=mesh.device, dtype=dtype
    )
    routing = ForcedRouting(model, moe_layers_of(model))
    execution = Execution(exchange=options.exchanges[0])
    parallel = expert_parallel(model, placements[CONTIGUOUS], mesh, execution=execution)
    runner = _Runner(prepared, parallel, routing, {**placements, AGAIN: placements[CONTIGUOUS]}, options)
    budget = Budget(options.budget_s, mesh)
    rows: list[Row] = []
    for window in range(len(prepared.windows)):
        for training in (False, True) if options.training else (False,):
            if budget.is_over():
                return rows
            rows.extend(runner.measure(window, training=training))
    return rows


class _Runner:
    """One model, run under several placements in turn; weights stay where they are."""

    def __init__(
        self,
        prepared: Prepared,
        parallel: ParallelModel,
        routing: ForcedRouting,
        placements: Mapping[str, Any],
        options: Options,
    ) -> None:
        self.prepared, self.parallel, self.routing = prepared, parallel, routing
        self.placements, self.options = placements, options
        self.mesh = parallel.mesh
        tokens = prepared.instance.tokens_per_rank
        generator = torch.Generator().manual_seed(self.mesh.rank)
        ids = torch.randint(
            0, 32, (min(SEQUENCES, tokens), tokens // min(SEQUENCES, tokens)), generator=generator
        )
        self.ids = ids.to(self.mesh.device)
        self.optimizer: torch.optim.Optimizer | None = None

    def measure(self, window: int, *, training: bool) -> list[Row]:
        """Time all placements on one window."""
        self.routing.index_LTK = self._index(window)
        names = list(self.placements)
        marks: dict[str, list[Any]] = {name: [] for name in names}
        for number in range(self.options.warm_up + self.options.repeats):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                self.parallel.use(self.placements[name])
                dist.all_reduce(torch.zeros(1, device=self.mesh.device), group=self.mesh.group)
                done = self._step() if training else self._forward()
                if number >= self.options.warm_up:
                    marks[name].append(done)
            synchronize(self.mesh.device)
        return [self._row(window, name, training, marks[name]) for name in names]

    def _index(self, window: int) -> torch.Tensor:
        tokens, rank = self.prepared.instance.tokens_per_rank, self.mesh.rank
        window_TLK = self.prepared.arrays["experts_WTLK"][window, rank * tokens : (rank + 1) * tokens]
        return torch.from_numpy(window_TLK.swapaxes(0, 1).astype(np.int64)).to(self.mesh.device)

    @torch.no_grad()
    def _forward(self) -> Any:
        marks = marks_for(self.mesh.device)
        marks.mark("start")
        self.parallel.model(self.ids, use_cache=False)
        marks.mark("forward")
        return marks

    def _step(self) -> Any:
        if self.optimizer is None:
            fused = self.mesh.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(self.parallel.model.parameters(), lr=1e-6, fused=fused)
        self.optimizer.zero_grad(set_to_none=True)
        marks = marks_for(self.mesh.device)
        marks.mark("start")
        self.parallel.model(self.ids, labels=self.ids, use_cache=False).loss.backward()
        marks.mark("backward")
        self.optimizer.step()
        marks.mark("optimizer")
        return marks

    def _row(self, window: int, name: str, training: bool, marks: list[Any]) -> Row:
        each = self.mesh.gather([one.spans_ms()["total"] for one in marks])
        return {
            "instance": self.prepared.instance.name,
            "transport": self.options.transport,
            "window": self.prepared.windows[window],
            "policy": name,
            "training": training,
            "step_ms": summary(np.max(each, axis=0)),
        }
