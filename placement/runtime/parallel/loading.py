"""Loads a checkpoint shard by shard: each rank reads its own experts, and never holds those of others.

Transformers builds the model and converts what is stored (experts one by one, fused, transposed) into its own
tensors. It is given a model whose expert tensors have one row for each slot of the rank, and a state dict
where the rank's experts are numbered by those rows; it never sees another expert.

Shape letters: L MoE layers, S slots, C rows of the rank (slots of its device).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from placement.checkpoint.shards import find_shards
from placement.checkpoint.survey import survey_checkpoint
from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.runtime.checkpoint import read_config
from placement.runtime.families.protocol import MoELayer
from placement.runtime.families.registry import family_of, moe_layers_of
from placement.runtime.fit import check_fit
from placement.runtime.parallel.loading_model import (
    empty_model,
    load_rows,
    plain_config,
    set_rows,
    usable_device,
)
from placement.runtime.parallel.loading_tensors import TensorFiles, check_experts, local_tensors
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import Execution, ParallelModel, attach_local
from placement.runtime.parallel.patience import FILES_S, Patience
from placement.runtime.parallel.slots import rows_of_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_expert_parallel", "load_local_rows"]

IntArray = npt.NDArray[np.int64]


def load_expert_parallel(
    checkpoint_dir: str | Path,
    placement: Placement,
    mesh: Mesh,
    *,
    execution: Execution | None = None,
    dtype: torch.dtype | None = None,
    timeout_s: float = FILES_S,
) -> ParallelModel:
    """Load a checkpoint so that every rank holds the experts of its device, and run it expert-parallel.

    Every rank of the mesh has to call this with the same placement.

    Parameters
    ----------
    checkpoint_dir
        Folder with ``config.json`` and safetensors, readable by every rank.
    mesh
        The ranks; rank `r` holds device `r` of the placement.
    execution
        How it runs; see `expert_parallel`.
    dtype
        Type of the weights; None keeps the stored one.
    timeout_s
        Seconds to wait for the slowest rank.

    Raises
    ------
    InputError
        On every rank, if one cannot load its part, or ranks and placement do not fit: see `load_local_rows`
        and `expert_parallel`.
    """
    mesh.check_devices(placement.num_devices)
    with Patience(mesh, timeout_s=timeout_s).together():
        model = load_local_rows(checkpoint_dir, placement, mesh.rank, dtype=dtype, device=mesh.device)
    return attach_local(model, placement, mesh, execution=execution)


def load_local_rows(
    checkpoint_dir: str | Path,
    placement: Placement,
    rank: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a model with the experts of one device of a placement alone, in evaluation mode.

    The expert tensors of every MoE layer have a row for each slot of the device, ``[C, ...]``, in slot order;
    an empty slot's row is zeros. All else is as in the checkpoint. Of the experts' bytes only those of the
    device are read; fp8 and mxfp4 become plain weights. Such a model cannot run by itself: its routers still
    choose among all experts.

    Parameters
    ----------
    checkpoint_dir
        Folder with ``config.json`` and safetensors.
    rank
        Device of the placement.
    dtype
        Type of the weights; None keeps the stored one.
    device
        Torch device that the weights are put on.

    Raises
    ------
    InputError
        If the folder is no checkpoint of a supported family, placement and model do not fit together, tensors
        are missing, left over, truncated or of the wrong shape, or the device cannot be used.
    """
    folder = Path(checkpoint_dir)
    if not 0 <= rank < placement.num_devices:
        raise InputError(f"rank {rank} is none of the placement's {placement.num_devices} devices")
    target = usable_device(device)
    config = plain_config(read_config(folder), folder)
    empty = empty_model(config, folder)
    layers = moe_layers_of(empty)
    check_fit(family_of(empty), layers, placement)
    shards = find_shards(folder)
    survey = survey_checkpoint(shards)
    check_experts(survey, tuple(layer.decoder_layer for layer in layers), placement.num_experts)
    slots_C = rows_of_rank(placement, rank)
    with TensorFiles(shards) as files:
        model = load_rows(
            type(empty),
            config,
            local_tensors(
                files,
                survey,
                _experts(placement, slots_C, layers),
                num_layers=config.get_text_config().num_hidden_layers,
            ),
            folder,
            # Converters stack what they find, and cannot stack nothing.
            num_rows=max(1, slots_C.size),
            dtype=dtype,
            device=target,
        )
    if not slots_C.size:
        set_rows(model, 0)
    return model


def _experts(placement: Placement, slots_C: IntArray, layers: tuple[MoELayer, ...]) -> dict[int, IntArray]:
    """Return the expert of each row by decoder layer; a device without slots borrows an empty one."""
    if not slots_C.size:
        return {layer.decoder_layer: np.array([EMPTY]) for layer in layers}
    return {
        layer.decoder_layer: placement.physical_to_logical_map_LS[index, slots_C]
        for index, layer in enumerate(layers)
    }
