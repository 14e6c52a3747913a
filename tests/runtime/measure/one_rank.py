"""One rank of some calibrations, started as a launcher does; writes what it got to a file.

Run: one_rank.py FOLDER, with RANK, WORLD_SIZE and so on in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from placement.errors import PlacementError
from placement.runtime.measure import Pace, Sizes, calibrate

TIMEOUT_S = 20.0
FEW = 3
LOST = 1
OF_FEW = ("nodes of 1", "nodes of 2", "no such model", "other models", "other nodes")
OF_ALL = ("nodes of 2", "one is lost")
TINY = Sizes(
    tokens_per_expert=(1, 4),
    active_shares=(1.0, 0.5),
    uneven_tokens=(4,),
    uneven_exponents=(1.0,),
    exchange_MiB=(0.0625, 0.25),
    pairs=(16, 64),
    hbm_bytes=1 << 20,
    flush_bytes=1 << 12,
    launches=3,
    shrink=64,
    pace=Pace(warmups=1, least=2, most=3, budget_ms=1.0, longest_ms=60_000.0),
)
MODELS = ("olmoe", "mixtral-8x7b")


def measure(
    told: Callable[[str], None], *, models: tuple[str, ...] = MODELS, devices_per_node: int | None = None
) -> dict[str, object] | None:
    """Calibrate with tiny sizes."""
    return calibrate(
        models=models,
        devices_per_node=devices_per_node,
        quick=True,
        progress=told,
        measured_at="2026-01-02T03:04:05Z",
        sizes=TINY,
        timeout_s=TIMEOUT_S,
    )


def run(name: str, told: Callable[[str], None]) -> object:
    """Return what a scenario gives, or its error."""
    rank = int(os.environ["RANK"])
    try:
        if name == "good":
            return measure(told)
        if name == "nodes of 2":
            return measure(told, devices_per_node=2)
        if name == "nodes of 1":
            return measure(told, models=("olmoe",), devices_per_node=1)
        if name == "no such model":
            return measure(told, models=("no-such-model",))
        if name == "other models":
            return measure(told, models=("olmoe",) if rank == 1 else MODELS)
        if name == "other nodes":
            return measure(told, devices_per_node=1 if rank == 1 else None)
        if name == "one is lost":
            return None if rank == LOST else measure(told)
    except PlacementError as exc:
        return {"error": str(exc)}
    raise KeyError(name)


def main() -> None:
    """Take part in three worlds: of the launcher's first ranks, of the same without it, and of all."""
    folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    told: list[str] = []
    results: dict[str, object] = {}
    if rank < FEW:
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(FEW)
        results["good"] = run("good", told.append)
        results |= in_group(folder / "few", rank, FEW, OF_FEW, told.append)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)
    results |= in_group(folder / "all", rank, world, OF_ALL, told.append)
    (folder / f"{rank}.json").write_text(json.dumps({"results": results, "told": told}), encoding="utf-8")


def in_group(
    store: Path, rank: int, world: int, scenarios: Sequence[str], told: Callable[[str], None]
) -> dict[str, object]:
    """Run scenarios in a group that is there already."""
    limit = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    found = {f"{store.name}: {name}": run(name, told) for name in scenarios}
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    main()
