"""How long one layer takes on a measured machine, phase by phase, given who sends how much to whom.

The objective leaves out what no placement changes: the handling of rows at their home and at the experts, and
the host's work. A prediction to be held against a clock must have them. The exchanges join the ranks, so a
layer takes the slowest rank's time in each phase between them:

    max prepare + dispatch + max experts + combine + max unpermute

Shape letters: R ranks, C experts of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from placement.calibration import MeasuredCalibration, PiecewiseLinear
from placement.cost.layer_program import DEDUP, PAIRS, LayerProgram
from placement.errors import InputError
from placement.model_shape import ModelShape

__all__ = ["PHASES", "LayerCounts", "LayerTime", "predict_layer"]

FloatArray = npt.NDArray[np.float64]

PHASES = ("prepare", "dispatch", "experts", "combine", "unpermute")

LEAST_OPERATION_S, MOST_OPERATION_S = 5e-6, 30e-6
"""What one operation issued to an idle GPU may cost; an eager one costs 10 to 30 us on usual hosts."""

OPERATIONS_OF_EXCHANGE = 2
"""An exchange of next to nothing is the host's work: to issue it, and to see its end."""

LINE_TOLERANCE = 0.2
"""A measured all-to-all curve this near a straight line is one: latency + bytes / bandwidth."""

LARGE_TILE, SMALL_TILE = 256, 128
"""Tokens to which grouped matrix products round each expert's up: two blocks of 128 rows, or of 64 where the
mean is 128 tokens at most (PyTorch's grouped product on Hopper)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCounts:
    """Who sends how much to whom in one layer.

    Parameters
    ----------
    pairs_RR
        Token-expert pairs, from rank (first axis) to rank, those that stay at home included.
    tokens_RR
        Distinct tokens, likewise; None where rows are not de-duplicated.
    tokens_R
        Tokens at home on each rank.
    active_R
        Experts that have tokens, on each rank.
    local_R
        Experts on each rank.
    load_RC
        Tokens of each expert of each rank, where known.

    Raises
    ------
    InputError
        If shapes do not fit or numbers are negative or not finite.
    """

    pairs_RR: FloatArray
    tokens_R: FloatArray
    active_R: FloatArray
    local_R: FloatArray
    tokens_RR: FloatArray | None = None
    load_RC: Sequence[npt.ArrayLike] | None = None

    def __post_init__(self) -> None:
        ranks = np.asarray(self.pairs_RR).shape[0] if np.ndim(self.pairs_RR) else 0
        for name, shape in (
            ("pairs_RR", (ranks, ranks)),
            ("tokens_RR", (ranks, ranks)),
            ("tokens_R", (ranks,)),
            ("active_R", (ranks,)),
            ("local_R", (ranks,)),
        ):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _counts(getattr(self, name), name, shape))
        if self.load_RC is not None and len(self.load_RC) != ranks:
            raise InputError(f"load_RC tells of {len(self.load_RC)} ranks, pairs_RR of {ranks}")

    @property
    def num_ranks(self) -> int:
        """Ranks."""
        return int(self.pairs_RR.shape[0])

    def rows_RR(self, *, dedup: bool) -> FloatArray:
        """Return the rows that travel, ``[from, to]``.

        Raises
        ------
        InputError
            If rows are de-duplicated and distinct tokens are not known.
        """
        if not dedup:
            return self.pairs_RR
        if self.tokens_RR is None:
            raise InputError("de-duplicated rows need tokens_RR, the distinct tokens from rank to rank")
        return self.tokens_RR


def _counts(values: object, name: str, shape: tuple[int, ...]) -> FloatArray:
    array = np.array(values, dtype=np.float64)
    if array.shape != shape or not array.size:
        raise InputError(f"{name} has shape {array.shape}, not {shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError(f"{name} holds a number that is negative or not finite")
    array.setflags(write=False)
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Predicted seconds of one layer: of each phase, those of the slowest rank.

    Exchanges count from the moment when all ranks take part: nobody's waiting is in them.
    """

    prepare_s: float
    dispatch_s: float
    experts_s: float
    combine_s: float
    unpermute_s: float

    @property
    def total_s(self) -> float:
        """Seconds of the layer on the slowest rank."""
        return float(sum(self.phases().values()))

    def phases(self) -> dict[str, float]:
        """Return seconds by phase, in order."""
        return {name.name.removesuffix("_s"): getattr(self, name.name) for name in fields(self)}


def predict_layer(
    shape: ModelShape, counts: LayerCounts, calibration: MeasuredCalibration, *, dedup: bool
) -> LayerTime:
    """Predict one layer's time on the machine of a calibration.

    Parameters
    ----------
    shape
        Sizes; where `calibration` has measured a model of this name, its curve serves.
    counts
        Who sends how much to whom.
    calibration
        Measured curves.
    dedup
        Whether a token is sent once to each rank (`counts.tokens_RR`) or once for each pair.

    Raises
    ------
    InputError
        If `counts` or `calibration` lack what is needed.
    """
    return _Layer(shape, calibration, DEDUP if dedup else PAIRS).time(counts, dedup=dedup)


class _Layer:
    """A layer's program on a machine."""

    def __init__(self, shape: ModelShape, calibration: MeasuredCalibration, program: LayerProgram) -> None:
        self._shape = shape
        self._calibration = calibration
        self._machine = calibration.machine
        self._program = program
        self._row_bytes = shape.token_bytes(calibration.machine.dtype)
        # Passes are counted for two-byte numbers; wider or narrower ones in proportion.
        self._element_s = self._row_bytes / 2 / calibration.machine.row_bytes_per_s
        self._exchange = straightened(calibration.node_exchange)
        self._latency_s = float(self._exchange(0.0))
        self._smallest_s = float(calibration.node_exchange(0.0))
        self._operation_s = _operation_s(self._smallest_s, calibration.machine.launch_s or 0.0)

    def time(self, counts: LayerCounts, *, dedup: bool) -> LayerTime:
        rows_RR = counts.rows_RR(dedup=dedup)
        away_RR = rows_RR - np.diag(np.diag(rows_RR))
        busiest = float(max(away_RR.sum(axis=0).max(), away_RR.sum(axis=1).max()))
        ranks = range(counts.num_ranks)
        return LayerTime(
            prepare_s=max(self._prepare(float(rows)) for rows in rows_RR.sum(axis=1)),
            dispatch_s=self._dispatch(busiest),
            experts_s=max(
                self._experts(counts, rank, arrived=float(rows_RR[:, rank].sum())) for rank in ranks
            ),
            combine_s=self._queued_exchange(busiest),
            unpermute_s=max(
                self._unpermute(float(rows_RR[rank].sum()), float(counts.tokens_R[rank])) for rank in ranks
            ),
        )

    def _moved(self, rows: float, bytes_per_element: float) -> float:
        """Seconds in which kernels move rows."""
        return rows * bytes_per_element * self._element_s

    def _measured(self, rows: float, *steps: str) -> float | None:
        """Seconds of steps if all of them were measured, with what the host does for them."""
        width = self._shape.hidden_size
        found = [self._machine.row_step_s(step, rows=rows, hidden=width) for step in steps]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if len(known) == len(steps) else None

    def _prepare(self, rows: float) -> float:
        """Rows put into the order of sending, and all ranks told how many come."""
        told_s = self._machine.counts_exchange_s
        handling_s = self._measured(rows, "prepare")
        if handling_s is None:
            handling_s = self._program.prepare_operations * self._operation_s
            handling_s += self._moved(rows, self._program.prepare_bytes)
        return handling_s + (self._smallest_s if told_s is None else told_s)

    def _dispatch(self, rows: float) -> float:
        """Rows and, after them, what goes along with them."""
        tags = zip(self._program.tag_bytes, self._program.tag_bytes_per_choice, strict=True)
        small = (rows * (of_row + self._shape.top_k * of_choice) for of_row, of_choice in tags)
        return self._exchanged(rows * self._row_bytes) + sum(map(self._exchanged, small))

    def _exchanged(self, received_bytes: float) -> float:
        return float(self._exchange(received_bytes))

    def _queued_exchange(self, rows: float) -> float:
        """An exchange issued long before its turn comes: the experts hide its latency."""
        return self._exchanged(rows * self._row_bytes) - self._latency_s

    def _experts(self, counts: LayerCounts, rank: int, *, arrived: float) -> float:
        pairs = float(counts.pairs_RR[:, rank].sum())
        handling_s = self._measured(pairs, "expand", "reduce")
        if handling_s is None:
            handling_s = self._program.experts_operations * self._operation_s
            handling_s += self._moved(pairs, self._program.expand_bytes + self._program.reduce_bytes)
            handling_s += self._moved(arrived, self._program.arrived_bytes)
        return handling_s + self._products(counts, rank, pairs)

    def _products(self, counts: LayerCounts, rank: int, pairs: float) -> float:
        active, local = float(counts.active_R[rank]), float(counts.local_R[rank])
        if not pairs or not active:
            return 0.0
        load_C = None if counts.load_RC is None else np.asarray(counts.load_RC[rank], dtype=np.float64)
        times, scale = self._calibration.nearest_experts(self._shape)
        tokens = tokens_with_padding(pairs / active, load_C)
        return scale * active * times.seconds(tokens, share=active / max(local, active))

    def _unpermute(self, rows: float, tokens: float) -> float:
        handling_s = self._measured(rows, "unpermute")
        if handling_s is None:
            handling_s = self._program.unpermute_operations * self._operation_s
            handling_s += self._moved(rows, self._program.unpermute_bytes)
            handling_s += self._moved(tokens, self._program.token_bytes)
        return handling_s


def _operation_s(exchange_s: float, launch_s: float) -> float:
    """Seconds that one operation costs which the host issues to an idle GPU.

    Read off the smallest all-to-all, which is nothing but the host's work, on the same host.
    """
    share_s = exchange_s / OPERATIONS_OF_EXCHANGE
    return max(launch_s, min(max(share_s, LEAST_OPERATION_S), MOST_OPERATION_S))


def straightened(curve: PiecewiseLinear) -> PiecewiseLinear:
    """Return latency + bytes / bandwidth through a curve's points if they fit, else the curve.

    The line has the least sum of squares of relative errors. Single measurements are noisy, and beyond the
    last a curve would go on with the slope of only two.
    """
    x, y = curve.x[curve.x > 0], curve.y[curve.x > 0]
    if x.size < 3 or (y <= 0).any():
        return curve
    scale = float(x[-1])
    found, *_ = np.linalg.lstsq(np.stack([1 / y, x / scale / y], axis=1), np.ones_like(y), rcond=None)
    intercept, slope = float(found[0]), float(found[1]) / scale
    if intercept < 0 or slope <= 0 or (np.abs((intercept + slope * x) / y - 1) > LINE_TOLERANCE).any():
        return curve
    return PiecewiseLinear(x=np.array([0.0, scale]), y=np.array([intercept, intercept + slope * scale]))


def tokens_with_padding(mean: float, load_C: FloatArray | None = None) -> float:
    """Return the tokens per expert of an even load that takes a grouped product as long as an uneven one.

    Each expert's tokens are rounded up to whole tiles. Measured curves have even loads, which fill their
    tiles at the sizes that are measured; uneven ones leave half a tile of each expert empty, or less where
    experts have less than a tile.

    Parameters
    ----------
    mean
        Tokens per active expert.
    load_C
        Tokens of each expert, where known: then they are rounded one by one.
    """
    tile = LARGE_TILE if mean > SMALL_TILE else SMALL_TILE
    if load_C is None:
        return mean + min(mean, tile) / 2
    active_C = load_C[load_C > 0]
    empty = np.ceil(active_C / tile) * tile - active_C
    return mean + min(mean, float(empty.mean())) if active_C.size else mean
