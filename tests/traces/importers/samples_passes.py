"""Tiny samples of what TensorRT-LLM, Megatron-LM and vllm-ascend dump, written as they write it.

`Recording` is what several ranks routed pass by pass; each engine's writer puts it down in its own way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.trace import Trace

__all__ = [
    "Recording",
    "megatron_lines",
    "write_heat",
    "write_megatron",
    "write_tensorrt_counts",
    "write_tensorrt_meta",
    "write_tensorrt_raw",
]

IntArray = npt.NDArray[np.int64]


@dataclass(kw_only=True)
class Recording:
    """What the ranks of a cluster routed.

    Parameters
    ----------
    num_ranks, num_steps, num_passes
        Ranks, and the forward passes that all of them run: so many in each step.
    layers
        Decoder layers that route.
    num_experts, top_k
        Experts per layer and per token.
    num_tokens
        Tokens of a pass on rank 0; rank r has r more, step s another s.
    """

    num_ranks: int = 2
    num_steps: int = 3
    num_passes: int = 1
    layers: tuple[int, ...] = (1, 2, 3)
    num_experts: int = 6
    top_k: int = 2
    num_tokens: int = 5
    seed: int = 0
    ids: dict[tuple[int, int, int], IntArray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.ids = {}
        for step, part, rank in self.keys():
            order = rng.random((self.num_tokens + rank + step, len(self.layers), self.num_experts)).argsort(
                axis=2
            )
            self.ids[step, part, rank] = order[:, :, : self.top_k].astype(np.int64)

    def keys(self) -> Iterator[tuple[int, int, int]]:
        """Yield step, pass and rank in the order in which they ran."""
        for step in range(self.num_steps):
            for part in range(self.num_passes):
                for rank in range(self.num_ranks):
                    yield step, part, rank

    def trace(self, **about: Any) -> Trace:
        """Return the trace that a reader must give, every pass's ranks interleaved."""
        parts = []
        for step in range(self.num_steps):
            for part in range(self.num_passes):
                ids = [self.ids[step, part, rank] for rank in range(self.num_ranks)]
                rank_T = np.repeat(np.arange(self.num_ranks), [len(each) for each in ids])
                parts.append(self._trace(np.concatenate(ids), rank_T, about).interleave_ranks())
        experts = np.concatenate([each.experts_TLK for each in parts])
        return self._trace(experts, np.concatenate([each.rank_T for each in parts]), about)

    def _trace(self, ids: IntArray, rank_T: Any, about: Mapping[str, Any]) -> Trace:
        given = {"num_experts": self.num_experts, "moe_layer_ids": self.layers, **about}
        return Trace(experts_TLK=ids, rank_T=rank_T, **given)

    def load_ILE(self) -> IntArray:
        """Return pairs of all ranks, ``[steps, layers, experts]``."""
        load = np.zeros((self.num_steps, len(self.layers), self.num_experts), dtype=np.int64)
        for (step, _, _), ids in self.ids.items():
            for layer in range(len(self.layers)):
                load[step, layer] += np.bincount(ids[:, layer].ravel(), minlength=self.num_experts)
        return load


def write_tensorrt_meta(folder: Path, recording: Recording, **changes: Any) -> None:
    """Write ``meta_info.json`` as rank 0 does."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"num_experts": recording.num_experts, "num_experts_per_token": recording.top_k}
    (folder / "meta_info.json").write_text(json.dumps({**meta, **changes}))


def write_tensorrt_counts(folder: Path, recording: Recording, *, first: int = 50) -> Path:
    """Write the counts of every rank."""
    from safetensors.numpy import save_file

    write_tensorrt_meta(folder, recording)
    for rank in range(recording.num_ranks):
        counts: dict[str, npt.NDArray[Any]] = {}
        for (step, _, owner), ids in recording.ids.items():
            for at, layer in enumerate(recording.layers):
                if owner == rank:
                    key = f"{first + step}_{layer}"
                    count = np.bincount(ids[:, at].ravel(), minlength=recording.num_experts)
                    counts[key] = counts.get(key, 0) + count
        save_file(counts, folder / f"rank{rank}.safetensors")
    return folder


def write_tensorrt_raw(folder: Path, recording: Recording, *, first: int = 50, padding: int = 0) -> Path:
    """Write the ids of every rank's tokens, padded with ids past the last expert."""
    from safetensors.numpy import save_file

    write_tensorrt_meta(folder, recording)
    for rank in range(recording.num_ranks):
        raw = {}
        for (step, _, owner), ids in recording.ids.items():
            if owner == rank:
                rows = np.full((padding, len(recording.layers), recording.top_k), recording.num_experts)
                rows[: padding // 2] = -1
                padded = np.concatenate([ids, rows]).astype(np.int32)
                for at, layer in enumerate(recording.layers):
                    raw[f"{first + step}_{layer}"] = np.ascontiguousarray(padded[:, at])
        save_file(raw, folder / f"rank{rank}_raw.safetensors")
    return folder


def megatron_lines(recording: Recording, rank: int) -> list[dict[str, Any]]:
    """Return the records of one rank in the order in which they are written."""
    lines = []
    for (step, _, owner), ids in recording.ids.items():
        if owner == rank:
            lines += [
                {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer,
                    "rank": rank,
                    "num_tokens": len(ids),
                    "topk": recording.top_k,
                    "top_indices": ids[:, at].tolist(),
                }
                for at, layer in enumerate(recording.layers)
            ]
    return lines


def write_megatron(folder: Path, recording: Recording) -> Path:
    """Write one file per rank."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(recording.num_ranks):
        text = "".join(json.dumps(line) + "\n" for line in megatron_lines(recording, rank))
        (folder / f"router_trace_rank{rank}.jsonl").write_text(text)
    return folder


def write_heat(path: Path, heat: Any, *, key: str | None = None) -> Path:
    """Write a table of counts as PyTorch does."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(heat))
    torch.save(tensor if key is None else {key: tensor}, path)
    return path
