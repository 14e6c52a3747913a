"""What a figure was measured on: commit, machine, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

__all__ = ["RESULTS", "data_folder", "environment"]

RESULTS = Path(__file__).parent / "results"


def data_folder() -> Path:
    """Folder with further traces: ``MOE_PLACEMENT_DATA``, by default ``shared/data`` beside the checkout."""
    return Path(os.environ.get("MOE_PLACEMENT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def environment() -> dict[str, str]:
    """Return commit, processor and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    names = ("numpy", "numba")
    return {
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
