"""What the statistics of routing say, in sentences that hold for any trace.

Shape letters: C kinds of traffic.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from placement.learning import LearningCurve
from placement.report.numbers import Scale, number, percent, plural
from traces.statistics.affinity import Affinity
from traces.statistics.ageing import LoadAgeing
from traces.statistics.kinds import KindLoads
from traces.statistics.variation import LoadVariation

__all__ = [
    "affinity_finding",
    "ageing_finding",
    "information_finding",
    "kinds_finding",
    "learning_finding",
    "load_finding",
    "variation_finding",
]

_LITTLE = 0.05
"""Share of the unevenness that is next to nothing."""


def load_finding(variation: LoadVariation) -> str:
    """Say which expert is busiest, and how busy the busiest is in a layer."""
    layer, expert = variation.busiest
    busiest_L = variation.relative_LE.max(axis=1)
    idle = int(np.count_nonzero(variation.relative_LE == 0))
    unused = f" {_are(idle, 'expert')} never selected." if idle else ""
    return (
        f"Expert {expert} of layer {layer} is the busiest, with {_times(busiest_L[layer])} the load of the "
        f"mean expert; in the mean layer the busiest has {_times(float(busiest_L.mean()))}.{unused}"
    )


def variation_finding(variation: LoadVariation) -> str:
    """Say how uneven single windows are, and whether that stays or moves."""
    steady, moving, _ = variation.shares
    window, layer = variation.busiest_window
    typical = float(variation.busiest_WL.mean())
    if steady + moving < _LITTLE:
        verdict = "next to all unevenness is what chance makes of so few tokens"
    elif moving > steady:
        verdict = "more moves than stays, so a placement fitted to one stretch meets other loads in the next"
    else:
        verdict = "more stays than moves, so most of it can be balanced once and for all"
    return (
        f"Within a window the busiest expert has {_times(typical)} the mean load, at worst "
        f"{_times(variation.busiest_WL[window, layer])} (window {window}, layer {layer}). Of the unevenness "
        f"{percent(steady, digits=0)} stays the same all the time and {percent(moving, digits=0)} moves from "
        f"window to window: {verdict}."
    )


def kinds_finding(kinds: KindLoads | None) -> str:
    """Say which kind of traffic differs most from the others, and how many do at all."""
    if kinds is None:
        return "The trace knows one kind of traffic only."
    farthest = int(kinds.distance_C.argmax())
    differ = int(np.count_nonzero(kinds.differ_C))
    chance = percent(float(kinds.null_C[farthest]))
    many = plural(0, kinds.what).partition(" ")[2]
    extent = (
        f"none of {len(kinds.names)} {many} differs" if not differ else
        f"all {plural(differ, kinds.what)} differ" if differ == len(kinds.names) else
        f"{differ} of {len(kinds.names)} {many} {'differs' if differ == 1 else 'differ'}"
    )  # fmt: skip
    apart = percent(float(kinds.distance_C[farthest]))
    return (
        f"Of all {many}, {kinds.names[farthest]} differs most: {apart} of its load is at other "
        f"experts than the others' (chance makes {chance}), and {extent} by more than chance."
    )


def ageing_finding(ageing: LoadAgeing, *, window_tokens: int) -> str:
    """Say how fast knowledge of the load loses its value."""
    near, null = float(ageing.distance_N[0]), ageing.null
    start = (
        f"A window differs from the {plural(ageing.span, 'window')} just before it in {percent(near)} of its "
        f"load, and from windows in random order in {percent(null)}"
    )
    if not ageing.order_matters:
        return f"{start}: when the windows were seen makes no difference."
    half = ageing.half_life
    if half is None:
        longest = int(ageing.lag_N[-1])
        return f"{start}; less than half of that lead is lost {plural(longest, 'window')} later."
    after = f"{number(half, digits=2)} windows (about {float(f'{half * window_tokens:.2g}'):,.0f} tokens)"
    return f"{start}; half of that lead is lost after {after}."


def affinity_finding(affinities: Sequence[Affinity]) -> str:
    """Say how many pairs go together more or less than chance explains, and which does most."""
    if not affinities:
        return "No token selects two experts whose pairs could be counted."
    exceeding = sum(int(np.count_nonzero(_once(each, each.exceeds_EE))) for each in affinities)
    judged = sum(int(np.count_nonzero(_once(each, each.judged_EE))) for each in affinities)
    what = "of one layer" if affinities[0].is_coactivation else "of consecutive layers"
    counted = (
        f"{exceeding:,} of {judged:,} pairs of experts {what} differ from chance by more than any pair of "
        "any shuffle"
    )
    if not exceeding:
        return f"{counted}."
    tops = [np.where(each.exceeds_EE, each.lift_EE, 0.0) for each in affinities]
    at = int(np.argmax([top.max() for top in tops]))
    top, best = tops[at], affinities[at]
    row, column = (int(place) for place in np.unravel_index(int(top.argmax()), top.shape))
    if top[row, column] <= 1:
        return f"{counted}, all of them by being rarer."
    pair = (
        f"experts {row} and {column} of layer {best.layer}"
        if best.is_coactivation
        else f"expert {row} of layer {best.layer} and expert {column} of layer {best.other}"
    )
    return f"{counted}; {pair} go together most, {_times(top[row, column])} as often as their loads explain."


def information_finding(affinities: Sequence[Affinity]) -> str:
    """Say what an expert tells about the next layer's, in bits, and whether that is more than chance."""
    if not affinities:
        return "There is one MoE layer only, so no expert is followed by another."
    most = max(affinities, key=lambda each: each.excess_bits)
    above = sum(each.is_above_chance for each in affinities)
    mean = float(np.mean([each.excess_bits for each in affinities]))
    share = max(0.0, most.excess_bits / (most.entropy_bits or 1.0))
    return (
        f"Beyond chance, an expert of a token tells {_bits(mean)} bits about one of the next layer, most of "
        f"all {_bits(most.excess_bits)} from layer {most.layer} to {most.other} "
        f"({percent(share, digits=0)} of the {_bits(most.entropy_bits)} that there are). Of "
        f"{plural(len(affinities), 'pair')} of layers, {above} {'exceeds' if above == 1 else 'exceed'} every "
        "shuffle."
    )


def learning_finding(curve: LearningCurve, *, window_tokens: int) -> str:
    """Say how many windows are enough to fit a placement to, spread over time or consecutive."""
    spread, consecutive = curve.enough_spread, curve.enough_consecutive
    what = "the fullest device's load over the mean" if curve.unit == "max/mean" else "the objective"
    results = (
        f"On windows not seen, {what} is {_value(curve, curve.best)} with a placement fitted to "
        f"{plural(curve.num_windows, 'window')} and {_value(curve, curve.unfitted)} with experts in order"
    )
    if curve.best >= curve.unfitted:
        return f"{results}: these windows are too few, or traffic too changing, to be of use."
    also = (
        ", and as many consecutive ones"
        if spread == consecutive
        else f"; of consecutive ones it takes {consecutive:,}"
    )
    return (
        f"{results}. {_enough(curve, spread, window_tokens)} spread over the trace "
        f"{'comes' if spread == 1 else 'come'} within {percent(curve.tolerance, digits=0)} of that{also}."
    )


def _enough(curve: LearningCurve, windows: int, window_tokens: int) -> str:
    least = "Only all" if windows == curve.num_windows else "As few as" if windows > 1 else "Even"
    return f"{least} {plural(windows, 'window')} ({windows * window_tokens:,} tokens)"


def _value(curve: LearningCurve, value: float) -> str:
    scale = Scale.of(value, curve.unit)
    text = scale.text(value, digits=4)
    return text if curve.unit == "max/mean" else f"{text} {scale.unit}"


def _once(affinity: Affinity, pairs_EE: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return each pair of a layer once."""
    return np.triu(pairs_EE, 1) if affinity.is_coactivation else pairs_EE


def _times(factor: float) -> str:
    return f"{number(float(factor), digits=3)} times"


def _bits(value: float) -> str:
    return number(value, digits=2) if value >= 0.005 else "less than 0.01"


def _are(count: int, noun: str) -> str:
    return f"{plural(count, noun)} {'is' if count == 1 else 'are'}"
