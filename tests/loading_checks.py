"""Checkpoints of tiny models cut by a placement, and what ranks do with them in tests.

Shape letters: L MoE layers, S slots, C rows of one rank.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.runtime.checkpoint import load_checkpoint
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.parallel import loading_tensors, saving
from placement.runtime.parallel.data_parallel import fully_shard_rest
from placement.runtime.parallel.loading import load_expert_parallel
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.patience import Patience
from placement.runtime.parallel.saving import save_expert_parallel
from placement.runtime.parallel.slots import rows_of_rank
from placement.runtime.tiny import tiny_model

EXPERTS = 6
TOKENS = torch.arange(18).reshape(2, 9) % 7

UNEVEN_S = np.array([0, 2, 0, 0, 2, 2, 0, 0])
"""Device of each slot: five slots, none, and three."""


def uneven(num_layers: int) -> Placement:
    """Three devices, one of them without slots; replicas, an empty slot, another order in the last layer."""
    map_LS = np.tile([3, 1, 0, 2, 4, 5, EMPTY, 5], (num_layers, 1))
    map_LS[-1] = [5, 0, 4, 3, 1, 2, 1, EMPTY]
    return Placement(
        physical_to_logical_map_LS=map_LS, device_of_slot_S=UNEVEN_S, num_experts=EXPERTS, num_devices=3
    )


def reversed_halves(num_layers: int) -> Placement:
    """Two devices without replicas: the second half of the experts first, in falling order."""
    return Placement(
        physical_to_logical_map_LS=np.tile(np.arange(EXPERTS)[::-1], (num_layers, 1)),
        device_of_slot_S=np.repeat([0, 1], EXPERTS // 2),
        num_experts=EXPERTS,
        num_devices=2,
    )


def saved(family: str, folder: Path, **config: Any) -> Any:
    """Save a tiny model of two layers as transformers does, and return it."""
    model = tiny_model(family, num_layers=2, num_experts=EXPERTS, **config)
    model.save_pretrained(folder)
    return model


def saved_quantised(method: str, folder: Path) -> None:
    """Save a tiny model whose matrices are stored as fp8 or mxfp4, any values."""
    sizes: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 32}
    family = "gpt_oss" if method == "mxfp4" else "deepseek_v3"
    model: Any = tiny_model(family, num_layers=2, num_experts=EXPERTS, **sizes)
    model.to(torch.bfloat16).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith(("proj", "proj.weight"))]:
        stored |= _QUANTISED[method](name, stored.pop(name))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings: dict[str, Any] = {"quant_method": method}
    if method == "fp8":
        settings |= {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def _fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    blocks = [-(-size // 128) for size in weight.shape]
    return {
        name: (weight * 100).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": 0.01 + torch.rand(blocks) / 100,
    }


def _mxfp4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if weight.ndim != 3:
        return {name: weight}
    experts, inner, outer = weight.shape
    shape = (experts, outer, inner // 32)
    return {
        f"{name}_blocks": torch.randint(0, 256, (*shape, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(118, 128, shape, dtype=torch.uint8),
    }


_QUANTISED = {"fp8": _fp8, "mxfp4": _mxfp4}


def expert_names(model: nn.Module) -> dict[str, int]:
    """MoE layer of each expert parameter, by its name in the model."""
    layer_of = {
        id(getattr(layer.experts, name)): index
        for index, layer in enumerate(moe_layers_of(model))
        for name in layer.expert_tensors
    }
    return {name: layer_of[id(one)] for name, one in model.named_parameters() if id(one) in layer_of}


def expected_state(model: nn.Module, placement: Placement, rank: int) -> dict[str, torch.Tensor]:
    """What a rank has to hold of a whole model."""
    state, slots_C = dict(model.state_dict()), rows_of_rank(placement, rank)
    for name, layer in expert_names(model).items():
        expert_C = placement.physical_to_logical_map_LS[layer, slots_C]
        state[name] = state[name][np.maximum(expert_C, 0)]
        state[name][expert_C == EMPTY] = 0
    return state


def assembled(
    whole: nn.Module, placement: Placement, parts: Mapping[int, nn.Module]
) -> dict[str, torch.Tensor]:
    """State of a whole model, put together from what the ranks hold."""
    state, held = dict(parts[0].state_dict()), [dict(part.state_dict()) for part in parts.values()]
    for name, layer in expert_names(whole).items():
        state[name] = torch.full_like(whole.state_dict()[name], torch.nan)
        for rank in parts:
            for row, slot in enumerate(rows_of_rank(placement, rank)):
                expert = int(placement.physical_to_logical_map_LS[layer, slot])
                if expert != EMPTY:
                    state[name][expert] = held[rank][name][row]
    return state


def run(model: nn.Module) -> torch.Tensor:
    """Return what a model makes of some tokens: logits, or hidden states where it has no head."""
    with torch.no_grad():
        outputs: torch.Tensor = model(input_ids=TOKENS)[0]
    return outputs


class _CountedSlice:
    def __init__(self, stored: Any, name: str, read: Counter[str]) -> None:
        self._stored, self._name, self._read = stored, name, read

    def __getitem__(self, index: Any) -> torch.Tensor:
        found: torch.Tensor = self._stored[index]
        self._read[self._name] += found.nbytes
        return found


class _CountedFile:
    def __init__(self, opened: Any, read: Counter[str]) -> None:
        self._opened, self._counts = opened, read

    def get_tensor(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._opened.get_tensor(name)
        self._counts[name] += found.nbytes
        return found

    def get_slice(self, name: str) -> _CountedSlice:
        return _CountedSlice(self._opened.get_slice(name), name, self._counts)

    def __enter__(self) -> _CountedFile:
        self._opened.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._opened.__exit__(*exc)


@contextmanager
def counted_reading() -> Iterator[Counter[str]]:
    """Count the bytes that are read of each tensor on disk."""
    read: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loading_tensors,
            "safe_open",
            lambda *args, **options: _CountedFile(safe_open(*args, **options), read),
        )
        yield read


# ------------------------------------------------------------------------------------------ run on every rank


def load_and_run(rank: int, folder: Path, placement: Placement) -> tuple[float, float, set[int]]:
    """Return the largest difference from the whole model's outputs, their scale, and the rows held."""
    parallel = load_expert_parallel(folder, placement, Mesh.create(timeout_s=20.0))
    expected = run(load_checkpoint(folder))
    difference = float((run(parallel.model) - expected).abs().max())
    rows = {len(one) for one in parallel.expert_parameters().values()}
    return difference, float(expected.abs().max()), rows


def load_own_folder(rank: int, folders: list[Path], placement: Placement) -> int:
    """Load from a folder of the rank's own; return how many layers there are."""
    parallel = load_expert_parallel(folders[rank], placement, Mesh.create(timeout_s=20.0), timeout_s=20.0)
    return len(parallel.layers)


def load_with_transformers_own_plan(
    rank: int, folder: Path, axis: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Load under transformers' own expert parallelism; return logits, and this rank's shards of the experts.

    Parameters
    ----------
    axis
        How the rest is spread: ``fsdp_size`` (a batch for each rank) or ``tp_size`` (the same for all);
        earlier versions know the latter alone.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    world_size = torch.distributed.get_world_size()
    options: dict[str, Any] = {axis: world_size, "ep_size": world_size}
    if "ep_size" not in {field.name for field in fields(DistributedConfig)}:  # before transformers 5.20
        options = {"tp_size": world_size, "enable_expert_parallel": True}
    build: Any = AutoModelForCausalLM
    model = build.from_pretrained(folder, distributed_config=DistributedConfig(**options))
    shards = {
        name: parameter.detach().to_local().clone()
        for name, parameter in model.named_parameters()
        if name in expert_names(model)
    }
    logits: Any = run(model)
    return (logits.full_tensor() if hasattr(logits, "full_tensor") else logits), shards


def load_and_save(rank: int, source: Path, placement: Placement, target: Path) -> None:
    """Load in parts and save in parts."""
    parallel = load_expert_parallel(source, placement, Mesh.create(timeout_s=20.0))
    save_expert_parallel(parallel, target, timeout_s=20.0)


def save_sharded(rank: int, source: Path, placement: Placement, target: Path) -> None:
    """Save a model whose other parameters FSDP2 has sharded."""
    parallel = load_expert_parallel(source, placement, Mesh.create(timeout_s=20.0))
    fully_shard_rest(parallel, mesh=init_device_mesh("cpu", (parallel.mesh.world_size,)))
    save_expert_parallel(parallel, target, timeout_s=20.0)


def save_with_a_full_disk(rank: int, source: Path, placement: Placement, target: Path, full: int) -> None:
    """Have one rank run out of room while it writes its experts."""

    def no_room(descriptor: int, begin: int, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == full:
            patch.setattr(saving, "_write_at", no_room)
        load_and_save(rank, source, placement, target)


def save_where_others_do_not_see(rank: int, source: Path, placement: Placement, folder: Path) -> None:
    """Save into a folder that only rank 0 has; the others are told another path."""

    def elsewhere(self: Patience, value: Any) -> list[Any]:
        found = gather(self, value)
        return [Path("/nowhere/at/all")] * len(found) if rank and isinstance(found[0], Path) else found

    gather = Patience.gather
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Patience, "gather", elsewhere)
        load_and_save(rank, source, placement, folder)


def fail_together(rank: int, failing: list[int]) -> list[int]:
    """Let some ranks fail; return the ranks, gathered afterwards."""
    patience = Patience(Mesh.create(timeout_s=20.0), timeout_s=20.0)
    with patience.together():
        if rank in failing:
            raise InputError(f"disk of {rank}")
    return patience.gather(rank)
