"""What no decision can beat, from each data centre's own side alone.

Data centre c that holds k copies in a layer spends at least the time of fetching k experts, and its tokens
for all other remote experts must leave; the least are left if the k copies are those it uses most. Over all
k within memory the least of that is a bound for c, the largest over c one for the layer. It holds wherever
tokens are served, for latency only adds.

Shape letters: L MoE layers, C data centres, E experts, K number of copies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.planning.cross_dc.even import pass_weights
from placement.planning.cross_dc.traffic import CrossTraffic

__all__ = ["own_side_bound_L", "own_side_copies_C"]


def _own_side_s_CK(traffic: CrossTraffic, layer: int) -> npt.NDArray[np.float64]:
    """Return the least time of each data centre with each number of copies, ``[centres, copies]``."""
    at_home_CE = np.arange(traffic.num_centres)[:, None] == traffic.home_LE[layer]
    remote_CE = -np.sort(-np.where(at_home_CE, 0.0, traffic.tokens_LCE[layer]), axis=1)
    covered_CK = np.cumsum(remote_CE, axis=1)
    left_CK = np.maximum(covered_CK[:, -1:] - np.insert(covered_CK, 0, 0.0, axis=1), 0.0)
    left_CK = left_CK[:, : traffic.most_copies + 1]
    gather_CK = np.arange(left_CK.shape[1]) * traffic.copy_s_C[:, None]
    weights = pass_weights(traffic.training)
    ready = [np.maximum(weight * traffic.pre_expert_s_L[layer], gather_CK) for weight in weights]
    return np.asarray(sum(ready) + 2 * len(weights) * left_CK * traffic.token_s_C[:, None])


def own_side_bound_L(traffic: CrossTraffic) -> npt.NDArray[np.float64]:
    """Return a lower bound of each layer's time, seconds, ``[layers]``."""
    # A sum in another order may exceed the cost function's own by a rounding.
    slack = 1.0 - 1e-12
    return slack * np.array(
        [_own_side_s_CK(traffic, layer).min(axis=1).max() for layer in range(traffic.num_layers)]
    )


def own_side_copies_C(traffic: CrossTraffic, layer: int) -> npt.NDArray[np.int64]:
    """Return with how many copies each data centre's own side is fastest, ``[centres]``."""
    return np.asarray(_own_side_s_CK(traffic, layer).argmin(axis=1))
