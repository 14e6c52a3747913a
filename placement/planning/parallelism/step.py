"""What one training step takes under a strategy, taken apart.

Shape letters: P stages, L MoE layers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.planning.parallelism.compute import DeviceSpeed
from placement.planning.parallelism.job import TrainingJob
from placement.planning.parallelism.layers import StageLayers
from placement.planning.parallelism.network import Network
from placement.planning.parallelism.schedule import pipeline_s
from placement.planning.parallelism.strategy import Checkpointing, Strategy

__all__ = ["StepTime", "step_time"]

FloatArray = npt.NDArray[np.float64]

PASSES = 3.0
"""Forward, and twice as much backward: gradients of inputs and of weights."""

HALF_PRECISION_BYTES = 2.0
"""Bytes of an activation that travels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTime:
    """Seconds of one step.

    Parameters
    ----------
    attention_P, experts_P, dense_P, exchange_P, tensor_P, sends_P
        Seconds of one micro-batch in each stage, forward and backward and what is computed again,
        ``[stages]``: attention; routed experts; shared experts, dense layers and the head; all-to-alls;
        all-reduces of tensor parallelism; sends to the next and the previous stage.
    gradients_s
        All-reduce of the gradients once a step.
    num_micro_batches, virtual_stages
        As in the strategy.
    """

    attention_P: FloatArray
    experts_P: FloatArray
    dense_P: FloatArray
    exchange_P: FloatArray
    tensor_P: FloatArray
    sends_P: FloatArray
    gradients_s: float
    num_micro_batches: int
    virtual_stages: int

    @cached_property
    def stage_P(self) -> FloatArray:
        """Seconds of one micro-batch in each stage, ``[stages]``."""
        return (
            self.attention_P + self.experts_P + self.dense_P + self.exchange_P + self.tensor_P + self.sends_P
        )

    @property
    def slowest_stage(self) -> int:
        """The stage that all others wait for."""
        return int(self.stage_P.argmax())

    @cached_property
    def pipeline_s(self) -> float:
        """Seconds of the pipeline."""
        return pipeline_s(
            float(self.stage_P.max()),
            pipeline=self.stage_P.size,
            num_micro_batches=self.num_micro_batches,
            virtual_stages=self.virtual_stages,
        )

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return self.pipeline_s + self.gradients_s

    def parts(self) -> dict[str, float]:
        """Return what the slowest stage spends its step on, seconds; their sum is `total_s`."""
        stage, count = self.slowest_stage, self.num_micro_batches
        busy = {
            "attention": self.attention_P,
            "experts": self.experts_P,
            "dense": self.dense_P,
            "all-to-all": self.exchange_P,
            "tensor all-reduce": self.tensor_P,
            "stage sends": self.sends_P,
        }
        parts = {name: count * float(part_P[stage]) for name, part_P in busy.items()}
        bubble_s = self.pipeline_s - count * float(self.stage_P[stage])
        return {**parts, "pipeline bubble": bubble_s, "gradients": self.gradients_s}


def step_time(
    job: TrainingJob,
    strategy: Strategy,
    layers: StageLayers,
    *,
    speed: DeviceSpeed,
    network: Network,
    factor_L: FloatArray | float = 1.0,
) -> StepTime:
    """Predict one step.

    Nothing overlaps: neither all-to-alls nor gradients hide behind compute.

    Parameters
    ----------
    speed
        Speed of a device on experts split over the strategy's tensor parallelism.
    factor_L
        Load of the fullest device over the mean in each MoE layer, ``[layers]``; 1 where loads are balanced.
        It stretches the experts and the exchange.
    """
    mesh, moe = strategy.mesh, job.transformer.moe
    tokens = strategy.micro_batch * float(job.sequence_length)
    passes = PASSES + (strategy.checkpointing is Checkpointing.FULL)
    # Forward and backward each exchange twice; computing again adds a forward pass.
    exchanges = 2.0 + (strategy.checkpointing is Checkpointing.FULL)
    factors_L = np.broadcast_to(np.asarray(factor_L, dtype=np.float64), (moe.num_layers,))
    experts_L = passes * speed.experts_s(
        job,
        pairs=tokens * moe.top_k,
        experts_here=moe.num_experts / mesh.expert,
        factor_L=factors_L,
    )
    exchange_L = exchanges * _exchange_L(job, strategy, network, tokens, factors_L)
    return StepTime(
        attention_P=np.asarray(layers.num_layers_P * _attention_s(job, strategy, speed, tokens, passes)),
        experts_P=_by_stage(experts_L, layers),
        dense_P=passes * _dense_P(job, strategy, layers, speed, tokens),
        exchange_P=_by_stage(exchange_L, layers),
        tensor_P=exchanges * _tensor_P(job, strategy, layers, network, tokens),
        sends_P=_sends_P(job, strategy, network, tokens),
        gradients_s=_gradients_s(job, strategy, layers, network),
        num_micro_batches=strategy.num_micro_batches,
        virtual_stages=strategy.virtual_stages,
    )


def _by_stage(value_L: FloatArray, layers: StageLayers) -> FloatArray:
    return np.array([value_L[list(stage)].sum() for stage in layers.moe_layers])


def _attention_s(
    job: TrainingJob, strategy: Strategy, speed: DeviceSpeed, tokens: float, passes: float
) -> float:
    share = tokens / strategy.mesh.tensor
    seconds = passes * speed.attention_s(job, tokens=share)
    if strategy.checkpointing is Checkpointing.SELECTIVE:
        seconds += speed.scores_s(job, tokens=share)
    return seconds


def _dense_P(
    job: TrainingJob, strategy: Strategy, layers: StageLayers, speed: DeviceSpeed, tokens: float
) -> FloatArray:
    """Forward seconds of shared experts, dense layers and the head in each stage, ``[stages]``."""
    share = tokens / strategy.mesh.tensor
    shared_s = speed.matrices_s(job.transformer.shared_expert_params(), tokens=share)
    dense_s = speed.matrices_s(job.dense_params, tokens=share)
    dense_P = layers.num_moe_P * shared_s + (layers.num_layers_P - layers.num_moe_P) * dense_s
    dense_P[-1] += speed.matrices_s(job.embedding_params, tokens=share)
    return np.asarray(dense_P)


def _exchange_L(
    job: TrainingJob, strategy: Strategy, network: Network, tokens: float, factors_L: FloatArray
) -> FloatArray:
    """Seconds of one dispatch and combine in each layer, ``[layers]``.

    Tensor-parallel devices each carry their part of the tokens.
    """
    mesh, moe = strategy.mesh, job.transformer.moe
    pairs = tokens * moe.top_k / mesh.tensor
    distinct, index_L = np.unique(factors_L, return_inverse=True)
    seconds = [
        network.exchange_s(
            pairs * float(factor), count=mesh.expert, stride=mesh.tensor, exchange=strategy.exchange
        )
        for factor in distinct
    ]
    return np.asarray(seconds)[index_L]


def _tensor_P(
    job: TrainingJob, strategy: Strategy, layers: StageLayers, network: Network, tokens: float
) -> FloatArray:
    """Seconds of tensor parallelism's all-reduces in one forward pass of each stage, ``[stages]``.

    One after attention on the tokens and one after the feed-forward part (arXiv 1909.08053), which experts do
    on token-expert pairs.
    """
    mesh, moe = strategy.mesh, job.transformer.moe
    if mesh.tensor == 1:
        return np.zeros(mesh.pipeline)
    row_bytes = HALF_PRECISION_BYTES * moe.hidden_size * tokens
    token_s = network.all_reduce_s(row_bytes, count=mesh.tensor, stride=1)
    pair_s = network.all_reduce_s(row_bytes * moe.top_k, count=mesh.tensor, stride=1)
    num_dense_P = layers.num_layers_P - layers.num_moe_P
    return np.asarray(layers.num_layers_P * token_s + layers.num_moe_P * pair_s + num_dense_P * token_s)


def _sends_P(job: TrainingJob, strategy: Strategy, network: Network, tokens: float) -> FloatArray:
    """Seconds of sends between stages for one micro-batch, ``[stages]``.

    A stage sends results to the next one and gradients to the previous one, for each part of the model that
    it holds; between parts the last stage sends to the first.
    """
    mesh, parts = strategy.mesh, strategy.virtual_stages
    sends_P = np.zeros(mesh.pipeline)
    if mesh.pipeline == 1:
        return sends_P
    num_bytes = HALF_PRECISION_BYTES * job.transformer.moe.hidden_size * tokens / mesh.tensor
    first = [stage * mesh.devices_per_stage for stage in range(mesh.pipeline)]
    hop_s = [network.send_s(num_bytes, source=a, target=b) for a, b in itertools.pairwise(first)]
    sends_P[:-1] += parts * np.array(hop_s)
    sends_P[1:] += parts * np.array(hop_s)
    if parts > 1:
        sends_P[[0, -1]] += (parts - 1) * network.send_s(num_bytes, source=first[-1], target=first[0])
    return sends_P


def _gradients_s(job: TrainingJob, strategy: Strategy, layers: StageLayers, network: Network) -> float:
    """Seconds in which the slowest stage sums its gradients over devices with the same weights."""
    mesh, moe, shape = strategy.mesh, job.transformer.moe, job.transformer
    if mesh.num_sources == 1:
        return 0.0
    gradient = job.state.gradients / mesh.tensor
    num_dense_P = layers.num_layers_P - layers.num_moe_P
    replicated_P = (
        layers.num_layers_P * float(shape.attention_params)
        + layers.num_moe_P * float(shape.shared_expert_params())
        + num_dense_P * float(job.dense_params)
    )
    replicated_P[0] += job.embedding_params
    replicated_P[-1] += job.embedding_params
    experts = moe.num_experts / mesh.expert * moe.params_per_expert
    seconds = [
        network.all_reduce_s(gradient * replicated, count=mesh.num_sources, stride=mesh.tensor)
        + network.all_reduce_s(
            gradient * experts * moe_layers, count=mesh.data, stride=mesh.tensor * mesh.expert
        )
        for replicated, moe_layers in zip(replicated_P.tolist(), layers.num_moe_P.tolist(), strict=True)
    ]
    return max(seconds)
