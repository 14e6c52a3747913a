"""Which process of a job this is, and which run it belongs to: read from what launchers set.

torchrun, Kubeflow (``PET_*``), SkyPilot, SLURM, Open MPI, PMI and indexed Kubernetes jobs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from placement.errors import InputError

__all__ = ["local_rank_of", "rank_of", "run_id", "run_key", "world_size_of"]

_RANK = (
    "RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "SLURM_PROCID",
    "PET_NODE_RANK",
    "SKYPILOT_NODE_RANK",
    "JOB_COMPLETION_INDEX",
)
"""Innermost first: torchrun under SLURM numbers its own processes."""

_WORLD_SIZE = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_NTASKS",
    "PET_NNODES",
    "SKYPILOT_NUM_NODES",
)

_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")

_RUN = ("TORCHELASTIC_RUN_ID", "PET_RDZV_ID", "SKYPILOT_TASK_ID", "SLURM_JOB_ID")
_ATTEMPT = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "MASTER_PORT")
"""What differs between two starts under one id; torchrun takes another port each time."""

_NO_RUN = frozenset({"", "none"})
"""torchrun's run id where nobody gave one."""


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process; 0 where no launcher says otherwise.

    Raises
    ------
    InputError
        If a launcher's variable holds no number.
    """
    return _number(environment, _RANK, default=0)


def local_rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process on its machine; its rank where no launcher says.

    Raises
    ------
    InputError
        If a launcher's variable holds no number.
    """
    return _number(environment, _LOCAL_RANK, default=rank_of(environment))


def world_size_of(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes the job has; 1 where no launcher says otherwise.

    Raises
    ------
    InputError
        If a launcher's variable holds no number.
    """
    return _number(environment, _WORLD_SIZE, default=1)


def run_id(environment: Mapping[str, str] = os.environ, *, attempt: bool = False) -> str | None:
    """Return the id of the run, None where no launcher gives one.

    Parameters
    ----------
    attempt
        With what tells this start from others, so that what one left behind is not taken by the next.
    """
    for name in _RUN:
        value = environment.get(name, "")
        if value not in _NO_RUN:
            found = f"{name.partition('_')[0].lower()}-{value}"
            counts = [environment[name] for name in _ATTEMPT if environment.get(name)] if attempt else []
            return "-".join([_plain(found), *map(_plain, counts)])
    return None


def run_key(request: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> str | None:
    """Return an idempotency key of this run for a request, None outside of a run.

    A job that is started again submits the same solve again, and is given the one that runs already; another
    request of the same run has another key.
    """
    run = run_id(environment)
    if run is None:
        return None
    text = json.dumps(request, sort_keys=True, default=str)
    return f"{run}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _number(environment: Mapping[str, str], names: tuple[str, ...], *, default: int) -> int:
    for name in names:
        value = environment.get(name, "")
        if value and not (value.isascii() and value.isdecimal()):
            if name == "PET_NNODES" and re.fullmatch(r"\d+:\d+", value):
                # Elastic: as many as there may be.
                return int(value.rpartition(":")[2])
            raise InputError(f"{name} is {value[:40]!r}, not a number; which launcher set it?")
        if value:
            return int(value)
    return default


def _plain(text: str) -> str:
    """Return a text as it may stand in a file's name and in a header."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", text)
    # Cut names must not meet.
    return plain if len(plain) <= 80 else f"{plain[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
