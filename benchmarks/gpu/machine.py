"""What a measurement ran on: GPUs and how they are linked, driver, versions, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

__all__ = ["machine"]

PACKAGES = ("torch", "transformers", "triton", "numpy")


def machine(commit: str | None = None) -> dict[str, Any]:
    """Return the machine of this process; `commit` where there is no checkout to ask."""
    # Asked of the driver's tool: this process is to hold no GPU.
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    gpus = _output(query).splitlines() if torch.cuda.device_count() else []
    cuda: Any = torch.cuda  # untyped there
    nccl = cuda.nccl.version() if gpus else ()
    return {
        "commit": commit or _output(["git", "describe", "--always", "--dirty"]) or "unknown",
        "gpus": gpus,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[
            0
        ],
        "links": _output(["nvidia-smi", "topo", "-m"]),
        "cuda": torch.version.cuda,
        "nccl": ".".join(str(part) for part in nccl),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "nccl_settings": {key: value for key, value in os.environ.items() if key.startswith("NCCL_")},
    }


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
