"""Experts by placement, the rest by DDP or FSDP2: the same training as one process with all the tokens."""

from __future__ import annotations

from collections.abc import Callable

import data_parallel_checks as checks
import numpy as np
import pytest
from loading_checks import EXPERTS
from ranks import Ranks

from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.runtime.parallel.data_parallel import ignored_parameters, wrap_ddp
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import expert_parallel

TOLERANCE = 1e-5

PLACEMENT = Placement(
    physical_to_logical_map_LS=np.array([[0, 5, 2, 3, 1, 4, 5, EMPTY, 0], [4, 1, 2, 3, 0, 5, 1, 3, EMPTY]]),
    device_of_slot_S=np.array([0, 0, 0, 1, 1, 1, 1, 0, 1]),
    num_experts=EXPERTS,
    num_devices=2,
)
"""Uneven devices, replicas, empty slots."""


@pytest.mark.parametrize(
    ("family", "how"), [("mixtral", "ddp"), ("gpt_oss", "ddp"), ("mixtral", "fsdp"), ("qwen2_moe", "fsdp")]
)
def test_training_equals_that_of_one_process(family: str, how: str, group_of: Callable[[int], Ranks]) -> None:
    """Losses, norms and parameters after three clipped steps; replicas stay the same to the last bit."""
    for found in group_of(2).run(checks.train, family, PLACEMENT, how):
        assert found.pop("clipped steps") >= 1
        assert found.pop("replicas") == 0.0
        assert {name: by for name, by in found.items() if not by <= TOLERANCE} == {}
        assert len(found) > 10


def test_another_process_group_is_refused(group_of: Callable[[int], Ranks]) -> None:
    """Experts and the rest have to be on the same ranks."""
    outcomes = group_of(2).outcomes(checks.refuse_another_group, "mixtral", PLACEMENT)
    assert [isinstance(one, InputError) for one in outcomes] == [True, True]
    assert "leave out process_group" in str(outcomes[0])


def test_one_rank_needs_no_wrapper() -> None:
    """Without a process group the model is what to run, and all its experts are ignored by FSDP."""
    placement = Placement(
        physical_to_logical_map_LS=np.tile(np.arange(EXPERTS), (2, 1)),
        device_of_slot_S=np.zeros(EXPERTS, dtype=np.int64),
        num_experts=EXPERTS,
        num_devices=1,
    )
    parallel = expert_parallel(checks.build("mixtral"), placement, Mesh.single())
    assert wrap_ddp(parallel) is parallel.model
    assert ignored_parameters(parallel) == {
        one for name, one in parallel.model.named_parameters() if ".experts." in name
    }
