r"""HybridEP's model of a step under even gating: experts travel inside a domain, tokens between domains.

One level (arXiv 2510.19470): G devices, each with D bytes of tokens for the experts of all and ``P_E`` bytes
of experts of its own, links of B bytes/s. In domains of S devices each gathers its domain's experts,
``V_AG = P_E (S - 1) / CR``, and sends tokens only to its counterpart in every other domain,
``V_A2A = D (G - S) / G``. Gathering is a prefetch that overlaps the pre-expert computation; experts are not
sent back, tokens are; expert computation is hidden whole. So

    T(S) = max(Lat_PE, V_AG / B) + 2 V_A2A / B.

Several levels (our derivation): a device holds the experts of all devices that share its domain at every
level. They are gathered from the outermost level inwards, so that only a device's own counterparts cross
the slowest links and what arrived is passed on inside:

    V_AG^l = P_E / CR (S^l - 1) prod_{i<l} S^i,   which sums to P_E / CR (prod S - 1).

A token moves at level l if its expert's domain there is another one, whatever the other levels say:
``V_A2A^l = D (SF^l - S^l) / SF^l``. Every level has links of its own, but what level l + 1 passes on must
have arrived over level l, so the times of the levels add up, for experts and for tokens alike. A message
costs its level's latency: ``S^l - 1`` per gather, ``SF^l / S^l - 1`` per exchange and direction.

Training adds a backward pass: tokens' gradients take the ways of the tokens, experts' gradients the way
back of the experts, and the pre-expert computation takes twice its forward time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from placement.errors import InputError
from placement.planning.cross_dc.level import Level, divisors, num_devices

__all__ = ["BACKWARD_WORK", "EvenLoad", "EvenTimes", "best_sizes", "even_times", "pass_weights", "size_curve"]

BACKWARD_WORK = 2.0
"""Work of a backward pass relative to the forward pass: two products per weight instead of one."""


def pass_weights(training: bool) -> tuple[float, ...]:
    """Return the pre-expert work of each pass, relative to the forward pass."""
    return (1.0, BACKWARD_WORK) if training else (1.0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenLoad:
    """One MoE layer under even gating.

    Parameters
    ----------
    levels
        Network, outermost level first.
    data_bytes
        Token bytes that each device hands to the exchange (the paper's D), in one direction.
    expert_bytes
        Bytes of the experts that live on each device (the paper's ``P_E``).
    pre_expert_s
        Forward computation before the experts (``Lat_PE``), seconds.
    compression
        Ratio by which experts shrink before they travel (``CR``), 1 or more.
    training
        Whether a backward pass follows.
    replica_bytes
        Memory for gathered experts on each device; None for no limit.

    Raises
    ------
    InputError
        If a figure is out of range.
    """

    levels: tuple[Level, ...]
    data_bytes: float
    expert_bytes: float
    pre_expert_s: float
    compression: float = 1.0
    training: bool = False
    replica_bytes: float | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise InputError("a cluster needs a level")
        for name in ("data_bytes", "expert_bytes", "pre_expert_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 1 <= self.compression < math.inf:
            raise InputError(f"compression is {self.compression}; it must be 1 or more")
        if self.replica_bytes is not None and not self.replica_bytes >= 0:
            raise InputError(f"replica_bytes is {self.replica_bytes}; it must be 0 or more")

    @property
    def num_devices(self) -> int:
        """Devices of all levels."""
        return num_devices(self.levels)

    @property
    def sent_expert_bytes(self) -> float:
        """Bytes of one device's experts as they travel."""
        return self.expert_bytes / self.compression

    def fits(self, num_held: int) -> bool:
        """Return whether a device has room for the experts of `num_held` devices, its own among them."""
        return self.replica_bytes is None or (num_held - 1) * self.expert_bytes <= self.replica_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenTimes:
    """What one layer takes with domains of some sizes.

    Parameters
    ----------
    sizes
        Devices of a domain at each level (``S_ED``).
    gather_s, exchange_s
        Time of one gather of experts and of one exchange of tokens at each level, seconds.
    step_s
        Time of the layer, all passes, seconds.
    exposed_gather_s
        Part of it that gathering adds to the pre-expert computation.
    """

    sizes: tuple[int, ...]
    gather_s: tuple[float, ...]
    exchange_s: tuple[float, ...]
    step_s: float
    exposed_gather_s: float


def even_times(load: EvenLoad, sizes: tuple[int, ...]) -> EvenTimes:
    """Return the times with domains of given sizes, one per level.

    Raises
    ------
    InputError
        If a size does not divide its level.
    """
    if len(sizes) != len(load.levels):
        raise InputError(f"{len(sizes)} domain sizes for {len(load.levels)} levels")
    gather_s, exchange_s, held = [], [], 1
    for level, size in zip(load.levels, sizes, strict=True):
        if size < 1 or level.size % size:
            raise InputError(
                f"level {level.name!r}: domains of {size} do not fill {level.size} members; "
                f"choose one of {', '.join(map(str, divisors(level.size)))}"
            )
        gather_s.append(_gather_s(load, level, size, held))
        exchange_s.append(_exchange_s(load, level, size))
        held *= size
    exposed = _exposed_s(load, sum(gather_s))
    return EvenTimes(
        sizes=sizes,
        gather_s=tuple(gather_s),
        exchange_s=tuple(exchange_s),
        step_s=_step_s(load, sum(gather_s), sum(exchange_s)),
        exposed_gather_s=exposed,
    )


def _gather_s(load: EvenLoad, level: Level, size: int, held: int) -> float:
    return load.sent_expert_bytes * (size - 1) * held / level.bandwidth + level.latency_s * (size - 1)


def _exchange_s(load: EvenLoad, level: Level, size: int) -> float:
    moved = load.data_bytes * (level.size - size) / level.size
    return moved / level.bandwidth + level.latency_s * (level.size // size - 1)


def _exposed_s(load: EvenLoad, gather_s: float) -> float:
    return sum(max(0.0, gather_s - weight * load.pre_expert_s) for weight in pass_weights(load.training))


def _step_s(load: EvenLoad, gather_s: float, exchange_s: float) -> float:
    weights = pass_weights(load.training)
    waited = sum(max(weight * load.pre_expert_s, gather_s) for weight in weights)
    return waited + 2 * len(weights) * exchange_s


def best_sizes(load: EvenLoad) -> EvenTimes:
    """Return the fastest sizes within memory, over all combinations of divisors; ties go to small domains.

    Every combination is looked at, or belongs to a branch whose outer levels alone take longer than the
    best known: gathers and exchanges only grow with further levels.
    """
    found = _descend(load, (), 1, 0.0, 0.0, None)
    assert found is not None
    return even_times(load, found[1])


def _descend(
    load: EvenLoad,
    sizes: tuple[int, ...],
    held: int,
    gather_s: float,
    exchange_s: float,
    best: tuple[float, tuple[int, ...]] | None,
) -> tuple[float, tuple[int, ...]] | None:
    step_s = _step_s(load, gather_s, exchange_s)
    if best is not None and step_s >= best[0]:
        return best
    if len(sizes) == len(load.levels):
        return step_s, sizes
    level = load.levels[len(sizes)]
    for size in divisors(level.size):
        if not load.fits(held * size):
            break
        gathered_s = gather_s + _gather_s(load, level, size, held)
        exchanged_s = exchange_s + _exchange_s(load, level, size)
        best = _descend(load, (*sizes, size), held * size, gathered_s, exchanged_s, best)
    return best


def size_curve(load: EvenLoad, sizes: tuple[int, ...], *, level: int) -> tuple[EvenTimes, ...]:
    """Return the times over all sizes of one level, the others as given and memory aside."""
    unlimited = replace(load, replica_bytes=None)
    return tuple(
        even_times(unlimited, (*sizes[:level], size, *sizes[level + 1 :]))
        for size in divisors(load.levels[level].size)
    )
