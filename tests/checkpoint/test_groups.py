"""Group-limited routers: which permutations leave the model as it is, and how to get one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensor_files import permutation, write_checkpoint

from placement.checkpoint import permute_checkpoint
from placement.checkpoint.config import ModelFacts, read_facts
from placement.checkpoint.groups import check_groups, solve_advice
from placement.errors import InputError

TWO_OF_FOUR = ModelFacts(num_groups=4, top_groups=2)


def chosen(score_TE: npt.NDArray[Any], *, num_groups: int, top_groups: int, top_k: int) -> npt.NDArray[Any]:
    """Route as DeepSeek-V3 does: groups by the sum of their two best scores, then experts within them."""
    score_TGM = score_TE.reshape(len(score_TE), num_groups, -1)
    best_TG = np.sort(score_TGM, axis=2)[:, :, -2:].sum(axis=2)
    group_TC = np.argsort(-best_TG, axis=1)[:, :top_groups]
    allowed_TG = np.zeros(best_TG.shape, bool)
    np.put_along_axis(allowed_TG, group_TC, True, axis=1)
    masked_TE = np.where(allowed_TG[:, :, None], score_TGM, -np.inf).reshape(score_TE.shape)
    return np.asarray(np.argsort(-masked_TE, axis=1)[:, :top_k])


@given(order=st.permutations(range(12)), groups=st.permutations(range(4)), seed=st.integers(0, 99))
def test_exactly_the_permutations_that_keep_groups_leave_the_choice(
    order: list[int], groups: list[int], seed: int
) -> None:
    """What is accepted routes the same on random scores; what is refused routes some token otherwise."""
    score_TE = np.random.default_rng(seed).random((400, 12))
    shape = {"num_groups": 4, "top_groups": 2, "top_k": 3}
    inside = np.argsort(np.argsort(np.array(order).reshape(4, 3), axis=1), axis=1)
    whole = (np.array(groups)[:, None] * 3 + inside).reshape(-1)
    for old_E in (np.array(order), whole):
        same = np.array_equal(
            np.sort(old_E[chosen(score_TE[:, old_E], **shape)], axis=1),
            np.sort(chosen(score_TE, **shape), axis=1),
        )
        try:
            check_groups(permutation(old_E.tolist()), TWO_OF_FOUR)
            accepted = True
        except InputError:
            accepted = False
        assert accepted == same
    check_groups(permutation(whole.tolist()), TWO_OF_FOUR)


def test_the_refusal_names_the_expert_and_the_way_out() -> None:
    """Which expert would join which group, and what to solve with."""
    old = [0, 1, 3, 2, 4, 5, 6, 7]
    with pytest.raises(InputError) as caught:
        check_groups(
            permutation(list(range(8)), [4, 5, 1, 7, 0, 6, 2, 3], layers=[3, 5], num_devices=4),
            ModelFacts(num_groups=2, top_groups=1),
        )
    assert str(caught.value) == (
        "decoder layer 5: expert 1 of group 0 would join experts of group 1, and the router first chooses "
        "among 2 groups, so the model would change; solve with --solver eplb, --model and -t KIND:2x2"
    )
    check_groups(permutation(old), ModelFacts(num_groups=4, top_groups=1))


@pytest.mark.parametrize("facts", [ModelFacts(), ModelFacts(num_groups=2, top_groups=2)])
def test_any_order_goes_where_groups_do_not_matter(facts: ModelFacts) -> None:
    """One group, or all groups allowed."""
    check_groups(permutation([3, 0, 2, 1]), facts)


@pytest.mark.parametrize(
    ("num_groups", "num_devices", "expected"),
    [
        (8, 32, "-t KIND:8x4"),
        (8, 4, "-t KIND:4x1"),
        (8, 8, "-t KIND:8x1"),
        (8, 12, "a number of devices that divides 8 groups"),
        (8, 1, "8 nodes (-t KIND:8xDEVICES)"),
    ],
)
def test_advice_depends_on_the_devices(num_groups: int, num_devices: int, expected: str) -> None:
    """As many nodes as groups, or one device per node."""
    assert expected in solve_advice(num_groups, num_devices)


@pytest.mark.parametrize(("nodes", "devices"), [(4, 2), (4, 1), (2, 1)])
def test_the_advice_leads_to_whole_groups(nodes: int, devices: int) -> None:
    """A placement solved as advised passes, one by loads alone does not."""
    from placement.cost import CostModel
    from placement.formats.permutation import Permutation
    from placement.model import ModelShape
    from placement.problem import Objective, make_problem
    from placement.profile import RoutingProfile
    from placement.solvers.protocol import SolveRequest
    from placement.solvers.registry import make_solver
    from placement.topology import parse_topology

    load_WLE = np.random.default_rng(1).integers(1, 1000, (2, 3, 16)).astype(float)
    shape = ModelShape(
        name="m",
        num_layers=3,
        num_experts=16,
        top_k=2,
        hidden_size=8,
        expert_hidden_size=8,
        num_expert_groups=4,
        top_groups=2,
    )
    problem = make_problem(
        RoutingProfile(load_WLE=load_WLE, window_tokens_W=load_WLE.sum(axis=(1, 2)) / 6, top_k=2),
        parse_topology(f"h100:{nodes}x{devices}"),
        model=shape,
        objective=Objective.BALANCE,
    )
    for solver, accepted in (("eplb", True), ("balance", False)):
        placement = make_solver(solver).solve(SolveRequest(problem=problem, model=CostModel(problem)))
        order = Permutation.from_placement(placement, moe_layer_ids=shape.moe_layer_ids)
        assert order.keeps_groups_whole(4) is accepted
        if accepted:
            check_groups(order, TWO_OF_FOUR)


CONFIGS: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({"n_group": 8, "topk_group": 4}, (8, 4)),
    ({"num_expert_group": 8, "topk_group": 4}, (8, 4)),
    ({"n_group": 1, "topk_group": 1}, (1, 1)),
    ({"n_group": None, "topk_group": None}, (1, 1)),
    ({"n_group": 3, "topk_group": 1, "topk_method": "greedy"}, (1, 1)),
    ({"n_group": 3, "topk_group": 1, "topk_method": "group_limited_greedy"}, (3, 1)),
    ({"n_groups": 8, "mamba_n_groups": 8, "layer_group_size": 6}, (1, 1)),
    ({"text_config": {"n_group": 8, "topk_group": 4}}, (8, 4)),
    ({"thinker_config": {"text_config": {"n_group": 8, "topk_group": 4}}}, (8, 4)),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGS, ids=[str(row[0]) for row in CONFIGS])
def test_groups_are_read_from_the_configuration(
    tmp_path: Path, config: dict[str, Any], expected: tuple[int, int]
) -> None:
    """Under each family's own keys, nested or not."""
    folder = write_checkpoint(tmp_path / "a", [{}], config=config)
    facts = read_facts(folder)
    assert (facts.num_groups, facts.top_groups, facts.unclear) == (*expected, None)


def test_a_checkpoint_with_groups_takes_only_whole_ones(tmp_path: Path) -> None:
    """The rule reaches the command: refused, or written."""
    experts = {
        f"model.layers.0.mlp.experts.{e}.up_proj.weight": np.zeros((1, 1), np.float32) for e in range(4)
    }
    tensors = {**experts, "model.layers.0.mlp.gate.weight": np.zeros((4, 1), np.float32)}
    source = write_checkpoint(tmp_path / "a", [tensors], config={"n_group": 2, "topk_group": 1})
    with pytest.raises(InputError, match="expert 2 of group 1 would join experts of group 0"):
        permute_checkpoint(source, tmp_path / "b", permutation([0, 2, 1, 3]))
    permute_checkpoint(source, tmp_path / "b", permutation([3, 2, 0, 1]))
