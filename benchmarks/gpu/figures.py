"""Turns the results of runs into figures: paired differences, tails, errors, shares.

Shape letters: N cases, W windows, L layers, D ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.folder import Prepared
from placement.calibration import Calibration
from placement.topology import parse_topology

__all__ = ["Change", "change_of", "emulated_tails", "exchange_ms", "grouped", "median_of", "paired"]

FloatArray = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Relative change of paired times, below 0 where a policy is faster.

    Parameters
    ----------
    median, low, high
        Median and quartiles over cases.
    worst, best
        Largest and smallest.
    of_means
        Change of the mean time over all cases.
    cases
        Pairs.
    """

    median: float
    low: float
    high: float
    worst: float
    best: float
    of_means: float
    cases: int


def change_of(mine_N: FloatArray, other_N: FloatArray) -> Change:
    """Return the change from `other_N` to `mine_N`, case by case."""
    change_N = mine_N / other_N - 1.0
    low, median, high = np.quantile(change_N, [0.25, 0.5, 0.75])
    return Change(
        median=float(median),
        low=float(low),
        high=float(high),
        worst=float(change_N.max()),
        best=float(change_N.min()),
        of_means=float(mine_N.mean() / other_N.mean() - 1.0),
        cases=int(change_N.size),
    )


def grouped(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by some keys, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _by_case(rows: Iterable[Row], policy: str, value: str, keys: Sequence[str]) -> dict[Any, float]:
    return {
        tuple(row[key] for key in keys): float(row[value]["median"])
        for row in rows
        if row["policy"] == policy and value in row
    }


def paired(rows: Sequence[Row], policy: str, other: str, *, value: str, keys: Sequence[str]) -> Change | None:
    """Return a policy's change against another over the cases that both were measured in; None without any.

    Parameters
    ----------
    value
        Summary whose median is compared.
    keys
        What makes a case.
    """
    mine, theirs = (_by_case(rows, name, value, keys) for name in (policy, other))
    common = [case for case in mine if case in theirs]
    if not common:
        return None
    return change_of(np.array([mine[c] for c in common]), np.array([theirs[c] for c in common]))


def median_of(rows: Sequence[Row], policy: str, value: str) -> float:
    """Return the median over cases of a policy's medians; NaN without any."""
    found = [row[value]["median"] for row in rows if row["policy"] == policy and value in row]
    return float(np.median(found)) if found else float("nan")


def emulated_tails(rows: Sequence[Row], policy: str) -> tuple[float, float]:
    """Return the means over cases of the slowest and of the average rank's expert time, in ms."""
    mine = [row for row in rows if row["policy"] == policy]
    tails = [row["tail_ms"]["median"] for row in mine]
    means = [float(np.mean(row["rank_ms"])) for row in mine]
    return float(np.mean(tails)), float(np.mean(means))


def exchange_ms(
    prepared: Prepared, rows: Sequence[Row], policy: str, batch: str, calibration: Calibration
) -> float:
    """Return the predicted time of dispatch and combine, averaged over the cases that were measured.

    All ranks are taken to share one fast domain, and the exchange to wait for the rank that receives most.
    """
    instance = prepared.instance
    tier = parse_topology(f"h100:1x{instance.num_ranks}").tiers[0]
    received_WLD = prepared.arrays[f"received/{policy}/{batch}"]
    most_N = np.array(
        [received_WLD[row["window"], row["layer"]].max() for row in rows if row["policy"] == policy]
    )
    shape = instance.shape.model(len(instance.layers))
    phases = ("dispatch", "combine")
    curves = [calibration.exchange_curve(tier, shape, phase=phase) for phase in phases]
    return 1e3 * float(np.mean(sum(curve(most_N) for curve in curves)))
