"""What a device of each stage must hold: states, and the activations of micro-batches in flight.

The kernels are Piper's (arXiv 2605.05049): 12 bytes for each number of a token in attention, 4 bytes for each
head and pair of tokens without FlashAttention, 2 bytes for each number inside an expert. Both are counted for
the tokens and token-expert pairs of one device; experts of a balanced group receive as many pairs as the
device's own tokens make. Tensor parallelism divides states and activations (with sequence parallelism, arXiv
2205.05198).

Shape letter: P stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.planning.parallelism.job import TrainingJob
from placement.planning.parallelism.layers import StageLayers
from placement.planning.parallelism.strategy import Checkpointing, Mesh, Strategy

__all__ = ["StageMemory", "in_flight_micro_batches", "stage_memory"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class StageMemory:
    """Bytes on each device of every stage, by what they are for, ``[stages]`` each.

    Parameters
    ----------
    attention_P
        States of attention.
    experts_P
        States of the routed experts that the device holds.
    dense_P
        States of shared experts, dense layers, embedding and head.
    activations_P
        What micro-batches in flight keep for their backward pass.
    working_P
        Activations of the layer that is being computed again, under full checkpointing.
    """

    attention_P: FloatArray
    experts_P: FloatArray
    dense_P: FloatArray
    activations_P: FloatArray
    working_P: FloatArray

    @cached_property
    def total_P(self) -> FloatArray:
        """Peak of each stage, ``[stages]``."""
        return self.states_P + self.activations_P + self.working_P

    @property
    def states_P(self) -> FloatArray:
        """States alone, ``[stages]``."""
        return self.attention_P + self.experts_P + self.dense_P

    @property
    def peak_bytes(self) -> float:
        """Peak of the fullest stage."""
        return float(self.total_P.max())

    @property
    def fullest_stage(self) -> int:
        """The stage that needs the most."""
        return int(self.total_P.argmax())

    def parts(self) -> dict[str, FloatArray]:
        """Return the parts by name."""
        return {
            "attention states": self.attention_P,
            "expert states": self.experts_P,
            "dense states": self.dense_P,
            "activations": self.activations_P,
            "recomputed layer": self.working_P,
        }


def in_flight_micro_batches(*, pipeline: int, num_micro_batches: int, virtual_stages: int = 1) -> FloatArray:
    """Return how many micro-batches each stage keeps at its peak, in whole stages, ``[stages]``.

    1F1B: ``PP - i``. Interleaved: ``2 (PP - i - 1) + (v - 1) PP + 1`` parts of 1/v stage (arXiv 2104.04473;
    for the first stage ``1 + (PP - 1) / (PP v)`` times the layers' activations of PP micro-batches, arXiv
    2205.05198, section 4.2.3). Never more than there are.
    """
    stage_P = np.arange(pipeline)
    if virtual_stages == 1:
        return np.minimum(pipeline - stage_P, num_micro_batches).astype(np.float64)
    parts_P = 2 * (pipeline - stage_P - 1) + (virtual_stages - 1) * pipeline + 1
    return np.minimum(parts_P / virtual_stages, num_micro_batches)


def stage_memory(job: TrainingJob, strategy: Strategy, layers: StageLayers) -> StageMemory:
    """Return the bytes on each device of every stage."""
    mesh = strategy.mesh
    attention_P, experts_P, dense_P = _states(job, mesh, layers)
    in_flight_P = in_flight_micro_batches(
        pipeline=mesh.pipeline,
        num_micro_batches=strategy.num_micro_batches,
        virtual_stages=strategy.virtual_stages,
    )
    tokens = strategy.micro_batch * job.sequence_length / mesh.tensor
    whole_P, largest = _activations(job, strategy.checkpointing, tokens, layers)
    recomputes = strategy.checkpointing is Checkpointing.FULL
    inputs_P = 2.0 * tokens * job.transformer.moe.hidden_size * layers.num_layers_P
    return StageMemory(
        attention_P=attention_P,
        experts_P=experts_P,
        dense_P=dense_P,
        activations_P=in_flight_P * (inputs_P if recomputes else whole_P),
        working_P=np.full(mesh.pipeline, largest if recomputes else 0.0),
    )


def _states(job: TrainingJob, mesh: Mesh, layers: StageLayers) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Bytes of attention, routed experts, and all else, ``[stages]`` each."""
    shape, moe, state = job.transformer, job.transformer.moe, job.state
    replicated = state.sharded(mesh.num_sources) if job.shard_optimizer else state.total
    spread = state.sharded(mesh.data) if job.shard_optimizer else state.total
    num_dense_P = layers.num_layers_P - layers.num_moe_P
    dense_P = layers.num_moe_P * float(shape.shared_expert_params()) + num_dense_P * float(job.dense_params)
    dense_P[0] += job.embedding_params
    dense_P[-1] += job.embedding_params
    expert_params = moe.num_experts / mesh.expert * moe.params_per_expert
    return (
        np.asarray(replicated / mesh.tensor * shape.attention_params * layers.num_layers_P),
        np.asarray(spread / mesh.tensor * expert_params * layers.num_moe_P),
        np.asarray(replicated / mesh.tensor * dense_P),
    )


def _activations(
    job: TrainingJob, checkpointing: Checkpointing, tokens: float, layers: StageLayers
) -> tuple[FloatArray, float]:
    """Bytes that one micro-batch keeps in each stage, ``[stages]``, and those of the largest layer."""
    shape, moe = job.transformer, job.transformer.moe
    attention = 12.0 * tokens * moe.hidden_size
    if not job.flash_attention and checkpointing is not Checkpointing.SELECTIVE:
        attention += 4.0 * shape.num_attention_heads * tokens * job.sequence_length
    per_pair = moe.matrices_per_expert * moe.expert_hidden_size + moe.hidden_size
    experts = 2.0 * tokens * (moe.top_k + moe.num_shared_experts) * per_pair
    width = moe.matrices_per_expert * shape.dense_hidden_size
    dense = 2.0 * tokens * (width + moe.hidden_size) if width else 0.0
    num_dense_P = layers.num_layers_P - layers.num_moe_P
    whole_P = layers.num_layers_P * attention + layers.num_moe_P * experts + num_dense_P * dense
    return whole_P, attention + max(experts, dense)
