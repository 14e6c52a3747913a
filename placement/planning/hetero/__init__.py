"""Which devices of a mixed cluster compute attention, and which experts: zebra parallelism.

After HeterMoE (arXiv 2504.03871), with any number of devices on either side, uneven loads and limited memory.
"""

from __future__ import annotations

from placement.planning.hetero.asymmetric import AsymmetricOffload, asymmetric_offload
from placement.planning.hetero.baselines import dist_ep_s, ep_ideal_s, ep_s
from placement.planning.hetero.device_class import NO_FLASH_PENALTY, DeviceClass, class_from_sheet
from placement.planning.hetero.group import ZebraGroup, all_groups
from placement.planning.hetero.job import HeteroJob
from placement.planning.hetero.plan import Contender, HeteroPlan, plan_hetero
from placement.planning.hetero.topology import group_topology, placement_of, topology_of
from placement.planning.hetero.zebra import Event, Schedule, Stages, layer_stages, simulate

__all__ = [
    "NO_FLASH_PENALTY",
    "AsymmetricOffload",
    "Contender",
    "DeviceClass",
    "Event",
    "HeteroJob",
    "HeteroPlan",
    "Schedule",
    "Stages",
    "ZebraGroup",
    "all_groups",
    "asymmetric_offload",
    "class_from_sheet",
    "dist_ep_s",
    "ep_ideal_s",
    "ep_s",
    "group_topology",
    "layer_stages",
    "placement_of",
    "plan_hetero",
    "simulate",
    "topology_of",
]
