"""Small stand-ins for what engines do with a placement file, with their strictness.

They are written after the engines' documented behaviour: which keys are refused, which layer a row is looked
up for, which map is derived from it. None of them shares code with what is tested.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml


@dataclass(frozen=True)
class Loaded:
    """What an engine holds after loading: the experts of each rank's slots, by decoder layer."""

    experts_of_rank: dict[int, list[list[int]]]
    """Decoder layer -> rank -> logical expert of each local slot."""
    logical_to_physical: dict[int, list[list[int]]]
    """Decoder layer -> logical expert -> its slots."""


def _loaded(rows: dict[int, list[int]], *, num_experts: int, num_ranks: int) -> Loaded:
    slots = {layer: torch.tensor(row).reshape(num_ranks, -1).tolist() for layer, row in rows.items()}
    inverse = {
        layer: [[slot for slot, held in enumerate(row) if held == expert] for expert in range(num_experts)]
        for layer, row in rows.items()
    }
    return Loaded(experts_of_rank=slots, logical_to_physical=inverse)


# ----------------------------------------------------------------------------------------------------- SGLang


def sglang(
    path: Path,
    *,
    num_hidden_layers: int,
    num_logical_experts: int,
    ep_num_redundant_experts: int,
    ep_size: int,
) -> Loaded:
    """Load ``--init-expert-location`` as SGLang does.

    A name without ``.json`` is parsed as JSON itself, the object becomes keyword arguments, the number of
    physical experts must be divided by the ranks, and the table has a row for every hidden layer.
    """
    data = str(path)
    document = json.loads(Path(data).read_text()) if data.endswith(".json") else json.loads(data)
    if "physical_to_logical_map" not in document:
        raise NotImplementedError(f"Unknown init_expert_location format ({list(document)})")
    return _sglang_by_mapping(
        num_hidden_layers, num_logical_experts, ep_num_redundant_experts, ep_size, **document
    )


def _sglang_by_mapping(
    num_hidden_layers: int,
    num_logical_experts: int,
    redundant: int,
    ep_size: int,
    physical_to_logical_map: list[list[int]],
) -> Loaded:
    table = torch.tensor(physical_to_logical_map)
    num_physical = num_logical_experts + redundant
    assert num_physical % ep_size == 0
    if tuple(table.shape) != (num_hidden_layers, num_physical):
        raise ValueError(f"physical_to_logical_map has shape {tuple(table.shape)}")
    maps: list[list[list[int]]] = [[[] for _ in range(num_logical_experts)] for _ in range(num_hidden_layers)]
    for layer in range(num_hidden_layers):
        for slot in range(num_physical):
            # A negative id would silently count from the end, as it does there.
            maps[layer][table[layer, slot].item()].append(slot)
    # Static dispatch picks a replica for every rank: an expert without one cannot be sampled from.
    for layer in maps:
        for slots in layer:
            if not slots:
                raise ZeroDivisionError("integer division or modulo by zero")
    rows = dict(enumerate(table.tolist()))
    return _loaded(rows, num_experts=num_logical_experts, num_ranks=ep_size)


# ----------------------------------------------------------------------------------------------- TensorRT-LLM


class ExtraForbiddenError(ValueError):
    """A model that forbids extra entries got one."""


class MoeLoadBalancerConfig:
    """The three entries of ``moe_config.load_balancer``, and what layers ask of them."""

    FIELDS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")

    def __init__(self, **entries: Any) -> None:
        for name in entries:
            if name not in self.FIELDS:
                raise ExtraForbiddenError(f"{name}: Extra inputs are not permitted")
        self.num_slots = entries.get("num_slots")
        self.layer_updates_per_iter = entries.get("layer_updates_per_iter", 0)
        assignments = entries.get("initial_global_assignments")
        if not isinstance(self.num_slots, int) or not isinstance(self.layer_updates_per_iter, int):
            raise ValueError("Input should be a valid integer")
        if assignments is not None:
            for layer, row in assignments.items():
                if not isinstance(layer, int) or not all(type(slot) is int for slot in row):
                    raise ValueError("Input should be a valid integer")
        self.initial_global_assignments: dict[int, list[int]] | None = assignments

    def setup(self, ep_size: int) -> None:
        """Learn the number of ranks."""
        if self.num_slots % ep_size:
            raise ValueError(f"`num_slots` ({self.num_slots}) must be divisible by `ep_size` ({ep_size}).")

    def layer(self, layer_idx: int) -> list[int]:
        """Return the assignments of a layer."""
        assert self.initial_global_assignments is not None
        if layer_idx not in self.initial_global_assignments:
            raise KeyError(f"layer_idx {layer_idx} not found in `initial_global_assignments`.")
        row = self.initial_global_assignments[layer_idx]
        if len(row) != self.num_slots:
            raise ValueError(f"Assignment length ({len(row)}) for layer {layer_idx}")
        return row


def yaml_of(path: Path) -> Any:
    """Return what a YAML file holds; the loader in C reads as the one in Python does, and faster."""
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def tensorrt_llm(
    path: Path, *, moe_layers: tuple[int, ...], num_experts: int, ep_size: int, num_mtp_layers: int = 0
) -> Loaded:
    """Load the YAML file and build every layer with experts as TensorRT-LLM does.

    Layers of multi-token prediction have experts too and number on from the last decoder layer.
    """
    config = MoeLoadBalancerConfig(**yaml_of(path))
    config.setup(ep_size)
    assert config.layer_updates_per_iter == 0
    rows = {}
    for layer in (*moe_layers, *range(max(moe_layers) + 1, max(moe_layers) + 1 + num_mtp_layers)):
        row = config.layer(layer)
        assert config.num_slots >= num_experts
        assert set(row) == set(range(num_experts))
        rows[layer] = row
    return _loaded(rows, num_experts=num_experts, num_ranks=ep_size)


# ------------------------------------------------------------------------------------------------ vllm-ascend


def vllm_ascend(
    path: Path, *, first_dense: int, num_moe_layers: int, num_experts: int, ep_size: int
) -> Loaded:
    """Load ``expert_map_path`` layer by layer as vllm-ascend does; `first_dense` layers come before."""
    if str(path)[-5:] != ".json":
        raise TypeError("The expert_map is not json.")
    data = json.loads(path.read_text())
    rows = {}
    for moe_layer in range(num_moe_layers):
        if moe_layer >= data["moe_layer_count"]:
            raise ValueError("Invalid EPLB Table")
        devices = data["layer_list"][moe_layer]["device_list"]
        # A tensor of lists that differ in length cannot be made.
        placement = torch.tensor([device["device_expert"] for device in devices], dtype=torch.int32)
        valid = torch.zeros(num_experts, dtype=torch.bool)
        for rank in range(ep_size):
            expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
            expert_map[placement[rank].long()] = torch.arange(placement.shape[1], dtype=torch.int32)
            # An expert that sits twice on a rank leaves a slot that no id leads to.
            assert int((expert_map >= 0).sum()) == placement.shape[1]
            valid |= expert_map >= 0
        assert valid.all()
        rows[first_dense + moe_layer] = placement.flatten().tolist()
    return _loaded(rows, num_experts=num_experts, num_ranks=ep_size)


# ------------------------------------------------------------------------------------------------------- vLLM


def vllm_initial_map(
    path: Path, *, num_moe_layers: int, num_experts: int, num_redundant: int
) -> torch.Tensor:
    """Load an initial expert map: one row for all MoE layers, or one for each; every expert must be there."""
    table = torch.tensor(json.loads(path.read_text()), dtype=torch.int64)
    if table.dim() == 1:
        table = table.unsqueeze(0).expand(num_moe_layers, -1)
    if tuple(table.shape) != (num_moe_layers, num_experts + num_redundant):
        raise ValueError(f"initial expert map has shape {tuple(table.shape)}")
    if int(table.min()) < 0 or int(table.max()) >= num_experts:
        raise ValueError("initial expert map names experts that are not there")
    for row in table:
        if len(torch.unique(row)) != num_experts:
            raise ValueError("initial expert map leaves experts out")
    return table


def vllm_expert_ranks(path: Path, *, num_experts: int, ep_size: int) -> list[list[int]]:
    """Load an expert placement file; return the experts of each rank, in local order."""
    ranks = json.loads(path.read_text())["expert_to_ep_rank"]
    if len(ranks) != num_experts or not all(0 <= rank < ep_size for rank in ranks):
        raise ValueError("expert_to_ep_rank does not fit")
    return [[expert for expert, rank in enumerate(ranks) if rank == here] for here in range(ep_size)]


# ------------------------------------------------------------------------------------------ contiguous shards


def contiguous_shards(num_experts: int, num_ranks: int) -> list[list[int]]:
    """Return the positions that each rank loads from a checkpoint, as Megatron-LM and DeepSpeed do."""
    share = num_experts // num_ranks
    return [list(range(rank * share, (rank + 1) * share)) for rank in range(num_ranks)]
