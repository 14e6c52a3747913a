"""Load windows: how many tokens selected each expert in some steps of a run; what is posted and solved.

Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import writing_whole

__all__ = ["LoadWindow", "save_windows"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadWindow:
    """Counts of one window.

    Parameters
    ----------
    window
        Its number; ranks that step together count the same windows.
    load_LE
        Token-expert pairs of logical experts, ``[layers, experts]``, MoE layers alone in decoder order.
    tokens
        Tokens that were routed, padding left out.
    steps
        Steps that it lasted.
    """

    window: int
    load_LE: IntArray
    tokens: int
    steps: int

    def __post_init__(self) -> None:
        kept = np.ascontiguousarray(self.load_LE, dtype=np.int64)
        kept.setflags(write=False)
        object.__setattr__(self, "load_LE", kept)

    def report(self) -> dict[str, Any]:
        """Return it as the service takes it: ``{"window": number, "load": counts, "tokens": number}``."""
        return {"window": self.window, "load": self.load_LE, "tokens": self.tokens}


def save_windows(
    path: str | Path,
    windows: Iterable[LoadWindow],
    *,
    top_k: int,
    model_name: str | None = None,
    moe_layer_ids: Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write windows as a file of counts that can be solved: SGLang's JSON, which says its top-k itself.

    Windows of one number (counted by several ranks) are added up; they are written in the order of their
    numbers.

    Parameters
    ----------
    path
        File, of any name.
    windows
        Windows of one model.
    top_k
        Experts that a token selects.
    model_name, moe_layer_ids
        What was counted, as in `Trace`.
    overwrite
        Replace a file that is there.

    Raises
    ------
    InputError
        If there is no window, they differ in shape, none routed a token, or the file is there or cannot be
        written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path}: is there already; choose another output or overwrite it")
    load_of = _by_number(windows)
    if not any(load_LE.any() for load_LE in load_of.values()):
        raise InputError("no window routed a token, so there is nothing to save; run the model first")
    numbers = sorted(load_of)
    known = {"top_k": top_k, "model_name": model_name, "windows": numbers}
    if moe_layer_ids is not None:
        known["moe_layer_ids"] = list(moe_layer_ids)
    with writing_whole(path) as file:
        file.write(b'{"logical_count": [\n')
        rows = (json.dumps(load_of[number].tolist()).encode() for number in numbers)
        for place, row in enumerate(rows):
            file.write(b",\n" + row if place else row)
        file.write(b"\n], " + json.dumps(known)[1:].encode() + b"\n")


def _by_number(windows: Iterable[LoadWindow]) -> dict[int, IntArray]:
    """Loads of all windows of each number together."""
    load_of: dict[int, IntArray] = {}
    for one in windows:
        before = load_of.setdefault(one.window, np.zeros_like(one.load_LE))
        if before.shape != one.load_LE.shape or next(iter(load_of.values())).shape != before.shape:
            raise InputError(
                f"window {one.window} counts {one.load_LE.shape} [layers, experts], others "
                f"{next(iter(load_of.values())).shape}; keep windows of different models apart"
            )
        load_of[one.window] = before + one.load_LE
    return load_of
