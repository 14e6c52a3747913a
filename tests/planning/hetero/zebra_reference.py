"""A slow, plain simulator of zebra parallelism: repeats until nothing changes, knows no order of placing."""

from __future__ import annotations

import itertools

from placement.planning.hetero import Stages


def reference_makespan(stages: Stages, R: int, lag: int) -> float:
    """Return the makespan as the longest path: every task waits for its inputs and its stream's last task."""
    S = len(stages.attention_S)
    length: dict[tuple[str, int, int], float] = {}
    for j in range(R):
        for s in range(S):
            length["A", s, j] = stages.attention_S[s]
            length["D", s, j] = stages.dispatch_S[s]
            length["E", s, j] = stages.experts_S[s]
            length["C", s, j] = stages.combine_S[s]
            if stages.own_experts_S[s]:
                length["X", s, j] = stages.own_experts_S[s]
        length["A", S, j] = stages.final_s
    attention = [("A", s, j) for s in range(S + 1) for j in range(R)]
    order = []
    for place, task in enumerate(attention):
        order.append(task)
        if place >= lag and place - lag < S * R:
            order.append(("X", *divmod(place - lag, R)))
    streams = [[task for task in order if task in length]]
    streams += [[(kind, s, j) for s in range(S) for j in range(R)] for kind in "DEC"]
    before: dict[tuple[str, int, int], list[tuple[str, int, int]]] = {task: [] for task in length}
    for stream in streams:
        for first, then in itertools.pairwise(stream):
            before[then].append(first)
    for kind, s, j in length:
        inputs = {
            "A": [("C", s - 1, j)],
            "D": [("A", s, j)],
            "X": [("D", s, j)],
            "E": [("D", s, j)],
            "C": [("E", s, j), ("X", s, j)],
        }[kind]
        before[kind, s, j] += [task for task in inputs if task in length]
    end = dict.fromkeys(length, 0.0)
    changed = True
    while changed:
        changed = False
        for task, needs in before.items():
            value = max((end[need] for need in needs), default=0.0) + length[task]
            if value > end[task] + 1e-12:
                end[task], changed = value, True
    return max(end.values())
