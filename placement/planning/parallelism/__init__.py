"""Which mesh of pipeline, expert, tensor and data parallelism trains a model fastest.

After Piper (arXiv 2605.05049): a model of memory, compute and communication rejects what does not fit and
ranks the rest by predicted utilisation; then the experts of each stage are placed for the loads that real
routing has.
"""

from placement.planning.parallelism.job import StateBytes, TrainingJob
from placement.planning.parallelism.plan import ParallelismPlan, PlacedExperts, RankedStrategy
from placement.planning.parallelism.planner import plan_parallelism
from placement.planning.parallelism.question import ExpertTraffic, ParallelismQuestion
from placement.planning.parallelism.search import Candidate, Reason, Rejection, SearchRanges
from placement.planning.parallelism.strategy import Checkpointing, Exchange, Mesh, Strategy

__all__ = [
    "Candidate",
    "Checkpointing",
    "Exchange",
    "ExpertTraffic",
    "Mesh",
    "ParallelismPlan",
    "ParallelismQuestion",
    "PlacedExperts",
    "RankedStrategy",
    "Reason",
    "Rejection",
    "SearchRanges",
    "StateBytes",
    "Strategy",
    "TrainingJob",
    "plan_parallelism",
]
