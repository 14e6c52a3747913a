"""Tokens counted once per data centre that they visit, as engines with deduplicated dispatch send them.

Shape letters: T tokens, K top-k, L MoE layers, C data centres, E experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.planning.cross_dc.traffic import (
    CrossTraffic,
    Decision,
    FloatArray,
    IntArray,
    LinkUse,
    link_use,
)

__all__ = ["distinct_use"]


def distinct_use(
    traffic: CrossTraffic,
    decision: Decision,
    *,
    experts_TLK: npt.NDArray[np.integer],
    centre_T: IntArray,
    scale_C: FloatArray,
) -> LinkUse:
    """Return what travels where a token for several experts of one data centre is sent once.

    Parameters
    ----------
    traffic, decision
        Who serves whom, and where experts live.
    experts_TLK
        Experts of each token, ``[tokens, layers, k]``.
    centre_T
        Data centre of each token, ``[tokens]``.
    scale_C
        What a token of each data centre counts for, ``[centres]``: tokens of a step over tokens given.
    """
    centres = traffic.num_centres
    tokens_LCC = np.zeros((traffic.num_layers, centres, centres))
    for layer in range(traffic.num_layers):
        server_TK = np.sort(decision.serve_LCE[layer][centre_T[:, None], experts_TLK[:, layer]], axis=1)
        counts_TK = np.ones(server_TK.shape, dtype=np.bool_)
        counts_TK[:, 1:] = server_TK[:, 1:] != server_TK[:, :-1]
        cell_TK = centre_T[:, None] * centres + server_TK
        tokens_LCC[layer] = np.bincount(cell_TK[counts_TK], minlength=centres**2).reshape(centres, centres)
    tokens_LCC *= scale_C[:, None]
    tokens_LCC[:, np.arange(centres), np.arange(centres)] = 0.0
    return LinkUse(tokens_LCC=tokens_LCC, copies_LCC=link_use(traffic, decision).copies_LCC)
