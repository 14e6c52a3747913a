"""Figures that Piper (arXiv 2605.05049) and X-MoE (arXiv 2508.13337) publish, and the shapes they are of.

Attention weights of the models of figures 11 and 12 follow from their published ``config.json``
(grouped-query heads; latent attention for DeepSeek-V2). Embeddings are left out, as in Piper's formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.model import preset_model
from placement.model_shape import ModelShape
from placement.planning.parallelism import Checkpointing
from placement.planning.transformer import TransformerShape
from placement.topology import Topology

__all__ = [
    "FRAMEWORKS_TFLOPS",
    "FULL_MODELS",
    "MEMORY_ROWS",
    "MIGRATION_ROWS",
    "PEAK_TFLOPS",
    "WEAK_SCALING_TFLOPS",
    "XMOE_PARAMS_B",
    "FullModel",
    "MigrationRow",
    "frontier",
    "xmoe",
]

PEAK_TFLOPS = 191.5
"""Peak of one graphics die of MI250X, which Piper calls a GPU."""

MIGRATION_GB_S = 50.0
"""Bandwidth of table IV, GB/s."""


def _moe(name: str, layers: int, experts: int, k: int, d: int, f: int, *, matrices: int = 3) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=layers,
        num_experts=experts,
        top_k=k,
        hidden_size=d,
        expert_hidden_size=f,
        matrices_per_expert=matrices,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRow:
    """A row of table IV: what a device sends when a layer's experts all change places, and how long."""

    shape: ModelShape
    printed_size: float
    unit_bytes: float
    printed_ms: float


GB, GIB = 1e9, 2.0**30

# Layers and k play no part in the table. The unit is the one in which the formula meets the print: it mixes
# GB and GiB. Switch-Base has two matrices per expert; GLaM's shape is that of its 64B/64E model.
MIGRATION_ROWS = (
    MigrationRow(
        shape=_moe("switch-base", 12, 128, 1, 768, 3072, matrices=2),
        printed_size=1.21, unit_bytes=GB, printed_ms=24.2,
    ),
    MigrationRow(
        shape=preset_model("mixtral-8x7b"), printed_size=2.63, unit_bytes=GIB, printed_ms=52.6
    ),
    MigrationRow(
        shape=preset_model("mixtral-8x22b"), printed_size=4.50, unit_bytes=GIB, printed_ms=90.0
    ),
    MigrationRow(
        shape=_moe("grok-1", 64, 8, 2, 6144, 32768), printed_size=9.00, unit_bytes=GIB, printed_ms=180.0
    ),
    MigrationRow(
        shape=_moe("glam-64e", 32, 64, 2, 8192, 32768), printed_size=102.88, unit_bytes=GB, printed_ms=2057.6
    ),
    MigrationRow(
        shape=preset_model("deepseek-v2"), printed_size=7.04, unit_bytes=GIB, printed_ms=140.8
    ),
    MigrationRow(
        shape=preset_model("deepseek-v3"), printed_size=21.00, unit_bytes=GIB, printed_ms=420.0
    ),
)  # fmt: skip

# Hidden size, inner width, experts, k, layers.
_XMOE = {
    "small": (2048, 1408, 64, 6, 28),
    "medium": (5120, 1536, 128, 6, 28),
    "large": (7168, 2048, 256, 8, 28),
    "super": (7168, 2560, 256, 8, 61),
}

XMOE_PARAMS_B = {
    "small": (10.1, 10.8, 16), "medium": (55.2, 59.3, 87),
    "large": (201.4, 216, 321), "super": (545.4, 586, 872),
}  # fmt: skip
"""Billions of weights: as published; by the formula with two matrices per expert; with three."""


def xmoe(size: str, *, matrices: int = 2) -> TransformerShape:
    """Return one of X-MoE's models; only two matrices per expert add up to its published sizes."""
    d, f, experts, k, layers = _XMOE[size]
    shape = _moe(f"x-moe-{size}", layers, experts, k, d, f, matrices=matrices)
    return TransformerShape(moe=shape, num_attention_heads=d // 128)


MEMORY_ROWS = (
    ("medium", 32, 1, 75.2, False), ("medium", 16, 2, 51.7, True), ("medium", 8, 4, 39.9, True),
    ("large", 16, 5, 64.8, False), ("large", 8, 10, 55.0, True),
    ("super", 256, 2, 120.1, False), ("super", 128, 4, 71.4, False), ("super", 64, 8, 45.1, True),
    ("super", 32, 16, 31.9, True), ("super", 16, 32, 25.4, True),
)  # fmt: skip
"""X-MoE's models on 64 GB: size, EP, PP, GB of states on the first stage, whether they fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FullModel:
    """A model of figures 11 and 12: TFLOP/s of one layer in one node, and of the whole model."""

    name: str
    shape: TransformerShape
    layer_tflops: float
    full_tflops: float
    checkpointing: Checkpointing


def _grouped(d: int, heads: int, kv_heads: int) -> int:
    """Weights of grouped-query attention with heads of 128."""
    return 2 * d * heads * 128 + 2 * d * kv_heads * 128


# Query: d x 1536 and 1536 x 128 heads of 192; keys and values: d x (512 + 64) and 512 x 128 heads of 256;
# out: 128 heads of 128 x d.
_LATENT_V2 = 5120 * 1536 + 1536 * 128 * 192 + 5120 * 576 + 512 * 128 * 256 + 128 * 128 * 5120

NONE, FULL = Checkpointing.NONE, Checkpointing.FULL

FULL_MODELS = (
    FullModel(
        name="Mixtral-8x7B",
        shape=TransformerShape(
            moe=preset_model("mixtral-8x7b"), num_attention_heads=32, attention_params=_grouped(4096, 32, 8)
        ),
        layer_tflops=117.5, full_tflops=102.8, checkpointing=NONE,
    ),
    FullModel(
        name="Llama-4-Scout",
        shape=TransformerShape(
            moe=preset_model("llama-4-scout"), num_attention_heads=40, attention_params=_grouped(5120, 40, 8)
        ),
        layer_tflops=109.6, full_tflops=74.2, checkpointing=NONE,
    ),
    FullModel(
        name="Mixtral-8x22B",
        shape=TransformerShape(
            moe=preset_model("mixtral-8x22b"), num_attention_heads=48, attention_params=_grouped(6144, 48, 8)
        ),
        layer_tflops=129.4, full_tflops=55.4, checkpointing=FULL,
    ),
    FullModel(
        name="DeepSeek-V2",
        shape=TransformerShape(
            moe=preset_model("deepseek-v2"), num_attention_heads=128, attention_params=_LATENT_V2,
            dense_hidden_size=12288,
        ),
        layer_tflops=78.3, full_tflops=46.8, checkpointing=FULL,
    ),
    FullModel(
        name="Llama-4-Maverick",
        shape=TransformerShape(
            moe=preset_model("llama-4-maverick"), num_attention_heads=40,
            attention_params=_grouped(5120, 40, 8), dense_hidden_size=16384,
        ),
        layer_tflops=112.4, full_tflops=37.8, checkpointing=FULL,
    ),
)  # fmt: skip
"""In the order of the full models' utilisation as published."""

FRAMEWORKS_TFLOPS = {
    "10.1B": (44.0, 90.44),
    "55.2B": (24.2, 57.83),
    "201.4B": (24.1, 46.89),
    "545.4B": (10.2, 36.96),
}
"""TFLOP/s of a GPU under X-MoE and under Piper, by size of the model."""

WEAK_SCALING_TFLOPS = {"110B": 45.15, "862B": 39.38, "1.7T": 33.04}
"""TFLOP/s of a GPU on 64, 512 and 1,024."""


def frontier(nodes: int, *, layer_tflops: float | None = None) -> Topology:
    """Return nodes of 8 graphics dies of MI250X; `layer_tflops` for the FLOP/s that they achieve."""
    kind: dict[str, object] = {"base": "mi250x-gcd"}
    if layer_tflops is not None:
        kind["measured_tflops"] = layer_tflops
    values = {
        "name": f"frontier-{nodes}x8",
        "device_kinds": {"gcd": kind},
        "nodes": [{"kind": "gcd", "devices": 8, "count": nodes}],
    }
    return Topology.from_dict(values, source="frontier")
