"""Files of measured layers for tests: a calibration by round numbers, CSVs that agree with predictions."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from placement.calibration import MeasuredCalibration, calibration_from_dict
from placement.cost.layer_time import LayerCounts, LayerTime, predict_layer
from placement.model_shape import ModelShape

CURVES: dict[str, Any] = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "world_size": 2,
    "dtype": "bfloat16",
    # 20 us, then 100 GB/s: an even exchange of 2 ranks sends half of its bytes away.
    "all_to_all_ms_by_MiB_sent_per_rank": [[mib, 0.02 + mib * 2**19 / 1e8] for mib in (0, 1, 16, 256)],
    "expert_ffn_ms": {
        # 8 experts: 0.8 ms up to 256 tokens, then 0.4 ms for each 128.
        "small": [
            {"tokens_per_expert": 1, "local_experts": 8, "ms": 0.8},
            {"tokens_per_expert": 256, "local_experts": 8, "ms": 0.8},
            {"tokens_per_expert": 1024, "local_experts": 8, "ms": 3.2},
        ]
    },
    "expert_shapes": {"small": {"hidden": 1000, "expert_hidden": 500}},
    # Rows then move at 0.9 x 2000 GB/s.
    "hbm_gb_s": 2000,
}

SHAPE = ModelShape(
    name="small", num_layers=1, num_experts=16, top_k=4, hidden_size=1000, expert_hidden_size=500
)


def curves(**entries: Any) -> MeasuredCalibration:
    """Return the calibration of `CURVES`, some entries replaced."""
    made = calibration_from_dict({**CURVES, **entries})
    assert isinstance(made, MeasuredCalibration)
    return made


def counts(
    pairs_RR: Sequence[Sequence[float]],
    *,
    tokens_RR: Sequence[Sequence[float]] | None = None,
    tokens: float = 1000,
    **others: Any,
) -> LayerCounts:
    """Return the counts of a layer whose 16 experts are all busy."""
    ranks = len(pairs_RR)
    return LayerCounts(
        pairs_RR=np.array(pairs_RR),
        tokens_RR=None if tokens_RR is None else np.array(tokens_RR),
        tokens_R=np.full(ranks, tokens),
        active_R=np.full(ranks, 16 / ranks),
        local_R=np.full(ranks, 16 / ranks),
        **others,
    )


def layer_row(
    layer: LayerCounts, *, dedup: bool, slower: float = 1.0, calibration: MeasuredCalibration | None = None
) -> dict[str, Any]:
    """Return a CSV row of a layer that took so many times what is predicted."""
    time = predict_layer(SHAPE, layer, calibration or curves(), dedup=dedup)
    ranks = range(layer.num_ranks)
    return {
        "transport": "wire",
        "shape": SHAPE.name,
        "hidden": SHAPE.hidden_size,
        "expert_hidden": SHAPE.expert_hidden_size,
        "experts": SHAPE.num_experts,
        "top_k": SHAPE.top_k,
        "tokens_per_rank": float(layer.tokens_R[0]),
        "dedup": int(dedup),
        **{f"pairs_{a}{b}": layer.pairs_RR[a, b] for a in ranks for b in ranks},
        **{
            f"tokens_{a}{b}": 0.0 if layer.tokens_RR is None else layer.tokens_RR[a, b]
            for a in ranks
            for b in ranks
        },
        **_times(time, layer.num_ranks, slower),
    }


def _times(time: LayerTime, num_ranks: int, slower: float) -> dict[str, float]:
    """Phases and totals in ms; the first rank waits 1 ms in the exchanges, the others are quicker before."""
    times: dict[str, float] = {}
    for rank in range(num_ranks):
        for phase, seconds in time.phases().items():
            waits = rank == 0 and phase in ("dispatch", "combine")
            times[f"{phase}_ms_rank{rank}"] = 1e3 * slower * seconds + waits
        times[f"total_ms_rank{rank}"] = 1e3 * slower * time.total_s - 0.001 * rank
    return times


def write_layers(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as a CSV; return its path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
