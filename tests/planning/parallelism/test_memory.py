"""What a stage holds: layers, checkpointing, sharding, virtual stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.errors import InputError
from placement.model_shape import ModelShape
from placement.planning.parallelism import Checkpointing, Mesh, StateBytes, Strategy, TrainingJob
from placement.planning.parallelism.layers import stage_layers
from placement.planning.parallelism.memory import stage_memory
from placement.planning.transformer import TransformerShape

# Four decoder layers, of which the second and the fourth hold experts.
MOE = ModelShape(
    name="m", num_layers=2, num_experts=4, top_k=2, hidden_size=10, expert_hidden_size=6,
    num_shared_experts=1, num_decoder_layers=4, moe_layer_ids=(1, 3),
)  # fmt: skip
SHAPE = TransformerShape(moe=MOE, num_attention_heads=5, dense_hidden_size=20, vocabulary_size=100)
JOB = TrainingJob(transformer=SHAPE, sequence_length=8, global_batch=16)
STRATEGY = Strategy(mesh=Mesh(pipeline=2, expert=2), micro_batch=1, num_micro_batches=8)


def test_parts_by_hand() -> None:
    """States and activations of two stages, by hand."""
    memory = stage_memory(JOB, STRATEGY, stage_layers(MOE, pipeline=2))
    # Two layers of 4 * 100 weights; one MoE layer with two of four experts of 3 * 60 weights.
    assert memory.attention_P.tolist() == [16 * 800] * 2
    assert memory.experts_P.tolist() == [16 * 2 * 180] * 2
    # A shared expert (180), a dense layer (3 * 10 * 20 = 600), embedding or head (1000).
    assert memory.dense_P.tolist() == [16 * 1780] * 2
    # 8 tokens: attention 12 * 80 = 960 a layer; MoE layer 2 * 8 * 3 * (18 + 10) = 1344; dense layer
    # 2 * 8 * (60 + 10) = 1120: 4384 in all, for two micro-batches on the first stage.
    assert memory.activations_P.tolist() == [2 * 4384, 4384]
    assert memory.working_P.tolist() == [0, 0]
    assert memory.peak_bytes == 16 * (800 + 360 + 1780) + 2 * 4384
    assert memory.fullest_stage == 0


def test_full_checkpointing_keeps_inputs() -> None:
    """Full checkpointing keeps 2 bytes for each number that enters a layer, and one layer at work."""
    strategy = replace(STRATEGY, checkpointing=Checkpointing.FULL)
    memory = stage_memory(JOB, strategy, stage_layers(MOE, pipeline=2))
    # Two layers of 2 * 8 * 10; the larger layer is the MoE one, 960 + 1344.
    assert memory.activations_P.tolist() == [2 * 320, 320]
    assert memory.working_P.tolist() == [2304] * 2


def test_selective_checkpointing_drops_the_scores() -> None:
    """Without FlashAttention scores take 4 H s^2 bytes a layer, and selective checkpointing none."""
    job = replace(JOB, flash_attention=False)
    layers = stage_layers(MOE, pipeline=2)
    whole = stage_memory(job, STRATEGY, layers)
    dropped = stage_memory(job, replace(STRATEGY, checkpointing=Checkpointing.SELECTIVE), layers)
    flash = stage_memory(JOB, STRATEGY, layers)
    # Two layers, 4 * 5 heads * 64 pairs of tokens.
    assert (whole.activations_P - dropped.activations_P).tolist() == [2 * 2 * 1280, 2 * 1280]
    assert dropped.activations_P.tolist() == flash.activations_P.tolist()


def test_sharding_splits_the_optimizer() -> None:
    """ZeRO-1 splits 12 of 16 bytes over equal copies: attention over EP x DP, experts over DP."""
    job = replace(JOB, shard_optimizer=True)
    strategy = replace(STRATEGY, mesh=Mesh(pipeline=2, expert=2, data=3))
    memory = stage_memory(job, strategy, stage_layers(MOE, pipeline=2))
    assert memory.attention_P.tolist() == [(4 + 12 / 6) * 800] * 2
    assert memory.experts_P.tolist() == [(4 + 12 / 3) * 360] * 2


def test_tensor_parallelism_divides_everything() -> None:
    """Two tensor-parallel devices hold half of states and activations each."""
    layers = stage_layers(MOE, pipeline=2)
    one = stage_memory(JOB, STRATEGY, layers)
    two = stage_memory(JOB, replace(STRATEGY, mesh=Mesh(pipeline=2, expert=2, tensor=2)), layers)
    assert two.total_P == pytest.approx(one.total_P / 2)


@pytest.mark.parametrize(
    ("pipeline", "parts", "decoder", "moe"),
    [
        (1, 1, ((0, 1, 2, 3),), ((0, 1),)),
        (3, 1, ((0, 1), (2,), (3,)), ((0,), (), (1,))),
        (2, 2, ((0, 2), (1, 3)), ((), (0, 1))),
    ],
)
def test_layers_of_stages(
    pipeline: int, parts: int, decoder: tuple[tuple[int, ...], ...], moe: tuple[tuple[int, ...], ...]
) -> None:
    """The first stages are the longer ones, and virtual stages take every PP-th part."""
    layers = stage_layers(MOE, pipeline=pipeline, virtual_stages=parts)
    assert (layers.decoder_layers, layers.moe_layers) == (decoder, moe)
    assert layers.num_layers_P.tolist() == [len(stage) for stage in decoder]


def test_a_mesh_needs_sizes_of_one_or_more() -> None:
    """Sizes, batches and bytes out of range are refused by name."""
    with pytest.raises(InputError, match="expert parallelism is 0"):
        Mesh(pipeline=1, expert=0)
    with pytest.raises(InputError, match="global_batch is 0"):
        replace(JOB, global_batch=0)
    with pytest.raises(InputError, match="optimizer is -1"):
        StateBytes(optimizer=-1.0)
    with pytest.raises(InputError, match="weights is 0"):
        StateBytes(weights=0.0)


def test_weights_and_flops_of_a_job() -> None:
    """Weights, and 6 FLOPs for each that a token visits plus the scores."""
    # 4 * 400 + 2 * (4 + 1) * 180 + 2 * 600 + 2 * 1000
    assert JOB.num_params == 1600 + 1800 + 1200 + 2000
    # Active: 1600 + 2 * (2 + 1) * 180 + 1200 + 1000 (the embedding is looked up); scores 2 s d = 160 a layer.
    assert JOB.forward_flops_per_token == 2 * (1600 + 1080 + 1200 + 1000) + 4 * 160
    assert JOB.model_flops_per_step == 3 * 16 * 8 * JOB.forward_flops_per_token
