"""A model that every rank holds whole changes its placement, and training does not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_checks import EXPERTS, LAYERS, FakeSource, model_of, shifted, tokens

from placement.errors import InputError
from placement.plan import Placement
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.hook import apply_placement
from placement.runtime.loop.hooked import HookedModel
from placement.runtime.loop.loop import PlacementLoop

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adamw, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}


def permuted(seed: int) -> Placement:
    """Return a placement without replicas, its slots in any order."""
    rng = np.random.default_rng(seed)
    return Placement(
        physical_to_logical_map_LS=np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)]),
        device_of_slot_S=np.repeat([0, 1], EXPERTS // 2),
        num_experts=EXPERTS,
        num_devices=2,
    )


def with_replica() -> Placement:
    """Return a placement in which every expert is on both devices."""
    return Placement(
        physical_to_logical_map_LS=np.tile(np.arange(EXPERTS), (LAYERS, 2)),
        device_of_slot_S=np.repeat([0, 1], EXPERTS),
        num_experts=EXPERTS,
        num_devices=2,
    )


def precise() -> Any:
    """Return a model in double precision: what optimizers divide by tiny numbers must not be noise."""
    model = model_of().double()
    model.set_experts_implementation("eager")
    return model


def train(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """Take a step; return the loss."""
    optimizer.zero_grad()
    batch = tokens(seed)
    loss = model(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@given(seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=3), name=st.sampled_from(sorted(OPTIMIZERS)))
@settings(max_examples=10, deadline=None)
def test_training_goes_on_as_if_nothing_had_happened(seeds: list[int], name: str) -> None:
    """Losses and weights are those of a model without any placement, whichever optimizer."""
    plain, model = precise(), precise()
    source = FakeSource()
    applied = apply_placement(model, permuted(seeds[0] + 1))
    optimizer, reference = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](plain.parameters())
    hooked = HookedModel(applied, optimizer=optimizer)
    with PlacementLoop(hooked, source, every_steps=1) as loop:
        for step in range(4 * len(seeds)):
            if step % 4 == 0:
                source.promote(permuted(seeds[step // 4]), step)
            assert train(model, optimizer, step) == pytest.approx(train(plain, reference, step), abs=1e-9)
            loop.step()
    hooked.applied.detach()
    for mine, theirs in zip(moe_layers_of(model), moe_layers_of(plain), strict=True):
        for tensor in mine.expert_tensors:
            expected = getattr(theirs.experts, tensor)
            torch.testing.assert_close(getattr(mine.experts, tensor), expected, atol=1e-9, rtol=1e-9)


def test_gradients_move_along() -> None:
    """Between two accumulated passes, too."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = model_of()
    hooked = HookedModel(apply_placement(model, permuted(1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooked = HookedModel(hooked.applied, optimizer=optimizer)
    for one in (model, plain):
        one(tokens(), labels=tokens()).loss.backward()
    hooked.start(permuted(2), version=None)
    layer, reference = moe_layers_of(model)[1], moe_layers_of(plain)[1]
    order = permuted(2).physical_to_logical_map_LS[1]
    for name in layer.expert_tensors:
        expected = getattr(reference.experts, name).grad[order.copy()]
        torch.testing.assert_close(getattr(layer.experts, name).grad, expected)


def test_replicas_are_served_and_not_trained() -> None:
    """Without an optimizer any placement will do."""
    model = model_of()
    expected = model(tokens())[0]
    hooked = HookedModel(apply_placement(model, shifted(1)))
    assert hooked.start(with_replica(), version=2).done
    torch.testing.assert_close(model(tokens())[0], expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="has 8 replicas"):
        HookedModel(hooked.applied, optimizer=optimizer)
    with pytest.raises(InputError, match="has 8 experts per layer"):
        hooked.check(shifted(0, num_experts=8))


def test_state_that_cannot_be_ordered_is_refused() -> None:
    """Before anything is changed."""
    model = model_of()
    applied = apply_placement(model, permuted(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameter = moe_layers_of(model)[0].experts.down_proj
    optimizer.state[parameter]["sketch"] = torch.zeros(3)
    hooked = HookedModel(applied, optimizer=optimizer)
    with pytest.raises(InputError, match=r"keeps sketch of shape \[3\] for down_proj of MoE layer 0"):
        hooked.start(permuted(2), version=2)
    assert hooked.placement is applied.placement
    assert applied.attached
