"""Which devices are interchangeable, and how many placements of a layer differ by more than that.

Devices are put in an order in which every group of a link is a run of consecutive positions. Siblings are
parts of one larger part (devices of a node, nodes of a cluster) that cost alike whatever they hold. Of the
placements that differ by a permutation of siblings alone, one is enumerated: the one in which the lowest
experts of siblings ascend.

Shape letters: D devices, P positions (devices in this order), G groups, J links, H homes, A automorphisms.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.cost.links import Link
from placement.cost.model import CostModel
from placement.problem import Objective, PlacementProblem, Semantics

__all__ = ["NO_SIBLING", "Layout", "Part", "exchange_links", "homes_matter", "make_layout"]

IntArray = npt.NDArray[np.int64]

NO_SIBLING = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A device, or a group of devices that a link charges as one.

    Parameters
    ----------
    first, last
        Positions that it covers, both included.
    devices
        Devices at these positions.
    links
        Links of which it is a group.
    kind
        Parts of one kind cost alike whatever they hold.
    slots
        Experts that it holds.
    sibling
        First position of the interchangeable part before it, `NO_SIBLING` for none.
    """

    first: int
    last: int
    devices: tuple[int, ...]
    links: tuple[int, ...]
    kind: int
    slots: int
    sibling: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """The devices of a problem in the order in which placements are enumerated.

    Parameters
    ----------
    devices
        One part per position.
    groups
        Parts of several devices, in the order in which they are complete.
    opens_P
        Whether the lowest expert left must go to a position: it and all that follow are siblings.
    root
        The parts as a tree.
    """

    devices: tuple[Part, ...]
    groups: tuple[Part, ...]
    opens_P: npt.NDArray[np.bool_]
    root: _Node

    @property
    def device_P(self) -> IntArray:
        """Device at each position, ``[positions]``."""
        return np.array([part.devices[0] for part in self.devices], dtype=np.int64)

    @property
    def num_symmetries(self) -> int:
        """Permutations of devices that change no cost."""
        return self.root.num_symmetries()

    def num_labelled(self) -> int:
        """Ways to fill the slots of a layer, when every slot holds one expert."""
        ways = math.factorial(sum(part.slots for part in self.devices))
        for part in self.devices:
            ways //= math.factorial(part.slots)
        return ways

    def num_classes(self) -> float:
        """Placements of a layer up to symmetry."""
        return self.num_labelled() / self.num_symmetries

    def automorphisms_AP(self) -> IntArray:
        """Every rearrangement of positions that changes no cost, ``[automorphisms, positions]``."""
        return np.array(list(self.root.arrangements()), dtype=np.int64)


@dataclass(slots=True, eq=False)
class _Node:
    """A device or a group, with what it is made of."""

    devices: tuple[int, ...]
    key: Any
    links: tuple[int, ...]
    children: list[_Node] = field(default_factory=list)
    first: int = 0

    def place(self, first: int) -> None:
        """Give this node and all below it their first positions."""
        self.first = first
        for child in self.children:
            child.place(first)
            first += len(child.devices)

    def num_symmetries(self) -> int:
        """Rearrangements of equal children, here and below."""
        own = math.prod(math.factorial(n) for n in Counter(child.key for child in self.children).values())
        return own * math.prod(child.num_symmetries() for child in self.children)

    def arrangements(self) -> Iterator[tuple[int, ...]]:
        """Yield for each rearrangement the position whose contents every position takes."""
        if not self.children:
            yield (self.first,)
            return
        runs = [list(run) for _, run in itertools.groupby(self.children, key=lambda child: child.key)]
        orders = (itertools.chain(*order) for order in itertools.product(*map(itertools.permutations, runs)))
        for order in orders:
            for parts in itertools.product(*(child.arrangements() for child in order)):
                yield tuple(itertools.chain(*parts))


def exchange_links(model: CostModel) -> tuple[Link, ...]:
    """Return the links that price what a placement can change."""
    problem = model.problem
    priced = problem.objective is Objective.STEP_TIME and problem.semantics is not Semantics.ALLGATHER
    return model.links if priced else ()


def homes_matter(problem: PlacementProblem, links: tuple[Link, ...]) -> bool:
    """Whether it matters on which device a token lives."""
    if problem.profile.home_T is None or not links:
        return False
    # A stay-put token that lives where it goes enters nothing, whatever the links.
    known = problem.semantics is Semantics.STAY_PUT
    return known or any((link.enter_HG != link.enter_HG[0]).any() for link in links)


def make_layout(model: CostModel) -> Layout:
    """Order the devices of a problem and find those that are interchangeable."""
    problem = model.problem
    links = exchange_links(model)
    root = _tree(problem, links)
    root.place(0)
    kinds: dict[Any, int] = {}
    devices: list[Part] = []
    groups: list[Part] = []
    opens_P = np.zeros(problem.num_devices, dtype=bool)

    def visit(node: _Node, sibling: int, opens: bool) -> None:
        slots = int(problem.slots_D[list(node.devices)].sum())
        last = node.first + len(node.devices) - 1
        for index, child in enumerate(node.children):
            before = node.children[index - 1] if index else None
            alike = before is not None and before.key == child.key
            rest_alike = all(other.key == child.key for other in node.children[index:])
            lowest_here = opens if index == 0 else last == problem.num_devices - 1
            visit(child, before.first if alike and before else NO_SIBLING, rest_alike and lowest_here)
        part = Part(
            first=node.first,
            last=last,
            devices=node.devices,
            links=node.links,
            kind=kinds.setdefault(node.key, len(kinds)),
            slots=slots,
            sibling=sibling,
        )
        if not node.children:
            opens_P[node.first] = opens
            devices.append(part)
        elif node is not root:
            groups.append(part)

    visit(root, NO_SIBLING, True)
    return Layout(devices=tuple(devices), groups=tuple(groups), opens_P=opens_P, root=root)


def _tree(problem: PlacementProblem, links: tuple[Link, ...]) -> _Node:
    """Nest devices in the groups of links, and sort equal parts side by side."""
    num_devices = problem.num_devices
    by_home = homes_matter(problem, links)
    single = tuple(j for j, link in enumerate(links) if link.num_groups == num_devices)
    nodes = [_device(problem, links, single, device, by_home) for device in range(num_devices)]
    for group_D in _levels(links, num_devices):
        same = tuple(j for j, link in enumerate(links) if np.array_equal(link.group_D, group_D))
        nodes = [
            _group(
                [node for node in nodes if group_D[node.devices[0]] == group],
                same,
                # Where homes matter every group is its own kind.
                (int(group),) if by_home else tuple(float(links[j].enter_HG[0, group]) for j in same),
            )
            for group in np.unique(group_D)
        ]
    return _group(nodes, (), ())


def _levels(links: tuple[Link, ...], num_devices: int) -> list[IntArray]:
    """Groupings of devices coarser than single ones, innermost first, each once."""
    levels: list[IntArray] = []
    for link in links:
        known = any(np.array_equal(link.group_D, group_D) for group_D in levels)
        if link.num_groups < num_devices and not known:
            levels.append(link.group_D)
    return levels


def _device(
    problem: PlacementProblem, links: tuple[Link, ...], single: tuple[int, ...], device: int, by_home: bool
) -> _Node:
    charge = tuple(float(links[j].enter_HG[0, links[j].group_D[device]]) for j in single)
    kind = int(problem.topology.kind_of_device_D[device])
    # A balance or a count of tokens is the same on every kind of device.
    timed = problem.objective is Objective.STEP_TIME
    key = (int(problem.slots_D[device]), kind if timed else 0, charge, device if by_home else -1)
    return _Node(devices=(device,), key=key, links=single)


def _group(children: list[_Node], links: tuple[int, ...], charge: tuple[float, ...]) -> _Node:
    children = sorted(children, key=lambda child: (repr(child.key), child.devices))
    devices = tuple(itertools.chain(*(child.devices for child in children)))
    key = (charge, links, tuple(child.key for child in children))
    return _Node(devices=devices, key=key, links=links, children=children)
