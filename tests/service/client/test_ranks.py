"""What launchers say about a process, read as they say it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InputError
from service.client.ranks import rank_of, run_id, run_key, world_size_of

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_RUN_ID": "exp-1",
    "TORCHELASTIC_RESTART_COUNT": "3",
}
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "1"}
KUBEFLOW = {"PET_NODE_RANK": "1", "PET_NNODES": "2", "PET_RDZV_ID": "pytorchjob-x"}
SKYPILOT = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "3", "SKYPILOT_TASK_ID": "sky-2026-01_x-1"}


@pytest.mark.parametrize(
    ("environment", "rank", "size", "run", "start"),
    [
        (TORCHRUN, 5, 8, "torchelastic-exp-1", "torchelastic-exp-1-3-29501"),
        (SRUN, 2, 4, "slurm-4711", "slurm-4711-1"),
        (KUBEFLOW, 1, 2, "pet-pytorchjob-x", "pet-pytorchjob-x"),
        (SKYPILOT, 0, 3, "skypilot-sky-2026-01_x-1", "skypilot-sky-2026-01_x-1"),
        (SRUN | TORCHRUN, 5, 8, "torchelastic-exp-1", "torchelastic-exp-1-3-1-29501"),
        ({"PET_NNODES": "1:4"}, 0, 4, None, None),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, 3, 4, None, None),
        ({}, 0, 1, None, None),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": ""}, 0, 1, None, None),
    ],
)
def test_launchers(
    environment: dict[str, str], rank: int, size: int, run: str | None, start: str | None
) -> None:
    """Rank, number of processes, id of the run and of its present start."""
    assert rank_of(environment) == rank
    assert world_size_of(environment) == size
    assert run_id(environment) == run
    assert run_id(environment, attempt=True) == start


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "٣"])
def test_what_is_no_number_is_refused(value: str) -> None:
    """A rank that cannot be read would make two rank 0."""
    with pytest.raises(InputError, match="RANK"):
        rank_of({"RANK": value})


def test_keys_are_of_run_and_request() -> None:
    """The same run asks for the same thing under the same key, whatever restarts; others under others."""
    request = {"trace_id": "sha256:0", "options": {"seed": 1}}
    key = run_key(request, TORCHRUN)
    assert key == run_key(dict(reversed(request.items())), TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "4"})
    assert key != run_key(request | {"options": {"seed": 2}}, TORCHRUN)
    assert key != run_key(request, SRUN)
    assert run_key(request, {}) is None


@given(value=st.text(min_size=1).filter(lambda text: text != "none"))
def test_any_id_is_made_plain(value: str) -> None:
    """An id may hold anything: what comes of it can be a file's name and a header."""
    found = run_id({"SLURM_JOB_ID": value})
    assert found is not None
    assert len(found) <= 100
    assert all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in found)
