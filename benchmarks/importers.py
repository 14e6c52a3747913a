"""How fast dumps of engines are opened and read, and in how much memory.

Run ``python -m benchmarks.importers``. Dumps of a model of DeepSeek-V3's shape (61 decoder layers, 58 with
256 experts, top-8) are written as the engines write them. A record is one token in one MoE layer with its 8
ids. Opening looks at everything once (it counts, checks and follows requests); reading then yields every
token in blocks. Each format is measured in a process of its own, on one thread, by CPU time, the fastest of
several; printed is how much the resident set grew beyond that of a process that has imported what it needs.
Mapped files count in it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.environment import RESULTS, environment

__all__ = ["main"]

MODEL = "deepseek-v3"
LAYERS, DENSE, EXPERTS, SLOTS, TOP_K = 61, 3, 256, 288, 8
RANKS = 2
SEED = 0
PASSES = 3

Array = npt.NDArray[Any]


def drawn(num_tokens: int) -> Array:
    """Return ids of all decoder layers, dense ones zero, ``[tokens, layers, k]``."""
    rng = np.random.default_rng(SEED)
    ids = np.zeros((num_tokens, LAYERS, TOP_K), dtype=np.int32)
    for start in range(0, num_tokens, 4096):
        piece = ids[start : start + 4096]
        piece[:, DENSE:] = rng.random((len(piece), EXPERTS)).argsort(axis=1)[:, None, :TOP_K]
    for layer in range(DENSE, LAYERS):
        ids[:, layer] = (ids[:, layer] + 7 * layer) % EXPERTS
    return ids


def sglang_tokens(folder: Path, num_tokens: int, *, decode: bool) -> None:
    """Per-token dumps of all ranks: prefill passes of 4096 tokens, or decode passes of 128."""
    import torch

    rng = np.random.default_rng(SEED)
    base = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    spare = rng.permuted(base, axis=1)[:, : SLOTS - EXPERTS]
    slot_of_expert = base
    tokens_per_pass = 128 if decode else 4096
    ids = drawn(tokens_per_pass)
    layers = np.arange(LAYERS)[:, None, None]
    physical = slot_of_expert[layers, ids.transpose(1, 0, 2)].astype(np.int32)
    physical[:DENSE] = -1
    for rank in range(RANKS):
        records = [
            {
                "forward_pass_id": step,
                "rank": rank,
                "gatherer_key": "primary",
                "input_ids": rng.integers(0, 129_280, tokens_per_pass).tolist(),
                "positions": (np.arange(tokens_per_pass) + (step if decode else 0)).tolist(),
                "extend_seq_lens": None if decode else [tokens_per_pass],
                "forward_mode": 2 if decode else 1,
                "topk_ids_of_layer": torch.from_numpy(np.roll(physical, step + 31 * rank, axis=1).copy()),
                "misc_objects": [],
                "global_physical_count": torch.zeros(LAYERS, SLOTS, dtype=torch.int32),
            }
            for step in range(num_tokens // (RANKS * tokens_per_pass))
        ]
        table = torch.from_numpy(np.concatenate([base, spare], axis=1))
        torch.save({"records": records, "last_physical_to_logical_map": table}, folder / f"dump_{rank}.pt")


def responses(path: Path, num_tokens: int, value: Callable[[Array], str], place: str) -> None:
    """Responses of 2000 tokens each, one a line."""
    ids = drawn(2000)
    text = value(ids)
    about = {"prompt_tokens": 1500, "completion_tokens": 501}
    with path.open("w") as file:
        for _ in range(num_tokens // 2000):
            response: dict[str, Any] = {"text": "", "meta_info": {**about, "routed_experts": text}}
            if place == "choice":
                response = {"usage": about, "choices": [{"routed_experts": text}]}
            file.write(json.dumps(response) + "\n")


def raw(ids: Array) -> str:
    """Return ids as SGLang sends them."""
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def npy(ids: Array) -> str:
    """Return ids as vLLM sends them."""
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.uint8))
    return base64.b64encode(buffer.getvalue()).decode()


def arrays(folder: Path, num_tokens: int) -> None:
    """Arrays of 2000 tokens each."""
    ids = drawn(2000).astype(np.uint8)
    for number in range(num_tokens // 2000):
        np.save(folder / f"{number:06}.npy", ids)


def archive(path: Path, num_tokens: int, save: Callable[..., None]) -> None:
    """One archive of ours, MoE layers alone."""
    save(path, topk=drawn(num_tokens)[:, DENSE:].astype(np.uint8), num_experts=EXPERTS)


FORMATS: Mapping[str, Callable[[Path, int], None]] = {
    "sglang-tokens, prefill": lambda path, tokens: sglang_tokens(path, tokens, decode=False),
    "sglang-tokens, decode": lambda path, tokens: sglang_tokens(path, tokens, decode=True),
    "sglang-response": lambda path, tokens: responses(path / "a.jsonl", tokens, raw, "meta_info"),
    "vllm responses": lambda path, tokens: responses(path / "a.jsonl", tokens, npy, "choice"),
    "vllm .npy": arrays,
    "npz, stored": lambda path, tokens: archive(path / "a.npz", tokens, np.savez),
    "npz, compressed": lambda path, tokens: archive(path / "a.npz", tokens, np.savez_compressed),
}


def resident() -> float:
    """Return the largest resident set so far, in MB; that of getrusage would include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(path: Path) -> dict[str, float]:
    """Open and read a dump in this process."""
    import torch

    from placement.model import preset_model
    from traces.counts import ExpertCounts
    from traces.importers import npz
    from traces.readers import ReadOptions, open_trace

    torch.set_num_threads(1)
    # Small archives are read into memory; measured is what large ones do.
    npz._IN_MEMORY_BYTES = 0
    options = ReadOptions(model=preset_model(MODEL))
    before, opening, reading, records = resident(), [], [], 0
    for _ in range(PASSES):
        start = time.process_time()
        source = open_trace(path, options=options)
        opened = time.process_time()
        assert not isinstance(source, ExpertCounts)
        records = sum(block.num_tokens * block.num_layers for block in source.blocks())
        opening.append(opened - start)
        reading.append(time.process_time() - opened)
    return {"records": records, "open": min(opening), "read": min(reading), "memory": resident() - before}


def row(name: str, num_tokens: int) -> str:
    """Write a dump, measure it in a fresh process, and return a line of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dump"
        folder.mkdir()
        FORMATS[name](folder, num_tokens)
        files = list(folder.iterdir())
        size = sum(file.stat().st_size for file in files) / 1e6
        path = folder if len(files) > 1 else files[0]
        command = [sys.executable, "-m", "benchmarks.importers", "--measure", str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(output)
    million = figures["records"] / 1e6
    speeds = " | ".join(f"{million / max(figures[step], 1e-9):,.1f}" for step in ("open", "read"))
    return f"| {name} | {size:,.0f} | {million:.1f} | {speeds} | {figures['memory']:,.0f} |"


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=160_000, help="tokens of each dump")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    lines = [
        "# Reading dumps of engines",
        "",
        *(f"- {key}: {value}" for key, value in environment().items()),
        f"- model: {MODEL}, {options.tokens:,} tokens, {RANKS} ranks, seed {SEED}",
        f"- one thread, CPU time, best of {PASSES}",
        "",
        "A record is one token in one MoE layer; speeds in million records per second, memory beyond start.",
        "",
        "| format | MB | million records | opened | read | memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name in FORMATS:
        lines.append(row(name, options.tokens))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    (RESULTS / "importers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
