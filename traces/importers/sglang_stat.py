"""Reads what SGLang's ``stat`` recorder dumps: ``logical_count``, int32 ``[steps, layers, experts]``.

Counts are logical and summed over ranks already. Several dumps of one recording may lie in a folder, named by
their time; steps of them follow one another. Some versions keep one sum, ``[layers, experts]``, for all
steps. Shape letters: W steps, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.counts import ExpertCounts
from traces.files import reading
from traces.importers.sglang_counts import check_counts, expert_counts, summed_steps
from traces.importers.torch_file import as_array, is_torch_file, leading_strings, load_torch

if TYPE_CHECKING:
    from traces.readers import ReadOptions

__all__ = ["open", "sniff"]

_KEY = "logical_count"
_FIRST_KEYS = 4


def sniff(path: Path) -> bool:
    """Tell whether a PyTorch file, or one in the folder, has logical counts among its first keys."""
    if path.is_dir():
        return any(_sniff_file(file) for file in sorted(path.glob("*.pt")))
    return _sniff_file(path)


def _sniff_file(path: Path) -> bool:
    return is_torch_file(path) and _KEY in leading_strings(path)[:_FIRST_KEYS]


def open(path: Path, options: ReadOptions) -> ExpertCounts:
    """Read one dump, or the dumps of a folder one after another.

    Raises
    ------
    InputError
        If a file is damaged or another kind of dump, dumps differ in shape, counts are negative, or the model
        is neither named nor known by its shape.
    """
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    parts: list[npt.NDArray[Any]] = []
    rank = None
    for file in files:
        content = load_torch(file)
        with reading(file):
            load_WLE = _counts(content)
            if rank is not None and content.get("rank", rank) != rank:
                raise InputError(
                    f"is of rank {content['rank']}, others of rank {rank}: every rank dumps the same sums; "
                    "keep the files of one rank"
                )
            rank = content.get("rank", rank)
            if parts and parts[0].shape[1:] != load_WLE.shape[1:]:
                raise InputError(
                    f"counts {list(load_WLE.shape[1:])} [layers, experts], others "
                    f"{list(parts[0].shape[1:])}; keep recordings of different models apart"
                )
            parts.append(summed_steps(load_WLE, share=1 / len(files)))
    with reading(path):
        if not parts:
            raise InputError("holds no dump of expert counts")
        return expert_counts(np.concatenate(parts), options.model)


def _counts(content: Any) -> npt.NDArray[Any]:
    """Return the counts of a loaded dump, ``[steps, layers, experts]``."""
    if not isinstance(content, Mapping) or _KEY not in content:
        raise InputError(f"has no {_KEY}; it is no dump of SGLang's stat recorder")
    load = as_array(content[_KEY], _KEY)
    if load.ndim not in (2, 3) or 0 in load.shape or load.dtype.kind not in "iu":
        raise InputError(
            f"{_KEY} is {load.dtype} {list(load.shape)}, not integers [steps, layers, experts]; record again"
        )
    load = load.reshape(-1, *load.shape[-2:])
    check_counts(load)
    return load
