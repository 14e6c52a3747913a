"""Many ranks on one GPU: each rank's share of the experts' work is run in turn, with real kernels.

What is measured is the experts' time alone, of every rank, on the tokens that held-out windows give it; the
tail is the slowest rank's. The exchange is not run: its time is predicted afterwards from a measured
all-to-all curve and the tokens that the busiest rank receives. Said to be emulated wherever it is shown.

The GPU's stream is held back before a policy's ranks, so that the host runs ahead and what is timed is the
kernels, not their launches.

Shape letters: W windows, L layers, S slots, C rows of a rank, P pairs, H hidden, R repeats, D ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.folder import Prepared
from benchmarks.gpu.shapes import experts_of, rows_of
from benchmarks.gpu.timing import hold_back, marks_for, summary, synchronize
from placement.runtime.families.protocol import MoELayer
from placement.runtime.parallel.compute import ExpertMath, expert_math

__all__ = ["emulate"]

Row = dict[str, Any]

SHARES = (0.6, 0.25, 0.15)
"""Parts of the budget, in order of the batches: the largest takes longest."""

LAUNCH_MS = 0.5
"""How long the host takes to launch one rank's kernels, generously."""


def emulate(
    prepared: Prepared, device: torch.device, *, budget_s: float = 60.0, repeats: int = 3, warm_up: int = 1
) -> list[Row]:
    """Time every rank's experts for every policy, batch, layer and held-out window.

    Parameters
    ----------
    prepared
        An emulated instance.
    device
        Where to run.
    budget_s
        No case is begun after so many seconds; each batch has a part of them (`SHARES`).
    repeats, warm_up
        Timed and untimed rounds of each case.

    Returns
    -------
    list
        One row for each case and policy: ``rank_ms`` (medians over the repeats, by rank) and ``tail_ms``
        (summary of the slowest rank's, repeat by repeat).
    """
    bench = _Bench(prepared, device)
    rows: list[Row] = []
    for batch, share in zip(prepared.instance.batches, SHARES, strict=False):
        ends_s = time.monotonic() + share * budget_s
        for layer, window in _cases(prepared):
            if time.monotonic() > ends_s:
                break
            rows.extend(bench.measure(batch, layer, window, repeats=repeats, warm_up=warm_up))
    return rows


def _cases(prepared: Prepared) -> Iterator[tuple[int, int]]:
    """Yield layers and windows, by index, in an order in which any beginning is a fair sample."""
    shape = (len(prepared.instance.layers), len(prepared.windows))
    for case in np.random.default_rng(0).permutation(shape[0] * shape[1]):
        layer, window = np.unravel_index(int(case), shape)
        yield int(layer), int(window)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Share:
    """One rank's experts and what they compute."""

    layer: MoELayer
    math: ExpertMath


class _Bench:
    """All ranks' experts and enough tokens for the fullest of them."""

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        self.prepared, self.device = prepared, device
        self.names = list(prepared.policies)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.num_ranks = prepared.instance.num_ranks
        most = max(one.placement.num_slots for one in prepared.policies.values()) // self.num_ranks
        shape = prepared.instance.shape
        self.family, whole = experts_of(shape, most * self.num_ranks, device=device, dtype=dtype)
        self._layers = [rows_of(whole, rank * most, most) for rank in range(self.num_ranks)]
        size = (self._most_pairs(), shape.hidden_size)
        generator = torch.Generator(device).manual_seed(0)
        self.hidden_PH = torch.randn(size, device=device, dtype=dtype, generator=generator)

    def _most_pairs(self) -> int:
        arrays = self.prepared.arrays
        return max(
            int(rows.reshape(*rows.shape[:2], self.num_ranks, -1).sum(axis=3).max())
            for key, rows in arrays.items()
            if key.startswith("rows/")
        )

    def measure(self, batch: str, layer: int, window: int, *, repeats: int, warm_up: int) -> Iterator[Row]:
        """Time all policies in one case, in rotating order."""
        shares = {name: self._shares(name, batch, layer, window) for name in self.names}
        spans: dict[str, list[list[float]]] = {name: [] for name in self.names}
        for number in range(warm_up + repeats):
            turn = number % len(self.names)
            marks = [(name, self._run(*shares[name])) for name in self.names[turn:] + self.names[:turn]]
            synchronize(self.device)
            if number >= warm_up:
                for name, one in marks:
                    spans[name].append([one.spans_ms()[f"rank{rank}"] for rank in range(self.num_ranks)])
        for name in self.names:
            span_RD = np.array(spans[name])
            yield {
                "instance": self.prepared.instance.name,
                "batch": batch,
                "layer": layer,
                "window": window,
                "policy": name,
                "rank_ms": np.median(span_RD, axis=0).round(5).tolist(),
                "tail_ms": summary(span_RD.max(axis=1)),
            }

    def _shares(
        self, name: str, batch: str, layer: int, window: int
    ) -> tuple[list[_Share], list[int], torch.Tensor]:
        """Experts of each rank, pairs of each rank, and pairs of each of its rows on the device."""
        rows_S = self.prepared.arrays[f"rows/{name}/{batch}"][window, layer]
        rows_DC = rows_S.reshape(self.num_ranks, -1).astype(np.int64)
        layers = [rows_of(one, 0, rows_DC.shape[1]) for one in self._layers]
        shares = [_Share(layer=layer, math=expert_math(self.family, layer)) for layer in layers]
        return shares, rows_DC.sum(axis=1).tolist(), torch.from_numpy(rows_DC).to(self.device)

    @torch.no_grad()
    def _run(self, shares: list[_Share], pairs: list[int], rows_DC: torch.Tensor) -> Any:
        marks = marks_for(self.device)
        # The device must not overtake the host, else gaps between launches are timed; and not too much at
        # once, since the queue of launches has an end.
        hold_back(self.device, milliseconds=LAUNCH_MS * self.num_ranks)
        marks.mark("start")
        for rank, share in enumerate(shares):
            share.math(share.layer.experts, self.hidden_PH[: pairs[rank]], rows_DC[rank])
            marks.mark(f"rank{rank}")
        return marks
