"""Replays held-out routing through whole MoE layers of the runtime, one rank a GPU, policies in turn.

Run by torchrun. Every layer and window is a case; within a case the policies take turns pass by pass, in
rotating order, so that clocks and temperature drift alike for all of them. Before every pass the ranks meet,
so that none starts late. A layer takes as long as its slowest rank. ``contiguous`` runs twice: what the
second differs by is noise.

Weights are random and shared by all policies: what an expert computes does not change its time. The other
rows of `COLUMNS` say what caused a time, as ``moe-placement calibrate --check`` wants it.

Shape letters: W windows, T tokens, L layers, K top-k, S slots, C rows of a rank, R repeats, D ranks.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gpu.folder import Array, Fitted, Prepared
from benchmarks.gpu.policies import CONTIGUOUS, policies_of
from benchmarks.gpu.ranks import Budget
from benchmarks.gpu.shapes import experts_of, rows_of
from benchmarks.gpu.timing import Marks, marks_for, summary, synchronize
from placement.cost.split import least_fullest_shares, number_replicas
from placement.problem import ReplicaSplit
from placement.runtime.parallel.compute import expert_math
from placement.runtime.parallel.control import Control
from placement.runtime.parallel.experts import Experts
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.phases import PHASES, NoClock
from placement.runtime.parallel.slots import LayerSlots

__all__ = ["AGAIN", "Options", "columns", "replay", "write_layers"]

AGAIN = f"{CONTIGUOUS} again"
"""The same placement once more: its difference is noise."""

OTHER_EXCHANGES_EVERY = 3

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to replay.

    Parameters
    ----------
    transport
        What to call the link; chooses the policies fitted for it.
    exchanges
        Of ``dedup``, ``pairs``; those behind the first run every third case, without spare slots.
    training
        Whether to run backward passes, too (their total alone is timed).
    repeats, warm_up
        Timed and untimed passes of each policy in each case.
    tile
        How many times each rank has its tokens of a window: a larger batch with the same imbalance.
    with_lp
        Whether policies with the split ``lp`` run, too.
    budget_s
        No case is begun after so many seconds.
    """

    transport: str
    exchanges: tuple[str, ...] = ("dedup", "pairs")
    training: bool = False
    repeats: int = 20
    warm_up: int = 2
    tile: int = 1
    with_lp: bool = True
    budget_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One layer in one held-out window, by index."""

    layer: int
    window: int


def replay(prepared: Prepared, mesh: Mesh, options: Options) -> tuple[list[Row], list[Row]]:
    """Measure an instance; every rank has to call this.

    Returns
    -------
    cases, layers
        A summary of each case, exchange and policy, and the rows of `columns`; the same on every rank.
    """
    bench = _Bench(prepared, mesh, options)
    budget = Budget(options.budget_s, mesh)
    cases: list[Row] = []
    layers: list[Row] = []
    for number, case in enumerate(_shuffled(prepared)):
        for exchange in options.exchanges:
            if exchange != options.exchanges[0] and number % OTHER_EXCHANGES_EVERY:
                continue
            if budget.is_over():
                return cases, layers
            for measured in bench.measure(case, exchange):
                cases.append(measured.case)
                layers.extend([measured.layer] if measured.layer else [])
    return cases, layers


def _shuffled(prepared: Prepared) -> list[_Case]:
    """Cases in an order in which any beginning is a fair sample."""
    cases = [
        _Case(layer=layer, window=window)
        for window in range(len(prepared.windows))
        for layer in range(len(prepared.instance.layers))
    ]
    order = np.random.default_rng(0).permutation(len(cases))
    return [cases[i] for i in order]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    case: Row
    layer: Row | None


class _Relay:
    """The clock of a layer, handed on to that of the pass: layers prepare their stages for one clock."""

    def __init__(self) -> None:
        self.marks: Marks | None = None

    def mark(self, phase: str) -> None:
        """Hand the mark on."""
        if self.marks is not None:
            self.marks.mark(phase)


class _Bench:
    """Everything that is allocated once for an instance."""

    def __init__(self, prepared: Prepared, mesh: Mesh, options: Options) -> None:
        self.prepared, self.mesh, self.options = prepared, mesh, options
        self.policies = self._policies()
        dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
        shape = prepared.instance.shape
        rows = {name: _rows(one, mesh.rank) for name, one in self.policies.items()}
        self.family, whole = experts_of(
            shape, max(rows.values()), device=mesh.device, dtype=dtype, seed=mesh.rank
        )
        self.layers = {count: rows_of(whole, 0, count) for count in set(rows.values())}
        generator = torch.Generator(mesh.device).manual_seed(mesh.rank)
        size = (prepared.instance.tokens_per_rank * options.tile, shape.hidden_size)
        self.hidden_TH = torch.randn(size, device=mesh.device, dtype=dtype, generator=generator)
        weights = (size[0], shape.top_k)
        self.weight_TK = torch.rand(weights, device=mesh.device, dtype=dtype, generator=generator)

    def _policies(self) -> dict[str, Fitted]:
        wanted = [policy.name for policy in policies_of(self.options.transport)]
        found = {name: self.prepared.policies[name] for name in wanted if name in self.prepared.policies}
        return {name: one for name, one in found.items() if self.options.with_lp or one.split != "lp"}

    def measure(self, case: _Case, exchange: str) -> Iterator[_Measured]:
        """Time all policies in one case."""
        index_TK = self._index(case)
        wanted = {
            name: one
            for name, one in self.policies.items()
            if exchange == self.options.exchanges[0] or "+" not in name
        }
        runs = {name: self._forward(one, case, exchange) for name, one in wanted.items()}
        runs[AGAIN] = self._forward(self.policies[CONTIGUOUS], case, exchange)
        passes = self._take_turns({name: self._pass(forward, index_TK) for name, forward in runs.items()})
        training = {}
        if self.options.training:
            backward = {name: self._training(forward, index_TK) for name, forward in runs.items()}
            training = self._take_turns(backward)
        for name, forward in runs.items():
            yield self._measured(case, exchange, name, forward, passes[name], training.get(name))

    def _index(self, case: _Case) -> torch.Tensor:
        tokens, rank = self.prepared.instance.tokens_per_rank, self.mesh.rank
        window_TK = self.prepared.arrays["experts_WTLK"][case.window, :, case.layer]
        mine_TK = window_TK[rank * tokens : (rank + 1) * tokens].astype(np.int64)
        return torch.from_numpy(np.tile(mine_TK, (self.options.tile, 1))).to(self.mesh.device)

    def _forward(self, fitted: Fitted, case: _Case, exchange: str) -> Experts:
        layer = self.layers[_rows(fitted, self.mesh.rank)]
        forward = Experts(
            experts=layer.experts,
            math=expert_math(self.family, layer),
            slots=LayerSlots.of_layer(fitted.placement, case.layer),
            mesh=self.mesh,
            control=Control(),
            exchange=exchange,
            rule=ReplicaSplit(fitted.split),
            tensors=layer.expert_tensors,
            scale=1 / self.mesh.world_size,
        )
        if fitted.split == "lp":
            forward.use(forward.slots, share_EX=self._shares(forward.slots, case))
        return forward

    def _shares(self, slots: LayerSlots, case: _Case) -> Array:
        """Shares for the loads of the window before, which is what an engine knows."""
        load_E = self.prepared.arrays["recent_WLE"][case.window, case.layer].astype(np.float64)
        replicas = number_replicas(slots.expert_S, slots.rank_of_slot_S, slots.num_experts)
        share_WEX = least_fullest_shares(load_E[None], replicas, num_devices=self.mesh.world_size)
        return np.asarray(share_WEX[0])

    def _pass(self, forward: Experts, index_TK: torch.Tensor) -> Callable[[], Any]:
        relay = _Relay()
        forward.time_with(relay)

        def run() -> Any:
            marks = relay.marks = marks_for(self.mesh.device)
            self._meet()
            with torch.no_grad():
                forward(self.hidden_TH, index_TK, self.weight_TK)
            return marks

        return run

    def _training(self, forward: Experts, index_TK: torch.Tensor) -> Callable[[], Any]:
        forward.time_with(NoClock())

        def run() -> Any:
            for parameter in forward.experts.parameters():
                parameter.grad = None
            hidden_TH = self.hidden_TH.detach().requires_grad_()
            marks = marks_for(self.mesh.device)
            self._meet()
            marks.mark("start")
            output_TH = forward(hidden_TH, index_TK, self.weight_TK)
            marks.mark("forward")
            torch.autograd.backward(output_TH, self.hidden_TH)
            marks.mark("backward")
            return marks

        return run

    def _meet(self) -> None:
        """Let the devices' time lines meet; the hosts need not wait."""
        dist.all_reduce(torch.zeros(1, device=self.mesh.device), group=self.mesh.group)

    def _take_turns(self, runs: dict[str, Callable[[], Any]]) -> dict[str, list[dict[str, float]]]:
        """Run each in turn, in rotating order; return the timed passes of each."""
        names = list(runs)
        marks: dict[str, list[Any]] = {name: [] for name in names}
        for number in range(self.options.warm_up + self.options.repeats):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                done = runs[name]()
                if number >= self.options.warm_up:
                    marks[name].append(done)
            synchronize(self.mesh.device)
        return {name: [one.spans_ms() for one in done] for name, done in marks.items()}

    def _measured(
        self,
        case: _Case,
        exchange: str,
        name: str,
        forward: Experts,
        passes: list[dict[str, float]],
        training: list[dict[str, float]] | None,
    ) -> _Measured:
        mine = {phase: [one.get(phase, 0.0) for one in passes] for phase in (*PHASES, "total")}
        each = self.mesh.gather((mine, [one["total"] for one in training or []]))
        phase_ms = [{key: float(np.median(ms)) for key, ms in phases.items()} for phases, _ in each]
        slowest_R = np.max([phases["total"] for phases, _ in each], axis=0)
        instance = self.prepared.instance
        row: Row = {
            "instance": instance.name + (f" x{self.options.tile}" if self.options.tile > 1 else ""),
            "transport": self.options.transport,
            "exchange": exchange,
            "layer": instance.layers[case.layer],
            "window": self.prepared.windows[case.window],
            "policy": name,
            "layer_ms": summary(slowest_R),
            "phase_ms": phase_ms,
        }
        if training:
            row["training_ms"] = summary(np.max([totals for _, totals in each], axis=0))
        return _Measured(case=row, layer=self._layer_row(case, exchange, name, forward, phase_ms))

    def _layer_row(
        self, case: _Case, exchange: str, name: str, forward: Experts, phase_ms: list[dict[str, float]]
    ) -> Row | None:
        """Return the row of `columns`; None for the pass that only tells the noise."""
        counts = self._counts(case, forward)
        if name == AGAIN:
            return None
        instance = self.prepared.instance
        shape = instance.shape
        ranks = range(self.mesh.world_size)
        row: Row = {
            "transport": self.options.transport,
            "shape": shape.name,
            "hidden": shape.hidden_size,
            "expert_hidden": shape.expert_hidden_size,
            "experts": shape.num_experts,
            "top_k": shape.top_k,
            "tokens_per_rank": instance.tokens_per_rank * self.options.tile,
            "layer": instance.layers[case.layer],
            "window": f"w{self.prepared.windows[case.window]}",
            "placement": name,
            "dedup": int(exchange == "dedup"),
        }
        for what in ("pairs", "tokens"):
            row |= {f"{what}_{i}{j}": counts[i][what][j] for i in ranks for j in ranks}
        touched_S = np.sum([one["slots"] for one in counts], axis=0) > 0
        rank_S = forward.slots.rank_of_slot_S
        row |= {f"active_experts_{j}": int(touched_S[rank_S == j].sum()) for j in ranks}
        for rank in ranks:
            row |= {f"{phase}_ms_rank{rank}": round(ms, 4) for phase, ms in phase_ms[rank].items()}
        return row

    def _counts(self, case: _Case, forward: Experts) -> list[dict[str, list[int]]]:
        """Pairs and distinct tokens that each rank sends to each, and pairs for each slot, by sender."""
        slot_TK = forward._split(self._index(case)).cpu().numpy()
        rank_TK = forward.slots.rank_of_slot_S[slot_TK]
        size = self.mesh.world_size
        mine = {
            "pairs": np.bincount(rank_TK.ravel(), minlength=size).tolist(),
            "tokens": [int((rank_TK == rank).any(axis=1).sum()) for rank in range(size)],
            "slots": np.bincount(slot_TK.ravel(), minlength=forward.slots.expert_S.size).tolist(),
        }
        return self.mesh.gather(mine)


def _rows(fitted: Fitted, rank: int) -> int:
    return int(np.count_nonzero(fitted.placement.device_of_slot_S == rank))


def columns(num_ranks: int) -> list[str]:
    """Return the columns of the layers' file."""
    ranks = range(num_ranks)
    told = "transport shape hidden expert_hidden experts top_k tokens_per_rank layer window placement dedup"
    return [
        *told.split(),
        *(f"{what}_{i}{j}" for what in ("pairs", "tokens") for i in ranks for j in ranks),
        *(f"active_experts_{j}" for j in ranks),
        *(f"{phase}_ms_rank{rank}" for rank in ranks for phase in (*PHASES, "total")),
    ]


def write_layers(file: Path, rows: Sequence[Row]) -> None:
    """Add rows to the layers' file of a transport."""
    if not rows:
        return
    num_ranks = sum(key.startswith("active_experts_") for key in rows[0])
    begins = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns(num_ranks))
        if begins:
            writer.writeheader()
        writer.writerows(rows)
