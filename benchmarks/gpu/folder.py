"""What `prepare` writes and the measurements read: placements and held-out routing, one file an instance.

Needs numpy alone. Shape letters: W windows, T tokens of a window, L layers, K top-k, S slots, D devices.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.instances import Instance, instance_from_dict
from placement.errors import InputError
from placement.io import placement_from_dict, placement_to_dict
from placement.plan import Placement

__all__ = ["DEFAULT_FOLDER", "Fitted", "Prepared", "read_prepared", "write_prepared"]

DEFAULT_FOLDER = Path(".gpu")

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A policy's placement on one instance.

    Parameters
    ----------
    placement
        Fitted on the even windows.
    split
        How tokens choose among replicas.
    about
        What the solve said of itself: solver, seconds, predicted and held-out figures.
    """

    placement: Placement
    split: str
    about: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """An instance ready to be measured.

    Parameters
    ----------
    instance
        What it is.
    policies
        Placements by the policy's name.
    windows
        Held-out windows, by number in the trace.
    arrays
        Of a replayed instance ``experts_WTLK``, and ``recent_WLE``: loads of the window before each. Of an
        emulated one ``rows/POLICY/BATCH`` ``[W, L, S]`` (tokens of each slot) and ``received/POLICY/BATCH``
        ``[W, L, D]`` (distinct tokens from other devices).
    about
        Commit, seeds, versions.
    """

    instance: Instance
    policies: dict[str, Fitted]
    windows: tuple[int, ...]
    arrays: dict[str, Array]
    about: dict[str, Any]


def write_prepared(folder: Path, prepared: Prepared) -> None:
    """Write an instance's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    name = prepared.instance.name
    np.savez_compressed(folder / f"{name}.npz", **prepared.arrays)  # type: ignore[arg-type]
    policies = {
        key: {"split": one.split, "about": one.about, "placement": placement_to_dict(one.placement)}
        for key, one in prepared.policies.items()
    }
    entry = {
        "instance": prepared.instance.to_dict(),
        "windows": list(prepared.windows),
        "policies": policies,
        "about": prepared.about,
    }
    (folder / f"{name}.json").write_text(json.dumps(entry), encoding="utf-8")


def read_prepared(folder: Path, name: str) -> Prepared:
    """Read an instance.

    Raises
    ------
    InputError
        If it was not prepared.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        raise InputError(f"{file} is missing: run `python -m benchmarks.gpu prepare` first")
    entry = json.loads(file.read_text(encoding="utf-8"))
    with np.load(folder / f"{name}.npz") as arrays:
        loaded = {key: arrays[key] for key in arrays.files}
    policies = {
        key: Fitted(
            placement=placement_from_dict(one["placement"], source=f"{file}: {key}"),
            split=one["split"],
            about=one["about"],
        )
        for key, one in entry["policies"].items()
    }
    return Prepared(
        instance=instance_from_dict(entry["instance"]),
        policies=policies,
        windows=tuple(entry["windows"]),
        arrays=loaded,
        about=entry["about"],
    )
