"""Which layers a stage holds.

Shape letter: P stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.model_shape import ModelShape

__all__ = ["StageLayers", "stage_layers"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageLayers:
    """Layers of every stage.

    Parameters
    ----------
    decoder_layers
        Decoder layers of each stage, ascending.
    moe_layers
        MoE layers among them, counted among the MoE layers alone.
    num_layers_P, num_moe_P
        How many there are of each, ``[stages]``.
    """

    decoder_layers: tuple[tuple[int, ...], ...]
    moe_layers: tuple[tuple[int, ...], ...]
    num_layers_P: IntArray
    num_moe_P: IntArray


def stage_layers(model: ModelShape, *, pipeline: int, virtual_stages: int = 1) -> StageLayers:
    """Cut the decoder layers into equal consecutive parts, the first ones longer where they do not divide.

    The first stage then holds ``ceil(L / PP)`` layers. With several virtual stages, stage i holds the parts
    i, i + PP, i + 2 PP, ... (arXiv 2104.04473, section 2.2).
    """
    num_parts = pipeline * virtual_stages
    parts = np.array_split(np.arange(model.num_decoder_layers), num_parts)
    moe_index = {decoder_layer: index for index, decoder_layer in enumerate(model.moe_layer_ids)}
    decoder = tuple(
        tuple(int(layer) for part in parts[stage::pipeline] for layer in part) for stage in range(pipeline)
    )
    moe = tuple(tuple(moe_index[layer] for layer in stage if layer in moe_index) for stage in decoder)
    return StageLayers(
        decoder_layers=decoder,
        moe_layers=moe,
        num_layers_P=np.array([len(stage) for stage in decoder], dtype=np.int64),
        num_moe_P=np.array([len(stage) for stage in moe], dtype=np.int64),
    )
