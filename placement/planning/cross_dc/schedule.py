"""Message by message: a simulation of prefetch and exchange, independent of the cost functions.

Every member has one port to send and one to receive. A message waits until both its ports are free, and
then holds them for its bytes over the slower link's bandwidth, and its latency. Members talk in rounds: in
round r member i sends to member i + r. The prefetch starts at once; tokens leave when the pre-expert
computation and the prefetch of a member are done; the combine is the dispatch turned round. One forward pass.

Shape letter: C members (twice: who receives experts or sends tokens, and the other).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.planning.cross_dc.even import EvenLoad
from placement.planning.cross_dc.relation import Relation, relation_GG
from placement.planning.cross_dc.traffic import CrossTraffic, LinkUse

__all__ = ["simulated_even", "simulated_layer"]

FloatArray = npt.NDArray[np.float64]


def _rounds(
    bytes_CC: FloatArray, *, bandwidth_C: FloatArray, latency_s: float, ready_C: FloatArray
) -> FloatArray:
    """Return when each member has sent and received all, given when it is ready; ``bytes_CC[from, to]``."""
    members = bytes_CC.shape[0]
    send_C, receive_C = ready_C.copy(), ready_C.copy()
    for shift in range(1, members):
        for source in range(members):
            target = (source + shift) % members
            if bytes_CC[source, target] == 0:
                continue
            start = max(send_C[source], receive_C[target])
            rate = min(bandwidth_C[source], bandwidth_C[target])
            end = start + bytes_CC[source, target] / rate + latency_s
            send_C[source] = receive_C[target] = end
    return np.maximum(send_C, receive_C)


def _pass_s(
    experts_CC: FloatArray,
    tokens_CC: FloatArray,
    *,
    bandwidth_C: FloatArray,
    latency_s: float,
    pre_expert_s: float,
) -> float:
    """Return the time of one forward pass; both arguments are bytes from the first to the second."""
    members = experts_CC.shape[0]
    idle_C = np.zeros(members)
    gathered_C = _rounds(experts_CC, bandwidth_C=bandwidth_C, latency_s=latency_s, ready_C=idle_C)
    ready_C = np.maximum(gathered_C, pre_expert_s)
    dispatched_C = _rounds(tokens_CC, bandwidth_C=bandwidth_C, latency_s=latency_s, ready_C=ready_C)
    done_C = _rounds(tokens_CC.T, bandwidth_C=bandwidth_C, latency_s=latency_s, ready_C=dispatched_C)
    return float(done_C.max())


def simulated_layer(traffic: CrossTraffic, use: LinkUse) -> float:
    """Return the forward time of a traffic's first layer, seconds; at least what the cost function says."""
    return _pass_s(
        use.copies_LCC[0].T * traffic.expert_bytes / traffic.compression,
        use.tokens_LCC[0] * traffic.token_bytes,
        bandwidth_C=traffic.bandwidth_C,
        latency_s=traffic.latency_s,
        pre_expert_s=float(traffic.pre_expert_s_L[0]),
    )


def simulated_even(load: EvenLoad, size: int) -> float:
    """Return the forward time of one level under even gating, with domains of `size`, seconds."""
    (level,) = load.levels
    relation = relation_GG(load.levels, (size,))
    chunk_bytes = load.data_bytes * size / level.size
    return _pass_s(
        np.where(relation == Relation.GATHER, load.sent_expert_bytes, 0.0),
        np.where(relation == Relation.EXCHANGE, chunk_bytes, 0.0),
        bandwidth_C=np.full(level.size, level.bandwidth),
        latency_s=level.latency_s,
        pre_expert_s=load.pre_expert_s,
    )
