"""How a training run is cut over devices: the mesh, and what is chosen on it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from placement.errors import InputError

__all__ = ["Checkpointing", "Exchange", "Mesh", "Strategy"]


class Checkpointing(StrEnum):
    """What of a layer's activations is kept for the backward pass."""

    NONE = "none"
    """All of them."""
    SELECTIVE = "selective"
    """All but the attention scores, which are computed again (arXiv 2205.05198, section 5)."""
    FULL = "full"
    """The layer's input alone; the whole forward pass, all-to-alls included, is done again."""


class Exchange(StrEnum):
    """How tokens travel to their experts and back."""

    FLAT = "flat"
    """Every device sends a message to every other device of its expert-parallel group."""
    HIERARCHICAL = "hierarchical"
    """Between nodes in one packed message for each pair of nodes, then inside the node (Piper's HALO)."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Mesh:
    """Devices by what they divide; numbered tensor first, then expert, data, and pipeline last.

    Parameters
    ----------
    pipeline
        Stages: consecutive parts of the layers.
    expert
        Devices over which a layer's experts are spread; attention is replicated over them, each with its
        own sequences (Piper, arXiv 2605.05049).
    tensor
        Devices over which each matrix is split.
    data
        Replicas of all of this.

    Raises
    ------
    InputError
        If a size is below 1.
    """

    pipeline: int
    expert: int
    tensor: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        for name in ("pipeline", "expert", "tensor", "data"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} parallelism is {getattr(self, name)}; it must be 1 or more")

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.pipeline * self.expert * self.tensor * self.data

    @property
    def devices_per_stage(self) -> int:
        """Devices that hold one stage."""
        return self.expert * self.tensor * self.data

    @property
    def num_sources(self) -> int:
        """Devices of a stage that work on sequences of their own (tensor-parallel devices share theirs)."""
        return self.expert * self.data

    def __str__(self) -> str:
        text = f"PP{self.pipeline} x EP{self.expert}"
        text += f" x TP{self.tensor}" if self.tensor > 1 else ""
        return text + (f" x DP{self.data}" if self.data > 1 else "")

    def to_dict(self) -> dict[str, int]:
        """Return the sizes by name."""
        return {
            "pipeline": self.pipeline, "expert": self.expert, "tensor": self.tensor, "data": self.data,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A mesh and how it is used.

    Parameters
    ----------
    mesh
        The mesh.
    micro_batch
        Sequences of one micro-batch on each device with sequences of its own.
    num_micro_batches
        Micro-batches of a step.
    virtual_stages
        Parts of the model that each device holds; above 1 the schedule is interleaved.
    checkpointing, exchange
        What is kept for the backward pass, and how tokens travel.
    """

    mesh: Mesh
    micro_batch: int
    num_micro_batches: int
    virtual_stages: int = 1
    checkpointing: Checkpointing = Checkpointing.NONE
    exchange: Exchange = Exchange.FLAT

    def __str__(self) -> str:
        parts = [str(self.mesh), f"{self.num_micro_batches} x {self.micro_batch} sequences"]
        if self.virtual_stages > 1:
            parts.append(f"{self.virtual_stages} virtual stages")
        if self.checkpointing is not Checkpointing.NONE:
            parts.append(f"{self.checkpointing} checkpointing")
        if self.exchange is not Exchange.FLAT:
            parts.append(f"{self.exchange} all-to-all")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            **self.mesh.to_dict(),
            "micro_batch": self.micro_batch,
            "num_micro_batches": self.num_micro_batches,
            "virtual_stages": self.virtual_stages,
            "checkpointing": str(self.checkpointing),
            "exchange": str(self.exchange),
        }
