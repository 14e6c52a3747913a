"""Experts or tokens: what travels over slow links between data centres.

HybridEP (arXiv 2510.19470) with its exact optimum, and an integer program per data centre and expert for real
routing.
"""

from placement.planning.cross_dc.closed_form import (
    BestShare,
    best_share,
    break_even_tokens,
    share_of_size,
    time_of_share,
)
from placement.planning.cross_dc.distinct import distinct_use
from placement.planning.cross_dc.even import EvenLoad, EvenTimes, best_sizes, even_times
from placement.planning.cross_dc.homes import choose_homes
from placement.planning.cross_dc.level import Level, levels_of, location
from placement.planning.cross_dc.plan import CrossDcPlan, Policy, RoutedPlan, plan_cross_dc, plan_routed
from placement.planning.cross_dc.relation import Relation, message_counts, relation, relation_GG
from placement.planning.cross_dc.scale import scale_curve
from placement.planning.cross_dc.schedule import simulated_even, simulated_layer
from placement.planning.cross_dc.solve import CrossSolution, Effort, solve_cross
from placement.planning.cross_dc.traffic import (
    CrossTraffic,
    Decision,
    link_use,
    stay_home,
    step_time,
    time_LC,
)
from placement.planning.cross_dc.uniform import best_uniform, contiguous_homes, uniform_decision

__all__ = [
    "BestShare",
    "CrossDcPlan",
    "CrossSolution",
    "CrossTraffic",
    "Decision",
    "Effort",
    "EvenLoad",
    "EvenTimes",
    "Level",
    "Policy",
    "Relation",
    "RoutedPlan",
    "best_share",
    "best_sizes",
    "best_uniform",
    "break_even_tokens",
    "choose_homes",
    "contiguous_homes",
    "distinct_use",
    "even_times",
    "levels_of",
    "link_use",
    "location",
    "message_counts",
    "plan_cross_dc",
    "plan_routed",
    "relation",
    "relation_GG",
    "scale_curve",
    "share_of_size",
    "simulated_even",
    "simulated_layer",
    "solve_cross",
    "stay_home",
    "step_time",
    "time_LC",
    "time_of_share",
    "uniform_decision",
]
