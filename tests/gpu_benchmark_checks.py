"""What ranks run for the tests of the GPU benchmarks: the measurements themselves, in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.folder import read_prepared
from benchmarks.gpu.migration import migration
from benchmarks.gpu.replay import Options, replay
from benchmarks.gpu.smoke import smoke
from benchmarks.gpu.whole import whole
from placement.runtime.parallel.mesh import Mesh

__all__ = ["run_migration", "run_replay", "run_smoke", "run_whole"]

LIMIT_S = 20.0
OPTIONS = Options(transport="nvlink", training=True, repeats=2, warm_up=1, budget_s=30.0)


def run_replay(rank: int, folder: str) -> tuple[list[Any], list[Any]]:
    """Replay the tiny instance."""
    return replay(read_prepared(Path(folder), "tiny-2"), Mesh.create(timeout_s=LIMIT_S), OPTIONS)


def run_whole(rank: int, folder: str) -> list[Any]:
    """Run a whole tiny model."""
    return whole(read_prepared(Path(folder), "tiny-2"), Mesh.create(timeout_s=LIMIT_S), OPTIONS)


def run_smoke(rank: int) -> list[Any]:
    """Check one family."""
    return smoke(Mesh.create(timeout_s=LIMIT_S), families=("gpt_oss",))


def run_migration(rank: int, folder: str) -> list[Any]:
    """Migrate a whole tiny model back and forth."""
    prepared = read_prepared(Path(folder), "tiny-2")
    return migration(prepared, Mesh.create(timeout_s=LIMIT_S), repeats=2, steps=2)
