"""What a mixed cluster does without zebra parallelism: EP, DistEP, EP(Ideal).

- EP: every device computes attention and experts, with equal shares of tokens and of experts (a fraction of
  an expert where they do not divide); each phase takes as long as on its slowest device. No overlap.
- EP(Ideal): as EP, but each phase is divided in proportion to the devices' speed at it, to any fraction. No
  real system reaches it; the exchanges are as exposed as in EP and go over all links together.
- DistEP: attention and experts on devices of their own, as in a zebra group, with equal blocks of experts on
  expert devices, but all tokens in one piece: while one side computes the other waits.

Shape letters: L MoE layers, E experts, D devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from placement._arrays import FloatArray
from placement.planning.hetero.assignment import GroupTimes
from placement.planning.hetero.device_class import DeviceClass
from placement.planning.hetero.group import ZebraGroup
from placement.planning.hetero.job import HeteroJob

__all__ = ["dist_ep_s", "ep_ideal_s", "ep_s"]


def _exposed(job: HeteroJob, bytes_per_link_s: float) -> float:
    """Return the seconds of all exchanges of a step, forward and backward, none hidden."""
    both = job.dispatch_latency_s + job.combine_latency_s + 2 * bytes_per_link_s
    return job.num_layers * both * (2 if job.backward else 1)


def _share_LD(job: HeteroJob, num_devices: int) -> FloatArray:
    """Return the part of each layer's load in equal blocks of experts, ``[layers, devices]``."""
    n = job.num_experts
    total_LE = np.concatenate([np.zeros((job.num_layers, 1)), np.cumsum(job.load_LE, axis=1)], axis=1) / n
    edge = np.linspace(0, n, num_devices + 1)
    return np.diff([np.interp(edge, np.arange(n + 1), total_E) for total_E in total_LE], axis=1)


def ep_s(classes: Sequence[DeviceClass], job: HeteroJob) -> float:
    """Return the seconds of a step under expert parallelism with uniform shares."""
    devices = [its for its in classes for _ in range(its.count)]
    D, tokens = len(devices), job.tokens_per_step
    expert_s_D = np.array([its.expert_s for its in devices])
    experts = float((tokens * _share_LD(job, D) * expert_s_D).max(axis=1).sum())
    attention = job.num_layers * tokens / D * max(its.attention_s for its in devices)
    head = tokens / D * max(its.head_s for its in devices)
    sent = tokens / D * job.token_bytes * (D - 1) / D / min(its.bandwidth for its in devices)
    return (attention + experts + head) * job.passes + _exposed(job, sent)


def ep_ideal_s(classes: Sequence[DeviceClass], job: HeteroJob) -> float:
    """Return the seconds of a step when every phase is divided perfectly by speed."""
    tokens, D = job.tokens_per_step, sum(its.count for its in classes)

    def together(seconds: Sequence[float]) -> float:
        return tokens / sum(its.count / s for its, s in zip(classes, seconds, strict=True))

    attention = job.num_layers * together([its.attention_s for its in classes])
    experts = job.num_layers * together([its.expert_s for its in classes])
    has_head = min(its.head_s for its in classes) > 0
    head = together([its.head_s for its in classes]) if has_head else 0.0
    sent = tokens * job.token_bytes * (D - 1) / D / sum(its.count * its.bandwidth for its in classes)
    return (attention + experts + head) * job.passes + _exposed(job, sent)


def dist_ep_s(group: ZebraGroup, job: HeteroJob) -> float:
    """Return the seconds of a step of attention and experts apart, one after the other."""
    times = GroupTimes(group=group, job=job, num_micro_batches=1)
    M, N = group.num_attention, group.num_expert_devices
    share_LD = _share_LD(job, N) * job.num_experts
    experts = [float(value) for value in (share_LD * times.unit_G[M:]).max(axis=1)]
    return times.stages([0.0] * job.num_layers, experts).lower_bound_s(1)
