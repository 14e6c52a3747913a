"""Compiled loops of the cost model: which devices tokens touch, window by window.

Imported only where an evaluation runs, since numba takes most of a second to load.

Shape letters: T tokens, K top-k, W windows, E experts, D devices, G groups of a link.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["count_touches", "walk_tokens"]

Array = npt.NDArray[Any]

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@nb.njit(**_OPTIONS)
def count_touches(
    experts_TK: Array,
    window_T: Array,
    home_row_T: Array,
    first_E: Array,
    replicas_E: Array,
    count_ED: Array,
    group_JD: Array,
    enter_JHG: Array,
    fanout_JW: Array,
    volume_JWG: Array,
) -> None:
    """Add up, per link, what every group receives in each window, and the groups that tokens touch.

    A replicated expert is read where the token already goes, else on its first replica; experts with one
    replica are settled first, then the others in the token's own order.

    Parameters
    ----------
    home_row_T
        Row of `enter_JHG` for each token: 0 unknown, 1 + home device.
    group_JD, enter_JHG
        For each link the group of each device and what a token adds on entering, padded over links.
    fanout_JW, volume_JWG
        Results, added to.
    """
    num_devices = count_ED.shape[1]
    num_links = group_JD.shape[0]
    top_k = experts_TK.shape[1]
    device_seen = np.full(num_devices, -1, dtype=np.int64)
    group_seen = np.full((num_links, enter_JHG.shape[2]), -1, dtype=np.int64)
    touched = np.empty(num_devices, dtype=np.int64)
    for token in range(experts_TK.shape[0]):
        num_touched = 0
        for position in range(top_k):
            expert = experts_TK[token, position]
            device = first_E[expert]
            if replicas_E[expert] == 1 and device_seen[device] != token:
                device_seen[device] = token
                touched[num_touched] = device
                num_touched += 1
        for position in range(top_k):
            expert = experts_TK[token, position]
            if replicas_E[expert] == 1:
                continue
            already = False
            for index in range(num_touched):
                if count_ED[expert, touched[index]] > 0:
                    already = True
                    break
            if not already:
                device = first_E[expert]
                device_seen[device] = token
                touched[num_touched] = device
                num_touched += 1
        window = window_T[token]
        home = home_row_T[token]
        for link in range(num_links):
            for index in range(num_touched):
                group = group_JD[link, touched[index]]
                if group_seen[link, group] != token:
                    group_seen[link, group] = token
                    fanout_JW[link, window] += 1
                    volume_JWG[link, window, group] += enter_JHG[link, home, group]


@nb.njit(**_OPTIONS)
def walk_tokens(
    first_expert_TL: Array,
    window_T: Array,
    home_row_T: Array,
    first_LE: Array,
    count_LED: Array,
    group_JD: Array,
    enter_JHG: Array,
    volume_LJWG: Array,
) -> None:
    """Follow stay-put tokens through the layers and add up what every group receives.

    A token stays where it is if its first expert has a replica there, else it moves to the expert's first
    replica. Entering layer 0 is charged only to tokens whose home is known.
    """
    num_layers = first_expert_TL.shape[1]
    num_links = group_JD.shape[0]
    for token in range(first_expert_TL.shape[0]):
        here = home_row_T[token] - 1
        window = window_T[token]
        for layer in range(num_layers):
            expert = first_expert_TL[token, layer]
            if here >= 0 and count_LED[layer, expert, here] > 0:
                continue
            target = first_LE[layer, expert]
            if here >= 0:
                for link in range(num_links):
                    group = group_JD[link, target]
                    if group != group_JD[link, here]:
                        volume_LJWG[layer, link, window, group] += enter_JHG[link, 1 + here, group]
            here = target
