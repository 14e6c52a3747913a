"""Transformers' own expert parallelism shards contiguously: a permuted checkpoint gives it a placement.

Shape letters: L MoE layers, E experts, D devices.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import loading_checks as checks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from safetensors import safe_open
from safetensors.torch import load_file

from placement.checkpoint import permute_checkpoint
from placement.formats.permutation import Permutation
from placement.plan import Placement
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.tiny import tiny_model

DEVICES = 2


def placement_of(seed: int, *, num_layers: int, num_devices: int = DEVICES) -> Placement:
    """As many experts on each device, any of them; slots of the devices take turns."""
    rng = np.random.default_rng(seed)
    return Placement(
        physical_to_logical_map_LS=np.array([rng.permutation(checks.EXPERTS) for _ in range(num_layers)]),
        device_of_slot_S=np.arange(checks.EXPERTS) % num_devices,
        num_experts=checks.EXPERTS,
        num_devices=num_devices,
    )


def experts_of(placement: Placement, layer: int, device: int) -> list[int]:
    """Experts that a placement gives a device."""
    return sorted(placement.physical_to_logical_map_LS[layer, placement.device_of_slot_S == device].tolist())


@pytest.mark.parametrize(
    ("family", "axis"),
    [
        ("mixtral", "fsdp_size"),
        ("gpt_oss", "fsdp_size"),
        ("deepseek_v3", "fsdp_size"),
        ("qwen3_moe", "tp_size"),
    ],
)
def test_its_ranks_hold_the_devices_of_the_placement(
    family: str, axis: str, tmp_path: Path, group_of: Callable[[int], Ranks]
) -> None:
    """Each rank's shard is the experts of its device, and the logits are the original's."""
    model = checks.saved(family, tmp_path / "original")
    layers = moe_layers_of(model)
    placement = placement_of(3, num_layers=len(layers))
    order = Permutation.from_placement(
        placement, moe_layer_ids=tuple(layer.decoder_layer for layer in layers)
    )
    permute_checkpoint(tmp_path / "original", tmp_path / "permuted", order)
    expected, names = checks.run(model), checks.expert_names(model)
    found = group_of(DEVICES).run(checks.load_with_transformers_own_plan, tmp_path / "permuted", axis)
    for rank, (logits, shards) in enumerate(found):
        assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert set(shards) == set(names)
        for name, layer in names.items():
            whole = model.get_parameter(name)
            assert torch.equal(shards[name], whole[experts_of(placement, layer, rank)]), (rank, name)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), num_devices=st.sampled_from([1, 2, 3, 6]))
def test_contiguous_blocks_of_the_permuted_file_are_the_devices(
    seed: int, num_devices: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whoever shards the file's experts into equal runs gets the placement, on any number of devices."""
    folder = tmp_path_factory.mktemp("blocks")
    model = tiny_model("gpt_oss", num_layers=2, num_experts=checks.EXPERTS)
    model.save_pretrained(folder / "original")
    placement = placement_of(seed, num_layers=2, num_devices=num_devices)
    permute_checkpoint(
        folder / "original", folder / "permuted", Permutation.from_placement(placement, moe_layer_ids=(0, 1))
    )
    original = load_file(folder / "original" / "model.safetensors")
    size = checks.EXPERTS // num_devices
    with safe_open(folder / "permuted" / "model.safetensors", framework="pt") as permuted:
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            for device in range(num_devices):
                block = permuted.get_slice(name)[device * size : (device + 1) * size]
                assert torch.equal(block, original[name][experts_of(placement, layer, device)])
