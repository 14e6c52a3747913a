"""Piper's formulas as published (arXiv 2605.05049), for who compares; the planner's own are beside them.

Symbols: d hidden size, f inner width of an expert, L layers, E routed experts, k experts per token, H heads,
s sequence length, b sequences, M micro-batches, PP stages, EP expert parallelism. Piper counts 16 bytes of
state for each weight, square attention matrices (``4 d^2`` weights) and three matrices per expert; the latter
and the bytes are parameters here.

Piper divides the experts' activations by EP and those of attention not: its b sequences are one device's
where attention is meant and those of the whole group where experts are. The planner counts what one device
holds in both (`placement.planning.parallelism.memory`).
"""

from __future__ import annotations

from placement.planning.parallelism.job import StateBytes
from placement.planning.transformer import TransformerShape

__all__ = [
    "all_to_all_bound_s",
    "expert_data_bytes",
    "memory_skew_bytes",
    "pipeline_stage_bytes",
    "undivided_bytes",
    "worst_migration_bytes",
]

STATE = StateBytes()


def _layer_state(shape: TransformerShape, expert: int, state: StateBytes) -> float:
    moe = shape.moe
    experts = moe.num_experts / expert * moe.params_per_expert
    return state.total * (shape.attention_params + experts)


def _layer_activations(
    shape: TransformerShape, *, batch: float, sequence_length: int, expert: int, flash: bool
) -> float:
    moe, tokens = shape.moe, batch * sequence_length
    scores = 0.0 if flash else 4.0 * shape.num_attention_heads * tokens * sequence_length
    per_pair = moe.matrices_per_expert * moe.expert_hidden_size + moe.hidden_size
    return 12.0 * tokens * moe.hidden_size + scores + 2.0 * tokens * moe.top_k / expert * per_pair


def undivided_bytes(
    shape: TransformerShape,
    *,
    batch: int,
    sequence_length: int,
    flash: bool = False,
    state: StateBytes = STATE,
) -> float:
    """Return Piper's M_u: bytes of the whole model's training on one device."""
    return expert_data_bytes(
        shape, batch=batch, sequence_length=sequence_length, expert=1, flash=flash, state=state
    )


def expert_data_bytes(
    shape: TransformerShape,
    *,
    batch: int,
    sequence_length: int,
    expert: int,
    flash: bool = False,
    state: StateBytes = STATE,
) -> float:
    """Return Piper's M_edp: bytes on each device when experts are spread and attention is replicated."""
    activations = _layer_activations(
        shape, batch=batch, sequence_length=sequence_length, expert=expert, flash=flash
    )
    return shape.num_layers * (_layer_state(shape, expert, state) + activations)


def pipeline_stage_bytes(
    shape: TransformerShape,
    *,
    stage: int,
    pipeline: int,
    expert: int,
    batch: int,
    num_micro_batches: int,
    sequence_length: int,
    flash: bool = False,
    state: StateBytes = STATE,
) -> float:
    """Return Piper's M_1F1B(i): bytes on each device of a stage under 1F1B; stage 0 needs the most."""
    activations = _layer_activations(
        shape,
        batch=batch / num_micro_batches,
        sequence_length=sequence_length,
        expert=expert,
        flash=flash,
    )
    in_flight = pipeline - stage
    return shape.num_layers / pipeline * (_layer_state(shape, expert, state) + in_flight * activations)


def memory_skew_bytes(
    shape: TransformerShape,
    *,
    pipeline: int,
    expert: int,
    batch: int,
    num_micro_batches: int,
    sequence_length: int,
    flash: bool = False,
) -> float:
    """Return Piper's difference in bytes between the first and the last stage under 1F1B."""
    activations = _layer_activations(
        shape,
        batch=batch / num_micro_batches,
        sequence_length=sequence_length,
        expert=expert,
        flash=flash,
    )
    return shape.num_layers * (pipeline - 1) / pipeline * activations


def all_to_all_bound_s(
    *, batch: float, sequence_length: int, top_k: int, hidden_size: int, expert: int, bandwidth: float
) -> float:
    """Return Piper's bound on dispatch and combine of one forward pass, seconds: ``4 b s k d / (EP B)``.

    b is here the sequences of the whole group, B bytes per second out of a device. The bound charges a
    device's message to itself too: what leaves it is (EP - 1) / EP of that.
    """
    return 4.0 * batch * sequence_length * top_k * hidden_size / (expert * bandwidth)


def worst_migration_bytes(shape: TransformerShape, *, num_devices: int, state: StateBytes = STATE) -> float:
    """Return the bytes that a device sends when all experts of a layer change places: ``48 E d f / G``."""
    return state.total * shape.moe.num_experts * shape.moe.params_per_expert / num_devices
