"""What was measured on what: GPU, driver, libraries, and how the ranks reach each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence

import torch
import torch.distributed as dist

from placement.runtime.measure.world import Place
from placement.runtime.parallel.mesh import Mesh

__all__ = ["provenance"]

FORMAT = "moe-placement-calibration/1"


def provenance(
    place_D: Sequence[Place], mesh: Mesh, *, dtype: torch.dtype, measured_at: str | None
) -> dict[str, object]:
    """Return the head of a calibration file; every rank has to call this.

    Parameters
    ----------
    place_D
        Where each rank runs.
    mesh
        The ranks, and their nodes.
    dtype
        Of what was measured.
    measured_at
        ISO 8601 time, if known.
    """
    on_gpu = place_D[0].index >= 0
    head: dict[str, object] = {
        "format": FORMAT,
        "gpu": place_D[0].gpu,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "nccl": _nccl() if on_gpu else None,
        "world_size": len(place_D),
        "devices_per_node": mesh.devices_per_node,
        "hosts": len({place.machine for place in place_D}),
        "transport": _transport(place_D, mesh),
        "dtype": str(dtype).removeprefix("torch."),
        "measured_at": measured_at,
    }
    return {name: value for name, value in head.items() if value is not None}


def _nccl() -> str:
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _driver() -> str | None:
    """Version of the GPU's driver, where its tool tells."""
    lines = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()
    return lines[0] if lines else None


def _nvidia_smi(*arguments: str) -> str:
    """What the driver's tool prints; nothing where it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _transport(place_D: Sequence[Place], mesh: Mesh) -> str:
    if len(place_D) == 1:
        return "none: one process"
    if place_D[0].index < 0:
        return f"{dist.get_backend()} between processes, no GPU"
    inside = _inside(all(mesh.gather(_reaches_peers(place_D[mesh.rank], place_D))))
    return inside if len({place.machine for place in place_D}) == 1 else f"{inside}; network between machines"


def _reaches_peers(mine: Place, place_D: Sequence[Place]) -> bool:
    """Whether this rank's GPU reads the memory of all others of its machine."""
    peers = [place.index for place in place_D if place.machine == mine.machine and place.index != mine.index]
    visible = range(torch.cuda.device_count())
    return all(peer in visible and torch.cuda.can_device_access_peer(mine.index, peer) for peer in peers)


def _inside(peers_reached: bool) -> str:
    """How GPUs of one machine reach each other."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return "host memory (NCCL_P2P_DISABLE is set)"
    if not peers_reached:
        return "host memory (GPUs have no peer access)"
    links = len(re.findall(r"Link \d+: [\d.]+ GB/s", _nvidia_smi("nvlink", "--status", "--id", "0")))
    return f"NVLink ({links} links), NCCL default" if links else "peer to peer, NCCL default"
