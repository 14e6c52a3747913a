"""A zebra group: devices for attention and devices for experts that share micro-batches.

Shape letters: G devices of a group, attention devices first; M and N in texts are their numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from placement._arrays import FloatArray, IntArray
from placement.errors import InputError
from placement.planning.hetero.device_class import DeviceClass
from placement.planning.hetero.job import HeteroJob

__all__ = ["ZebraGroup", "all_groups"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ZebraGroup:
    """One group, and how many like it share the cluster.

    Parameters
    ----------
    classes
        Classes of device.
    attention, experts
        Devices of each class in this group for either role, as long as `classes`. Attention devices may
        hold experts as well.
    num_groups
        Groups alike; each holds the whole model and takes an equal part of the step's tokens.

    Raises
    ------
    InputError
        If a role has no device or a class too few.
    """

    classes: tuple[DeviceClass, ...]
    attention: tuple[int, ...]
    experts: tuple[int, ...]
    num_groups: int = 1

    def __post_init__(self) -> None:
        if not len(self.classes) == len(self.attention) == len(self.experts):
            raise InputError(f"{len(self.classes)} classes need as many counts of devices for each role")
        if self.num_groups < 1:
            raise InputError(f"{self.num_groups} groups; there must be 1 or more")
        if min(*self.attention, *self.experts) < 0 or not sum(self.attention) or not sum(self.experts):
            raise InputError(
                f"attention on {self.attention} and experts on {self.experts} devices of the classes; "
                "each role needs a device"
            )
        for its, a, e in zip(self.classes, self.attention, self.experts, strict=True):
            if (a + e) * self.num_groups > its.count:
                raise InputError(
                    f"{self.num_groups} groups with {a} + {e} devices of {its.name!r} need "
                    f"{(a + e) * self.num_groups}; there are {its.count}"
                )

    @property
    def num_attention(self) -> int:
        """Attention devices, M."""
        return sum(self.attention)

    @property
    def num_expert_devices(self) -> int:
        """Expert devices, N."""
        return sum(self.experts)

    @property
    def num_devices(self) -> int:
        """Devices of one group."""
        return self.num_attention + self.num_expert_devices

    @property
    def whole_classes(self) -> bool:
        """Whether either side is of one class, and no class plays both roles, as in HeterMoE."""
        one = sum(map(bool, self.attention)) == sum(map(bool, self.experts)) == 1
        return one and not any(a and e for a, e in zip(self.attention, self.experts, strict=True))

    @cached_property
    def class_of_device_G(self) -> IntArray:
        """Class of each device, ``[devices]``, attention devices first."""
        numbers = np.arange(len(self.classes))
        sides = [np.repeat(numbers, self.attention), np.repeat(numbers, self.experts)]
        return np.concatenate(sides).astype(np.int64)

    @property
    def attends_G(self) -> IntArray:
        """1 for each attention device, else 0, ``[devices]``."""
        return (np.arange(self.num_devices) < self.num_attention).astype(np.int64)

    @cached_property
    def expert_s_G(self) -> FloatArray:
        """Seconds per token of a layer's experts on each device alone, ``[devices]``."""
        return np.array([its.expert_s for its in self.classes])[self.class_of_device_G]

    def attention_time_s(self, *, head: bool = False) -> float:
        """Return seconds per token of one layer's attention (or the head), shared in proportion to speed."""
        parts = [(its, count) for its, count in zip(self.classes, self.attention, strict=True) if count]
        speed = sum(count / its.attention_s for its, count in parts)
        # Tokens stay where their attention was: of the head the slowest share decides.
        return max(its.head_s / its.attention_s for its, _ in parts) / speed if head else 1.0 / speed

    def exchange_s(self, job: HeteroJob, *, tokens: float) -> float:
        """Return seconds that one micro-batch's bytes take: the slower side's links."""
        sides = (self.attention, self.experts)
        link = min(
            sum(side) * min(its.bandwidth for its, count in zip(self.classes, side, strict=True) if count)
            for side in sides
        )
        return tokens * job.token_bytes / link

    def room_G(self, job: HeteroJob) -> IntArray:
        """Return how many experts, counted over all layers, fit on each device, ``[devices]``."""
        total = job.num_layers * job.num_experts
        used = np.where(self.attends_G, job.attention_bytes, job.activation_bytes)
        memory = np.array([its.memory_bytes for its in self.classes])[self.class_of_device_G]
        free = memory - used
        if job.expert_bytes:
            free = np.clip(free // job.expert_bytes, 0, total)
        else:
            free = np.where(free >= 0, total, 0)
        return np.asarray(free, dtype=np.int64)

    def attention_fits(self, job: HeteroJob) -> bool:
        """Whether every device holds what its role needs beside experts."""
        used = np.where(self.attends_G, job.attention_bytes, job.activation_bytes)
        memory = np.array([its.memory_bytes for its in self.classes])[self.class_of_device_G]
        return bool((memory >= used).all())

    def text(self) -> str:
        """Return the roles in words."""

        def side(counts: Sequence[int]) -> str:
            return " + ".join(f"{n} {its.name}" for its, n in zip(self.classes, counts, strict=True) if n)

        groups = "1 group" if self.num_groups == 1 else f"{self.num_groups} groups"
        return f"{groups}: attention on {side(self.attention)}, experts on {side(self.experts)}"


def all_groups(classes: Sequence[DeviceClass]) -> Iterator[ZebraGroup]:
    """Yield every way to give all devices roles in equal groups."""
    common = math.gcd(*(its.count for its in classes))
    for groups in (g for g in range(1, common + 1) if common % g == 0):
        each = [its.count // groups for its in classes]
        for attention in itertools.product(*(range(count + 1) for count in each)):
            experts = tuple(count - a for count, a in zip(each, attention, strict=True))
            if sum(attention) and sum(experts):
                yield ZebraGroup(
                    classes=tuple(classes), attention=attention, experts=experts, num_groups=groups
                )
