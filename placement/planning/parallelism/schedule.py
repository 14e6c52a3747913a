"""How long a pipeline takes: 1F1B, and its interleaved form."""

from __future__ import annotations

from placement.errors import InputError

__all__ = ["bubble_share", "pipeline_s"]


def pipeline_s(
    slowest_stage_s: float, *, pipeline: int, num_micro_batches: int, virtual_stages: int = 1
) -> float:
    """Return the seconds of a step: ``(M + (PP - 1) / v)`` times a micro-batch of the slowest stage.

    With v = 1 this is 1F1B's ``(M + PP - 1) max_stage``; v virtual stages shorten the idle ends v times
    (arXiv 2104.04473, section 2.2). It is exact for equal stages and too long otherwise, since the ends run
    at the speed of their own stages.

    Parameters
    ----------
    slowest_stage_s
        Forward and backward pass of one micro-batch through all layers of the slowest stage.

    Raises
    ------
    InputError
        If the micro-batches do not come in whole rounds of the stages and the schedule is interleaved.
    """
    if virtual_stages > 1 and num_micro_batches % pipeline:
        raise InputError(
            f"{num_micro_batches} micro-batches are no multiple of {pipeline} stages, which the interleaved "
            "schedule needs"
        )
    return (num_micro_batches + (pipeline - 1) / virtual_stages) * slowest_stage_s


def bubble_share(*, pipeline: int, num_micro_batches: int, virtual_stages: int = 1) -> float:
    """Return idle over busy time of a pipeline of equal stages: ``(PP - 1) / (v M)``."""
    return (pipeline - 1) / (virtual_stages * num_micro_batches)
