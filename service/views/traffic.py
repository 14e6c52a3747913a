"""A trace at a glance, for the process that opens uploads: facts in words, and figures.

Shape letters: W windows, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.report.figures.traffic import distance_figure, load_figure, windows_figure
from placement.report.numbers import number, percent
from service.deployments.drift import total_variation_L
from service.views.figures import figure_entry
from traces.counts import ExpertCounts
from traces.overview import Overview, overview_of
from traces.source import TraceSource

__all__ = ["traffic_document"]

FloatArray = npt.NDArray[np.float64]


def traffic_document(traffic: TraceSource | ExpertCounts) -> dict[str, Any]:
    """Return facts and figures of a trace, or of statistics or counts.

    Raises
    ------
    InputError
        If it is damaged, or of too many experts to be drawn.
    """
    found = overview_of(traffic)
    return {"facts": _facts(found), "figures": [_load(found), *_over_time(found)]}


def _facts(found: Overview) -> dict[str, str]:
    load_LE = found.load_LE
    busiest_L = load_LE.max(axis=1) / load_LE.mean(axis=1).clip(min=np.finfo(float).tiny)
    sorted_LE = -np.sort(-load_LE, axis=1)
    tenth = max(1, round(load_LE.shape[1] / 10))
    share = float(sorted_LE[:, :tenth].sum() / sorted_LE.sum())
    layer = int(busiest_L.argmax())
    facts = {
        "Busiest expert, mean over layers": f"{number(float(busiest_L.mean()), digits=3)} times the mean",
        "Busiest expert of all": (
            f"expert {int(load_LE[layer].argmax())} of layer {layer}, "
            f"{number(float(busiest_L[layer]), digits=3)} times the mean"
        ),
        "Pairs at the busiest tenth of the experts": percent(share),
        "Experts never selected": f"{int((load_LE == 0).sum()):,} of {load_LE.size:,}",
        "Windows drawn": f"{len(found.load_WLE):,}",
    }
    if not found.is_whole:
        facts["Tokens read for the figures"] = f"{found.num_tokens_read:,} of {found.num_tokens:,}"
    return facts


def _load(found: Overview) -> dict[str, Any]:
    return figure_entry(
        "Load by layer and expert",
        "Red cells are experts that get more than their share of a layer's token-expert pairs, blue ones get "
        "less; a placement must not put several red ones on one device.",
        load_figure(found.load_LE),
        name="load",
    )


def _over_time(found: Overview) -> list[dict[str, Any]]:
    if len(found.load_WLE) < 2:
        return []
    distance_W, noise_W = _distances(found)
    return [
        figure_entry(
            "Busiest expert by window",
            "Where the lines are steady, a placement that fits one part of the trace fits the others too.",
            windows_figure(found.load_WLE),
            name="windows",
        ),
        figure_entry(
            "How far each window is from the whole trace",
            "The share of pairs that would have to go to other experts to look like the whole trace, mean "
            "over layers. What is well above the dashed line is a change of traffic, not chance.",
            distance_figure(distance_W, noise_W),
            name="distance",
        ),
    ]


def _distances(found: Overview) -> tuple[FloatArray, FloatArray]:
    """Return the distance of each window to all together, and what is expected of independent draws."""
    whole_LE = found.load_WLE.sum(axis=0)
    share_LE = whole_LE / whole_LE.sum(axis=1, keepdims=True).clip(min=1.0)
    pairs_WL = found.load_WLE.sum(axis=2).clip(min=1.0)
    distance_W = np.array([total_variation_L(load_LE, whole_LE).mean() for load_LE in found.load_WLE])
    # A window is a part of the whole, which draws the whole towards it.
    freedom_WL = np.clip(1 / pairs_WL - 1 / whole_LE.sum(axis=1).clip(min=1.0), 0.0, None)
    spread_L = np.sqrt(share_LE * (1 - share_LE)).sum(axis=1)
    noise_W = 0.5 * math.sqrt(2 / math.pi) * (np.sqrt(freedom_WL) * spread_L).mean(axis=1)
    return distance_W, noise_W
