"""What permuting a checkpoint costs beside copying it: seconds and peak memory.

Run ``python -m benchmarks.checkpoint``. Checkpoints are made up: real layouts, names and proportions of large
models cut down to a few GiB, written as sparse files (their bytes read as zeros; what is written is real).
A permutation of all experts in all layers is applied in a fresh process, which reports how far its resident
memory peaked above what it had after importing. Beside it the same folder is copied file by file through the
kernel and forced to the disk, as the permuted one is. The last instance has as many tensors as Kimi-K2 and
hardly any bytes: what names alone cost.

Copy and permutation take turns; figures are minima over the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment

__all__ = ["main"]

ROUNDS = 2
SEED = 0
BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "U8": 1}

Entry = tuple[str, str, tuple[int, ...]]


def fused(*, layers: int, experts: int, hidden: int, inner: int) -> Iterator[list[Entry]]:
    """Yield the files of a model with one tensor for all experts of a matrix (Qwen3-VL, Llama-4)."""
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp"
        yield [
            (f"model.layers.{layer}.self_attn.q_proj.weight", "BF16", (hidden, hidden)),
            (f"{block}.experts.gate_up_proj", "BF16", (experts, hidden, 2 * inner)),
            (f"{block}.experts.down_proj", "BF16", (experts, inner, hidden)),
            (f"{block}.gate.weight", "BF16", (experts, hidden)),
        ]


def per_expert(
    *, layers: int, experts: int, hidden: int, inner: int, scales: bool = False
) -> Iterator[list[Entry]]:
    """Yield the files of a model with a tensor per expert and matrix (DeepSeek-V3, Kimi-K2), two a layer."""
    dtype = "F8_E4M3" if scales else "BF16"
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp"
        for half in range(2):
            entries: list[Entry] = []
            for expert in range(half, experts, 2):
                for matrix in ("gate_proj", "up_proj", "down_proj"):
                    name = f"{block}.experts.{expert}.{matrix}.weight"
                    entries.append((name, dtype, (inner, hidden)))
                    if scales:
                        blocks = (math.ceil(inner / 128), math.ceil(hidden / 128))
                        entries.append((f"{name}_scale_inv", "F32", blocks))
            if half == 0:
                entries += [
                    (f"{block}.gate.weight", "BF16", (experts, hidden)),
                    (f"{block}.gate.e_score_correction_bias", "F32", (experts,)),
                    (f"model.layers.{layer}.self_attn.o_proj.weight", "BF16", (hidden, hidden)),
                ]
            yield entries


INSTANCES: dict[str, tuple[int, int, list[list[Entry]]]] = {
    "per expert, fp8 with scales (DeepSeek-V3: 32 experts of 1 layer)": (
        1,
        32,
        list(per_expert(layers=1, experts=32, hidden=7168, inner=2048, scales=True)),
    ),
    "per expert, bf16 (OLMoE: 2 layers)": (
        2,
        64,
        list(per_expert(layers=2, experts=64, hidden=2048, inner=1024)),
    ),
    "fused, bf16 (Llama-4 Scout: 8 experts of 2 layers)": (
        2,
        8,
        list(fused(layers=2, experts=8, hidden=5120, inner=4096)),
    ),
    "fused, bf16, many small experts (Qwen3-VL: 2 layers)": (
        2,
        128,
        list(fused(layers=2, experts=128, hidden=2048, inner=512)),
    ),
    "138 k tensors of few bytes (names of Kimi-K2)": (
        60,
        384,
        list(per_expert(layers=60, experts=384, hidden=8, inner=1, scales=True)),
    ),
}


def write_sparse(folder: Path, files: list[list[Entry]]) -> int:
    """Write a checkpoint whose files hold headers and holes; return its size in bytes."""
    folder.mkdir()
    weight_map, total = {}, 0
    for number, entries in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        header: dict[str, Any] = {}
        at = 0
        for tensor, dtype, shape in entries:
            size = math.prod(shape) * BYTES[dtype]
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            weight_map[tensor] = name
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
        total += 8 + len(text) + at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text("{}\n")
    return total


CHILD = """
import json, sys, time
import numpy as np
from placement.checkpoint import permute_checkpoint
from placement.formats.permutation import Permutation

source, out, layers, experts, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
rng = np.random.default_rng(seed)
order = Permutation(
    old_expert_of_new_LE=np.array([rng.permutation(experts) for _ in range(layers)]),
    moe_layer_ids=tuple(range(layers)),
)

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
before = status("VmRSS")
began, cpu = time.perf_counter(), time.process_time()
report = permute_checkpoint(source, out, order)
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "cpu_seconds": time.process_time() - cpu,
    "growth_bytes": status("VmHWM") - before,
    "tensors": report.num_tensors,
    "renamed": report.num_renamed,
    "reordered": report.num_reordered,
}))
"""


def copy_folder(source: Path, out: Path) -> tuple[float, float]:
    """Copy all files through the kernel and force them to the disk; return seconds and seconds of CPU."""
    began_s, cpu_s = time.perf_counter(), time.process_time()
    out.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as file, (out / path.name).open("wb") as target:
            left = os.fstat(file.fileno()).st_size
            while left:
                left -= os.copy_file_range(file.fileno(), target.fileno(), min(left, 64 * 2**20))
            os.fsync(target.fileno())
    return time.perf_counter() - began_s, time.process_time() - cpu_s


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Copy and permute in turns; return minima over the rounds, and the largest growth."""
    layers, experts, files = INSTANCES[name]
    size = write_sparse(folder / "source", files)
    copies, runs = [], []
    for _ in range(ROUNDS):
        copies.append(copy_folder(folder / "source", folder / "copy"))
        shutil.rmtree(folder / "copy")
        arguments = [str(folder / "source"), str(folder / "out"), str(layers), str(experts), str(SEED)]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout))
        shutil.rmtree(folder / "out")
    return {
        "instance": name,
        "bytes": size,
        "files": len(files),
        **{key: runs[0][key] for key in ("tensors", "renamed", "reordered")},
        "copy_seconds": min(seconds for seconds, _ in copies),
        "copy_cpu_seconds": min(cpu for _, cpu in copies),
        "seconds": min(run["seconds"] for run in runs),
        "cpu_seconds": min(run["cpu_seconds"] for run in runs),
        "growth_bytes": max(run["growth_bytes"] for run in runs),
    }


def _table(rows: list[dict[str, Any]], where: dict[str, str]) -> str:
    lines = [
        "# Permuting a checkpoint beside copying it",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numpy {where['numpy']}; "
        f"seed {SEED}, minima of {ROUNDS} rounds. Made by `python -m benchmarks.checkpoint`.",
        "",
        "Sparse files of real layouts; both write all bytes and force them to the disk. Memory is the peak",
        "above what the process had after importing, buffers of up to 16 MiB included. 64 MiB beyond them",
        "is the goal: a model of 138,000 tensors misses it, by its names.",
        "",
        "| checkpoint | GiB | files | tensors | renamed | reordered | copy s (CPU) | permute s (CPU) "
        "| GiB/s | memory MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['instance']} | {row['bytes'] / 2**30:.2f} | {row['files']} | {row['tensors']} | "
        f"{row['renamed']} | {row['reordered']} | "
        f"{row['copy_seconds']:.2f} ({row['copy_cpu_seconds']:.2f}) | "
        f"{row['seconds']:.2f} ({row['cpu_seconds']:.2f}) | {row['bytes'] / 2**30 / row['seconds']:.2f} | "
        f"**{row['growth_bytes'] / 2**20:.1f}** |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all instances and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="start of one instance's name")
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary folder")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    where = environment()
    for name in INSTANCES:
        if arguments.only is None or name.startswith(arguments.only):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                rows.append(measure(name, Path(folder)))
            print(_table(rows, where).splitlines()[-1], flush=True)
    if arguments.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "checkpoint.md").write_text(_table(rows, where), encoding="utf-8")
        with (RESULTS / "checkpoint.jsonl").open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**where, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
