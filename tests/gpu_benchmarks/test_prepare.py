"""What is fitted and cut for the machine with the GPUs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu.folder import read_prepared
from benchmarks.gpu.instances import EMULATED, REPLAYED, TINY, instances
from benchmarks.gpu.prepare import prepare
from benchmarks.gpu.traffic import choose_slots, held_out_windows, received_tokens
from placement.errors import InputError
from placement.plan import Placement

# Experts 0 and 1 on device 0, 1 and 2 on device 1.
REPLICATED = Placement(
    physical_to_logical_map_LS=np.array([[0, 1, 1, 2]]),
    device_of_slot_S=np.array([0, 0, 1, 1]),
    num_experts=3,
    num_devices=2,
)


def test_even_split_deals_an_experts_tokens_to_its_replicas() -> None:
    """Eight tokens of expert 1 go to its two slots, four to each."""
    experts_TK = np.full((8, 1), 1, dtype=np.uint8)
    slot_TK = choose_slots(experts_TK, REPLICATED, 0, split="even", recent_E=np.ones(3, dtype=np.int64))
    assert np.bincount(slot_TK.ravel(), minlength=4).tolist() == [0, 4, 4, 0]


def test_lp_split_goes_by_recent_loads() -> None:
    """With 6 pairs on expert 0, 2 on 1 and none on 2, all of expert 1 belongs on device 1."""
    experts_TK = np.full((8, 1), 1, dtype=np.uint8)
    slot_TK = choose_slots(experts_TK, REPLICATED, 0, split="lp", recent_E=np.array([6, 2, 0]))
    assert np.bincount(slot_TK.ravel(), minlength=4).tolist() == [0, 0, 8, 0]


def test_received_tokens_are_distinct_and_from_elsewhere() -> None:
    """Tokens 0 and 1 live on device 0, 2 and 3 on device 1; slots 0, 1 are on 0 and slots 2, 3 on 1."""
    slot_TK = np.array([[2, 3], [0, 1], [0, 2], [2, 3]])
    assert received_tokens(slot_TK, REPLICATED).tolist() == [1, 1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), split=st.sampled_from(["even", "lp"]))
def test_chosen_slots_hold_the_expert(seed: int, split: str) -> None:
    """Whatever the loads, a pair goes to a slot of its expert."""
    rng = np.random.default_rng(seed)
    experts_TK = np.stack([rng.permutation(3)[:2] for _ in range(50)]).astype(np.uint8)
    recent_E = rng.integers(0, 9, size=3)
    slot_TK = choose_slots(experts_TK, REPLICATED, 0, split=split, recent_E=recent_E)
    np.testing.assert_array_equal(REPLICATED.physical_to_logical_map_LS[0][slot_TK], experts_TK)


def test_held_out_windows_are_odd() -> None:
    """Windows that were fitted on are never measured."""
    assert held_out_windows(12, 20).tolist() == [1, 3, 5, 7, 9, 11]
    assert held_out_windows(100, 3).tolist() == [1, 49, 99]


def test_an_unknown_instance_is_told() -> None:
    """The message names those there are."""
    with pytest.raises(InputError, match="olmoe-2"):
        instances(["olmo"])


@pytest.mark.parametrize("instance", [*REPLAYED, *EMULATED, *TINY], ids=lambda one: one.name)
def test_instances_fit_their_ranks(instance: object) -> None:
    """Slots and windows divide evenly, as replay and emulation need it."""
    ranks = instance.num_ranks  # type: ignore[attr-defined]
    shape = instance.shape  # type: ignore[attr-defined]
    assert shape.num_experts % ranks == 0
    assert instance.spare_slots % ranks == 0  # type: ignore[attr-defined]
    assert instance.window_tokens % ranks == 0  # type: ignore[attr-defined]


def test_a_replayed_instance_carries_tokens(prepared: Path) -> None:
    """Ids of held-out windows, the loads before them, and a placement for each policy."""
    one = read_prepared(prepared, "tiny-2")
    assert one.arrays["experts_WTLK"].shape == (2, 64, 2, 2)
    assert one.arrays["recent_WLE"].sum(axis=2).tolist() == [[128, 128], [128, 128]]
    assert set(one.policies) >= {
        "contiguous",
        "eplb",
        "balance",
        "joint@nvlink",
        "joint@shm",
        "joint+/lp@shm",
    }
    assert one.policies["joint+/lp@shm"].placement.num_slots == 10


def test_an_emulated_instance_carries_every_pair(prepared: Path) -> None:
    """A batch of so many tokens has top-k pairs for each of them, on every policy."""
    one = read_prepared(prepared, "tiny-4")
    for name in one.policies:
        assert (one.arrays[f"rows/{name}/prefill-256"].sum(axis=2) == 512).all()
        assert (one.arrays[f"rows/{name}/decode-16"].sum(axis=2) == 32).all()
        # A token leaves for at most top-k devices.
        assert (one.arrays[f"received/{name}/decode-16"].sum(axis=2) <= 32).all()


def test_what_was_fitted_can_be_kept(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run without refitting changes nothing."""
    before = read_prepared(prepared, "tiny-2")
    prepare(TINY[0], prepared, calibrations={}, work_s=0.05, refit=False)
    after = read_prepared(prepared, "tiny-2")
    assert "joint" in capsys.readouterr().err
    for name, one in before.policies.items():
        assert after.policies[name].about == one.about
    np.testing.assert_array_equal(after.arrays["experts_WTLK"], before.arrays["experts_WTLK"])


def test_a_missing_instance_is_told(tmp_path: Path) -> None:
    """The message says what to run."""
    with pytest.raises(InputError, match=r"benchmarks\.gpu prepare"):
        read_prepared(tmp_path, "olmoe-2")
