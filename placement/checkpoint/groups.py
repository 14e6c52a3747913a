"""Routers that choose among groups of experts first, and which permutations leave their choices alone.

DeepSeek-V2 and V3, Kimi, GLM and others split the experts into groups of consecutive numbers, keep the best
groups for a token and then choose experts within those. Whole groups may change places and experts may change
places within a group; an expert that left its group would be chosen on other conditions.
"""

from __future__ import annotations

import numpy as np

from placement.checkpoint.config import ModelFacts
from placement.errors import InputError
from placement.formats.permutation import Permutation

__all__ = ["check_groups", "solve_advice"]


def check_groups(permutation: Permutation, facts: ModelFacts) -> None:
    """Check that groups of experts stay whole where the router chooses among them.

    Raises
    ------
    InputError
        If an expert would change its group, naming it and a way to a placement that keeps groups whole.
    """
    if not facts.limits_groups:
        return
    num_groups = facts.num_groups
    layer = permutation.split_layer(num_groups)
    if layer is None:
        return
    size = permutation.num_experts // num_groups
    old_GM = permutation.row(layer).reshape(num_groups, size)
    group_GM = old_GM // size
    split = int(np.argmax((group_GM != group_GM[:, :1]).any(axis=1)))
    home = int(np.bincount(group_GM[split]).argmax())
    stranger = int(old_GM[split][group_GM[split] != home][0])
    raise InputError(
        f"decoder layer {layer}: expert {stranger} of group {stranger // size} would join experts of group "
        f"{home}, and the router first chooses among {num_groups} groups, so the model would change; "
        f"{solve_advice(num_groups, permutation.num_devices)}"
    )


def solve_advice(num_groups: int, num_devices: int) -> str:
    """Say how to get a placement whose contiguous shards keep groups whole.

    EPLB puts whole groups on nodes. With as many nodes as groups, or one device per node where devices are
    fewer, contiguous shards then hold whole groups, or lie within one.
    """
    if num_devices > 1 and num_devices % num_groups and num_groups % num_devices:
        return f"use a number of devices that divides {num_groups} groups or is a multiple of them"
    if num_devices == 1:
        return f"solve with --solver eplb, --model and {num_groups} nodes (-t KIND:{num_groups}xDEVICES)"
    nodes = min(num_groups, num_devices)
    return f"solve with --solver eplb, --model and -t KIND:{nodes}x{num_devices // nodes}"
