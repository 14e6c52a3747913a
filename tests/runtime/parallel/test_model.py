"""Expert-parallel execution computes what the whole model computes: outputs and gradients, every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parallel_checks import Case, compare, lose_a_rank, run_without_tokens, share_by_loads, spread_on
from ranks import Ranks, ranks

from placement.errors import ExchangeError, InputError
from placement.plan import Placement
from placement.runtime.families.registry import family_named, supported_families
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import Execution, expert_parallel
from placement.runtime.tiny import tiny_model

pytestmark = [pytest.mark.model, pytest.mark.slow]

GroupOf = Callable[[int], Ranks]

NAMED = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "llama4_text",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)
_BUILT_BY_NAME = {"megatron", "torchtitan"}
OTHERS = [
    name
    for name in supported_families()
    if name not in {*NAMED, *_BUILT_BY_NAME} and not family_named(name).record_only
]
TOLERANCE = 1e-5


def check(group: Ranks, case: Case) -> None:
    """Every rank's differences are those of float32's rounding."""
    for rank, found in enumerate(group.run(compare, case)):
        assert found
        worst = max(found, key=lambda name: found[name])
        assert found[worst] <= TOLERANCE, f"rank {rank}, {worst}: {found[worst]:.2e} in {case}"


@pytest.mark.parametrize("exchange", ["pairs", "dedup"])
@pytest.mark.parametrize("model_type", NAMED)
def test_named_families_on_two_ranks(group_of: GroupOf, model_type: str, exchange: str) -> None:
    """Outputs and gradients equal the whole model's, one row for each pair or for each device."""
    check(group_of(2), Case(model_type=model_type, seed=len(exchange), exchange=exchange))


@pytest.mark.parametrize("model_type", NAMED)
def test_named_families_on_two_nodes(group_of: GroupOf, model_type: str) -> None:
    """The same when tokens cross to a node once and are handed on within it."""
    check(group_of(4), Case(model_type=model_type, seed=2, exchange="hierarchical", devices_per_node=2))


@pytest.mark.parametrize("model_type", OTHERS)
def test_every_other_family(group_of: GroupOf, model_type: str) -> None:
    """Every family that takes a placement takes one over ranks."""
    check(group_of(2), Case(model_type=model_type, seed=4))


@pytest.mark.parametrize("seed", range(12))
def test_random_placements(group_of: GroupOf, seed: int) -> None:
    """Replicas, empty slots, uneven devices and devices without experts; every exchange and split."""
    exchange = ("pairs", "dedup", "hierarchical")[seed % 3]
    split = ("even", "hash", "nearest", "lp")[seed % 4]
    case = Case(
        model_type="gpt_oss" if seed % 2 else "qwen3_moe",
        seed=100 + seed,
        exchange=exchange,
        split=split,
        gradients="sum" if seed % 5 == 0 else "mean",
        devices_per_node=2 if exchange == "hierarchical" else None,
    )
    check(group_of(4 if exchange == "hierarchical" else 3), case)


@pytest.mark.parametrize("exchange", ["pairs", "dedup"])
def test_without_gradients(group_of: GroupOf, exchange: str) -> None:
    """Inference takes the same way."""
    check(group_of(3), Case(model_type="olmoe", seed=5, exchange=exchange, train=False))


def test_one_rank_needs_no_group() -> None:
    """A single process runs its slots, replicas and empty ones among them."""
    whole, model = (tiny_model("mixtral", num_layers=2, num_experts=4) for _ in range(2))
    placement = Placement(
        physical_to_logical_map_LS=np.array([[3, -1, 0, 1, 2], [2, 1, 0, 3, -1]]),
        device_of_slot_S=np.zeros(5, dtype=np.int64),
        num_experts=4,
        num_devices=1,
    )
    parallel = expert_parallel(model, placement, Mesh.single())
    tokens = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(parallel.model(tokens).logits, whole(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("exchange", ["pairs", "dedup"])
@pytest.mark.parametrize("num_tokens_D", [[0, 5], [3, 0], [0, 0]])
def test_ranks_without_tokens(group_of: GroupOf, exchange: str, num_tokens_D: list[int]) -> None:
    """A rank may have nothing to compute, and takes part all the same."""
    for rank, (error, shape) in enumerate(group_of(2).run(run_without_tokens, exchange, num_tokens_D)):
        assert error <= TOLERANCE
        assert shape == (num_tokens_D[rank], 16)


def test_loads_share_replicas_out(group_of: GroupOf) -> None:
    """With split ``lp`` the fullest rank is as light as any split makes it, also after a change of rows."""
    for told in group_of(3).run(share_by_loads):
        assert told["before"] == [None, None]
        fullest = [
            fullest_rank(told, told["rows"][index], told["shares"][index], told["loads"][index])
            for index in range(2)
        ]
        even = [
            fullest_rank(told, row_S, None, told["loads"][index]) for index, row_S in enumerate(told["rows"])
        ]
        assert all(best <= other + 1e-9 for best, other in zip(fullest, even, strict=True))
        assert fullest < even
        assert (told["expert_S"] == told["rows"][1]).all()
        after = fullest_rank(told, told["expert_S"], told["after"], told["loads"][0])
        assert after <= fullest_rank(told, told["expert_S"], None, told["loads"][0]) + 1e-9


def fullest_rank(
    told: dict[str, Any], row_S: np.ndarray, share_EX: np.ndarray | None, load_E: np.ndarray
) -> float:
    """Load of the fullest of three ranks; even shares where none are given."""
    load_D = np.zeros(3)
    for expert, load in enumerate(load_E):
        ranks = told["rank_of_slot_S"][np.flatnonzero(row_S == expert)]
        shares = np.full(ranks.size, 1 / ranks.size) if share_EX is None else share_EX[expert, : ranks.size]
        assert shares.sum() == pytest.approx(1.0)
        load_D[ranks] += load * shares
    return float(load_D.max())


def test_a_lost_rank_is_named_within_the_time_limit(tmp_path: Path) -> None:
    """The survivors raise one clear line each; nobody waits for ever."""
    with ranks(3, tmp_path) as group:
        outcomes = group.outcomes(lose_a_rank, 1)
    assert "died" in str(outcomes[1])
    for survivor in (0, 2):
        assert isinstance(outcomes[survivor], ExchangeError), outcomes[survivor]
        assert f"failed on rank {survivor}: a rank is lost" in str(outcomes[survivor])


class TestRefusals:
    """What does not fit is one line, on every rank, and nothing hangs."""

    def refused(self, group: Ranks, *how: object) -> str:
        """Message that every rank raises."""
        outcomes = group.outcomes(spread_on, *how)
        assert all(isinstance(one, InputError) for one in outcomes), outcomes
        messages = {str(one) for one in outcomes}
        assert len(messages) == 1
        return messages.pop()

    def test_world_of_another_size(self, group_of: GroupOf) -> None:
        """A placement for three devices does not run on two ranks."""
        assert "for 3 devices, the process group has 2 ranks" in self.refused(group_of(2), [3, 3], {})

    def test_other_placements_on_ranks(self, group_of: GroupOf) -> None:
        """Ranks that read different files are told so."""
        message = self.refused(group_of(2), [2, 2], {"seeds": [1, 2]})
        assert "disagree about the placement" in message

    def test_other_ways_to_run(self, group_of: GroupOf) -> None:
        """Ranks that were given different options are told so."""
        message = self.refused(group_of(2), [2, 2], {"exchanges": ["pairs", "dedup"]})
        assert "disagree about how to run it" in message

    def test_twice(self, group_of: GroupOf) -> None:
        """A model's experts are spread once."""
        assert "already runs with a placement" in self.refused(group_of(2), [2, 2], {"twice": True})

    def test_nodes_that_are_not_filled(self, group_of: GroupOf) -> None:
        """Nodes have to be full."""
        message = self.refused(group_of(3), [3, 3, 3], {"devices_per_node": 2})
        assert "3 ranks do not fill nodes of 2 devices" in message

    @pytest.mark.parametrize("wrong", [{"exchange": "flat"}, {"split": "odd"}, {"gradients": "none"}])
    def test_unknown_words(self, wrong: dict[str, str]) -> None:
        """What there is not is named."""
        with pytest.raises(InputError, match=next(iter(wrong.values()))):
            Execution(**wrong)
