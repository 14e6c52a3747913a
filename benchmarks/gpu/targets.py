"""What was wanted, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu.figures import Change, emulated_tails, grouped, paired
from benchmarks.gpu.policies import CONTIGUOUS, EPLB
from benchmarks.gpu.replay import AGAIN

__all__ = ["Target", "targets"]

Row = dict[str, Any]

CASE = ("layer", "window")
OURS = "joint@nvlink"
WITH_SPARE = ("joint+@nvlink", "joint+/lp@nvlink")
TAIL = "balance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One figure.

    Parameters
    ----------
    what, wanted, measured
        Texts.
    is_met
        None where that is not a question.
    """

    what: str
    wanted: str
    measured: str
    is_met: bool | None


def targets(result: Mapping[str, Row], scores: Mapping[str, Row]) -> list[Target]:
    """Return all targets that something was measured for.

    Parameters
    ----------
    result
        Results by part.
    scores
        Scores of predictions by transport.
    """
    cases = [
        case for part in ("replay-prefill", "replay-nvlink") for case in result.get(part, {}).get("cases", [])
    ]
    return [
        *_layers(cases),
        *_tails(result.get("emulate", {}).get("cases", [])),
        *_predictions(scores),
        *_recorder(result.get("recorder", {}).get("rows", [])),
        *_migration(result.get("migration", {}).get("migrations", [])),
    ]


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _at_most(what: str, limit: float, value: float) -> Target:
    return Target(what=what, wanted=f"<= {_percent(limit)}", measured=_percent(value), is_met=value <= limit)


def _layers(cases: Sequence[Row]) -> Iterator[Target]:
    """Whole layers, one copy of a token for each device, NVLink."""
    dedup = [case for case in cases if case["exchange"] == "dedup"]
    for (instance,), group in grouped(dedup, ("instance",)).items():
        for other, limit in ((CONTIGUOUS, -0.04), (EPLB, -0.015)):
            change = paired(group, OURS, other, value="layer_ms", keys=CASE)
            if change is not None:
                yield _layer(f"{instance}: layer, ours against {other}, equal slots", limit, change)
        yield from _spare(instance, group)
        yield from _never_slower(instance, group)


def _layer(what: str, limit: float, change: Change) -> Target:
    """Judged by the total time over all cases, which is what a step adds up; the median is told, too."""
    measured = f"{_percent(change.of_means)} (median {_percent(change.median)})"
    wanted = f"<= {_percent(limit)}"
    return Target(what=what, wanted=wanted, measured=measured, is_met=change.of_means <= limit)


def _spare(instance: str, group: Sequence[Row]) -> Iterator[Target]:
    equal = paired(group, OURS, CONTIGUOUS, value="layer_ms", keys=CASE)
    for policy in WITH_SPARE:
        change = paired(group, policy, CONTIGUOUS, value="layer_ms", keys=CASE)
        if change is not None and equal is not None:
            yield Target(
                what=f"{instance}: layer, {policy} against contiguous",
                wanted=f"below {_percent(equal.of_means)}",
                measured=f"{_percent(change.of_means)} (median {_percent(change.median)})",
                is_met=change.of_means < equal.of_means,
            )


def _never_slower(instance: str, group: Sequence[Row]) -> Iterator[Target]:
    change = paired(group, OURS, CONTIGUOUS, value="layer_ms", keys=CASE)
    again = paired(group, AGAIN, CONTIGUOUS, value="layer_ms", keys=CASE)
    if change is not None and again is not None:
        noise = max(again.worst, -again.best)
        yield Target(
            what=f"{instance}: worst of {change.cases} cases, ours against contiguous",
            wanted=f"no more than noise ({_percent(noise)})",
            measured=_percent(change.worst),
            is_met=change.worst <= noise,
        )


_TAILS = {
    "gpt-oss-20b-8": ((EPLB, -0.12), (CONTIGUOUS, -0.17)),
    "olmoe-8": ((EPLB, -0.09),),
}


def _tails(cases: Sequence[Row]) -> Iterator[Target]:
    for (instance, batch), group in grouped(cases, ("instance", "batch")).items():
        for other, limit in _TAILS.get(instance, ()):
            if batch.startswith("prefill"):
                tail_ms, other_ms = (emulated_tails(group, name)[0] for name in (TAIL, other))
                what = f"{instance} emulated, {batch}: tail expert time, {TAIL} against {other}"
                yield _at_most(what, limit, tail_ms / other_ms - 1)
                # As many slots for both; contiguous has no use for more.
                with_spare = (f"{TAIL}+", other if other == CONTIGUOUS else f"{other}+")
                tail_ms, other_ms = (emulated_tails(group, name)[0] for name in with_spare)
                what = f"{instance} emulated, {batch}: tail expert time, {' against '.join(with_spare)}"
                yield _at_most(what, limit, tail_ms / other_ms - 1)


def _predictions(scores: Mapping[str, Row]) -> Iterator[Target]:
    for transport, score in scores.items():
        for key, limit in (("median_error", 0.05), ("p95_error", 0.12)):
            yield Target(
                what=f"predicted layer time, {transport}: {key.replace('_', ' ')}",
                wanted=f"<= {100 * limit:.0f} %",
                measured=f"{100 * score[key]:.1f} %",
                is_met=score[key] <= limit,
            )


def _recorder(rows: Sequence[Row]) -> Iterator[Target]:
    for row in rows:
        if row.get("variant") == "loads" and row["status"] == "ok":
            yield _at_most(f"recorder of loads, {row['case']}", 0.01, row["overhead"]["median"])


def _migration(rows: Sequence[Row]) -> Iterator[Target]:
    for (instance,), group in grouped(rows, ("instance",)).items():
        best = max(group, key=lambda row: float(row["share of link"]))
        share = float(best["share of link"])
        yield Target(
            what=f"{instance}: migration, share of the link's bandwidth ({best['variant']})",
            wanted=">= 80 %",
            measured=f"{100 * share:.0f} %",
            is_met=bool(np.greater_equal(share, 0.8)),
        )
        for row in group:
            what = f"{instance}: step time while overlapped ({row['variant']})"
            yield _at_most(what, 0.05, float(row["impact"]))
