"""Tasks for workers in other processes, and a batch whose cells cost nothing to solve."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from placement.errors import InfeasibleError, InputError
from traces.distributed.batch import CellAnswer, CellWork
from traces.distributed.spec import Cell
from traces.distributed.task import value_of
from traces.source import TraceSource
from traces.trace import Trace


def square(number: int) -> int:
    """Return the square of a number."""
    return number * number


def add(*parts: Any) -> Any:
    """Return the sum of results, kept or not."""
    return sum(value_of(part) for part in parts)


def refuse(message: str) -> None:
    """Raise an error of ours."""
    raise InputError(message)


def divide(number: int) -> float:
    """Divide by a number, which may be 0."""
    return 1 / number


def make_function() -> Any:
    """Return what no other process can be sent."""
    return lambda: None


def environment(name: str) -> str | None:
    """Return a variable of the worker's environment."""
    return os.environ.get(name)


def process_id(*, wait_s: float = 0.0) -> int:
    """Return the worker's process."""
    time.sleep(wait_s)
    return os.getpid()


def die_first(folder: Path, times: int) -> int:
    """Kill the worker so many times; then return how often it was tried."""
    tries = len(list(folder.iterdir()))
    (folder / f"{tries}").touch()
    if tries < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return tries + 1


def note_and_sleep(folder: Path, seconds: float) -> None:
    """Leave the worker's process id in a folder and take a while."""
    (folder / str(os.getpid())).touch()
    time.sleep(seconds)


class SlowSource:
    """A trace each range of which takes a while to read; it opens as itself."""

    def __init__(self, source: TraceSource) -> None:
        self.source = source
        self.header, self.num_tokens, self.digest = source.header, source.num_tokens, source.digest

    def __call__(self) -> SlowSource:
        """Return itself."""
        return self

    def blocks(self, start: int = 0, stop: int | None = None, *, max_tokens: int = 1) -> Iterator[Trace]:
        """Read after a while."""
        time.sleep(0.3)
        return self.source.blocks(start, stop, max_tokens=max_tokens)


def solve(cell: Cell) -> CellAnswer:
    """Answer a cell by what its options say."""
    wanted = cell.options.get("solver", "auto")
    if cell.topology.name == "small":
        raise InfeasibleError("8 experts do not fit 4 slots")
    if cell.trace.name == "bad" or wanted == "exact":
        raise InputError(f"{cell.trace.path}: is damaged")
    seed = int(cell.options.get("seed", 0))
    return CellAnswer(row={"objective": {"value": float(seed)}}, placement={"seed": seed})


def count_layers(cell: Cell) -> int:
    """Every cell has three layers."""
    return 3


def solve_layer(cell: Cell, layer: int) -> dict[str, Any]:
    """Answer a layer."""
    if cell.trace.name == "bad" and layer == 1:
        raise InputError("layer is damaged")
    return {"layer": layer}


def join(cell: Cell, layers: Sequence[dict[str, Any]]) -> CellAnswer:
    """Join what `solve_layer` gives."""
    numbers = [layer["layer"] for layer in layers]
    return CellAnswer(row={"layers": numbers}, placement={"layers": numbers})


EASY_WORK = CellWork(solve=solve, count_layers=count_layers, solve_layer=solve_layer, join=join)
