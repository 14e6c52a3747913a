"""The Trainer trains an expert-parallel model as it would train the whole one, whatever moves meanwhile."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from loop_checks import STEPS, FakeSource, arguments, dataset, history_of, model_of, shifted, train_spread
from ranks import Ranks
from transformers import Trainer

from placement.errors import InputError
from placement.runtime.loop.trainer import PlacementCallback
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import ParallelModel, expert_parallel


def alone() -> ParallelModel:
    """Return a model on a mesh of this process alone."""
    return expert_parallel(model_of(), shifted(0, num_devices=1), Mesh.single())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Losses and norms of the whole model, trained by nothing but the Trainer."""
    args = arguments(str(tmp_path_factory.mktemp("whole")), per_device_train_batch_size=2)
    trainer = Trainer(model=model_of(), args=args, train_dataset=dataset())
    trainer.train()
    return history_of(trainer)


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Compare step by step."""
    assert len(found) == len(expected) == STEPS
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_on_one_rank(whole: list[dict[str, float]], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Losses and norms are those of the whole model; who clips is said."""
    parallel, source = alone(), FakeSource()
    args = arguments(str(tmp_path), per_device_train_batch_size=2)
    callback = PlacementCallback(parallel, source, every_steps=2, version=1)
    with caplog.at_level(logging.WARNING, logger="placement"):
        trainer = Trainer(model=parallel.model, args=args, train_dataset=dataset(), callbacks=[callback])
        trainer.train()
    assert_same(history_of(trainer), whole)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("placement")] == [
        "gradients are clipped to a norm of 0.5 over the experts of all ranks, not by the Trainer"
    ]
    assert (args.max_grad_norm, source.closed, source.polls, callback.loop) == (0.5, True, 4, None)


def test_another_model_is_refused(tmp_path: Path) -> None:
    """The callback cannot watch over a model that it was not made for."""
    callback: Any = PlacementCallback(alone(), FakeSource())
    args = arguments(str(tmp_path), per_device_train_batch_size=2)
    trainer = Trainer(model=model_of(), args=args, train_dataset=dataset(), callbacks=[callback])
    with pytest.raises(InputError, match="another model"):
        trainer.train()


def test_on_two_ranks(two_ranks: Ranks, whole: list[dict[str, float]], tmp_path: Path) -> None:
    """Losses and norms are those of the whole model, on both ranks."""
    found = two_ranks.run(train_spread, str(tmp_path), {})
    for one in found:
        assert_same(one["history"], whole)
        assert one["wrapped"] == "DistributedDataParallel"
        assert one["versions"] == [1] * STEPS
        assert one["windows"] == list(range(STEPS))
        # Eight tokens a step and rank, top-2.
        assert one["pairs"] == STEPS * 8 * 2
        assert one["max_grad_norm"] == 0.5
        assert one["closed"]


def test_placements_change_while_it_trains(
    two_ranks: Ranks, whole: list[dict[str, float]], tmp_path: Path
) -> None:
    """Losses and norms stay those of the whole model: weights and optimizer state have moved."""
    found = two_ranks.run(train_spread, str(tmp_path), {1: 2})
    for one in found:
        assert_same(one["history"], whole)
        assert one["where"] == shifted(2).count_LED.tolist()
        assert one["versions"] == found[0]["versions"]
        assert one["versions"][0] == 1
        assert one["versions"][-1] == 2
