"""The best placement of one layer that shares nothing with its neighbours, proved.

Step time and balance: branch and bound over partitions, device by device. What the devices still empty cost
at the least is known for every set of experts left, phase by phase and window by window, from a recursion
over subsets; a partial placement is cut off when the mean over windows of the higher of the two is no better
than the incumbent. Traffic is a sum over devices and solved by a recursion over subsets alone, in which a
device over the load limit may not be.

Shape letters: E experts, P positions, N rows of all tables, Y phases, W windows, M masks, R masks of a size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement.problem import Risk
from placement.solvers.exact.layout import Layout
from placement.solvers.exact.size import left_before
from placement.solvers.exact.subsets import Subsets
from placement.solvers.exact.tables import LayerTables
from placement.stopping import Never

if TYPE_CHECKING:
    from placement.solvers.exact.kernels import PruneState, Shape

__all__ = ["Partition", "best_partition", "least_level", "least_partition", "make_shape"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NODE_CELLS = 5_000_000
"""Phases times windows times nodes between two questions whether to stop: some milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partition:
    """What a search of one layer came to.

    Parameters
    ----------
    mask_P
        Experts at each position; None when nothing better than the given value was found.
    value
        Its value, or the given one.
    proved
        Whether the search was complete: nothing is better than `value`.
    """

    mask_P: IntArray | None
    value: float
    proved: bool


def best_partition(
    layout: Layout,
    subsets: Subsets,
    tables: LayerTables,
    *,
    risk: Risk,
    below: float,
    stop: Callable[[], bool],
) -> Partition:
    """Find the partition of least cost below a value, or prove that there is none.

    Parameters
    ----------
    below
        Cost of the incumbent, infinite for none.
    stop
        Asked every few milliseconds.
    """
    from placement.solvers.exact.kernels import branch_and_bound

    shape = make_shape(layout, subsets)
    table_NYW = _with_rest(shape, layout, tables, stop)
    if table_NYW is None:
        return Partition(mask_P=None, value=below, proved=False)
    state = _start(shape, table_NYW, below)
    budget = max(1, NODE_CELLS // table_NYW[0].size)
    proved = False
    while not proved and not stop():
        proved = bool(branch_and_bound(table_NYW, shape, list(Risk).index(risk), state, budget))
    found = state.best_1[0] < below
    return Partition(mask_P=state.best_mask_P if found else None, value=float(state.best_1[0]), proved=proved)


def _start(shape: Shape, table_NYW: FloatArray, below: float) -> PruneState:
    from placement.solvers.exact.kernels import PruneState, open_position

    num_positions = shape.size_P.size
    zeros_P = np.zeros(num_positions, dtype=np.int64)
    state = PruneState(
        depth_1=np.zeros(1, dtype=np.int64),
        mask_P=zeros_P.copy(),
        used_P=zeros_P.copy(),
        next_P=zeros_P.copy(),
        end_P=zeros_P.copy(),
        upper_PYW=np.zeros((num_positions + 1, *table_NYW.shape[1:])),
        best_1=np.array([below]),
        best_mask_P=zeros_P.copy(),
    )
    open_position(shape, 0, state)
    return state


def _with_rest(
    shape: Shape, layout: Layout, tables: LayerTables, stop: Callable[[], bool]
) -> FloatArray | None:
    """Stack the tables of all kinds, and below them what the devices from each position on cost at the least.

    None when stopped.
    """
    from placement.solvers.exact.kernels import best_rest

    parts = np.concatenate([tables.kind_RYW[kind] for kind in sorted(tables.kind_RYW)])
    num_rest = _rest_sizes(shape)
    table_NYW = np.empty((len(parts) + sum(num_rest.values()), *parts.shape[1:]))
    table_NYW[: len(parts)] = parts
    for position, rows in reversed(num_rest.items()):
        ways = max(1, shape.candidate_C.size // 64)
        step = max(1, NODE_CELLS // (ways * parts[0].size))
        for first in range(0, rows, step):
            if stop():
                return None
            best_rest(table_NYW, shape, position, first, min(first + step, rows))
    return table_NYW


def _rest_sizes(shape: Shape) -> dict[int, int]:
    """Sets of experts that may be left at each position whose rest has a table of its own."""
    left_P = np.cumsum(shape.size_P[::-1])[::-1]
    return {p: int(np.diff(shape.start_S)[left_P[p]]) for p in range(1, shape.size_P.size - 1)}


def make_shape(layout: Layout, subsets: Subsets) -> Shape:
    """Lay the layout and the subsets out for the compiled loops."""
    from placement.solvers.exact.kernels import Shape

    every_size = range(subsets.num_experts + 1)
    count_S = np.array([subsets.of_size(size).size for size in every_size], dtype=np.int64)
    row_of_kind, rows = _rows_of_kinds(layout, count_S)
    rest_row_P = np.zeros(len(layout.devices), dtype=np.int64)
    for position, left in enumerate(left_before(layout)[1:-1], start=1):
        rest_row_P[position] = rows
        rows += int(count_S[left])
    row_P = np.array([row_of_kind[part.kind] for part in layout.devices], dtype=np.int64)
    # What the last device costs at the least is what it costs.
    rest_row_P[-1] = row_P[-1]
    last_G = np.array([group.last for group in layout.groups], dtype=np.int64)
    return Shape(
        rank_M=subsets.rank_M,
        candidate_C=np.concatenate([subsets.of_size(size) for size in every_size]),
        start_S=np.append(0, np.cumsum(count_S)),
        lowest_SE=np.stack([subsets.first_with_lowest(size) for size in every_size]),
        size_P=np.array([part.slots for part in layout.devices], dtype=np.int64),
        sibling_P=np.array([part.sibling for part in layout.devices], dtype=np.int64),
        opens_P=layout.opens_P,
        row_P=row_P,
        rest_row_P=rest_row_P,
        close_P=np.searchsorted(last_G, np.arange(len(layout.devices) + 1)),
        group_first_G=np.array([group.first for group in layout.groups], dtype=np.int64),
        group_sibling_G=np.array([group.sibling for group in layout.groups], dtype=np.int64),
        group_row_G=np.array([row_of_kind[group.kind] for group in layout.groups], dtype=np.int64),
    )


def _rows_of_kinds(layout: Layout, count_S: IntArray) -> tuple[dict[int, int], int]:
    """First row of each kind of part in the stacked tables, and their number."""
    slots = {part.kind: part.slots for part in (*layout.devices, *layout.groups)}
    row_of_kind, rows = {}, 0
    for kind in sorted(slots):
        row_of_kind[kind] = rows
        rows += int(count_S[slots[kind]])
    return row_of_kind, rows


def least_partition(layout: Layout, subsets: Subsets, value_N: FloatArray) -> Partition:
    """Find the partition with the least sum of values over devices.

    Parameters
    ----------
    value_N
        Value of each mask by kind of device and rank, infinite where a device may not hold it; kinds in
        order.

    Returns
    -------
    Partition
        Infinite, without masks, where no partition is allowed.
    """
    from placement.solvers.exact.kernels import least_sum

    shape = make_shape(layout, subsets)
    after_R = np.zeros(1)
    chosen: list[IntArray] = []
    for position in reversed(range(len(layout.devices))):
        left = int(shape.size_P[position:].sum())
        out_R = np.empty(subsets.of_size(left).size)
        chosen_R = np.empty(out_R.size, dtype=np.int64)
        least_sum(value_N, after_R, shape, position, out_R, chosen_R)
        after_R, chosen = out_R, [chosen_R, *chosen]
    if not np.isfinite(after_R[0]):
        return Partition(mask_P=None, value=np.inf, proved=True)
    rest, mask_P = (1 << subsets.num_experts) - 1, []
    for chosen_R in chosen:
        mask_P.append(int(chosen_R[subsets.rank_M[rest]]))
        rest ^= mask_P[-1]
    return Partition(mask_P=np.array(mask_P, dtype=np.int64), value=float(after_R[0]), proved=True)


def least_level(layout: Layout, subsets: Subsets, load_E: FloatArray) -> float:
    """Return the least possible load of the fullest device.

    Parameters
    ----------
    load_E
        Load of each expert, by bit.
    """
    slots = {part.kind: part.slots for part in layout.devices}
    held = {kind: (subsets.members(size) @ load_E)[:, None, None] for kind, size in slots.items()}
    tables = LayerTables(order_E=np.arange(load_E.size), kind_RYW=held)
    return best_partition(layout, subsets, tables, risk=Risk.MEAN, below=np.inf, stop=Never()).value
