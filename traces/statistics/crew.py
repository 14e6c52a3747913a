"""Shares the layers of every block out among threads: layers have no count in common, so none is locked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

__all__ = ["Crew"]

Table = npt.NDArray[np.uint16]


class Crew:
    """Threads that count a block's layers while the next block is read; with one, nothing is put off.

    Parameters
    ----------
    workers
        Threads.
    num_experts
        Each thread has a table of so many rows and columns to itself.
    """

    def __init__(self, workers: int, num_experts: int) -> None:
        self._pool = ThreadPoolExecutor(workers, "statistics") if workers > 1 else None
        self._tables = [np.empty((num_experts, num_experts), dtype=np.uint16) for _ in range(workers)]
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            if failure[0] is None:
                self._wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)

    def start(self, num_layers: int, count_layer: Callable[[int, Table], None]) -> None:
        """Have the layers of a block counted, once those of the former one are."""
        self._wait()

        def count(layers: range, table_EE: Table) -> None:
            for layer in layers:
                count_layer(layer, table_EE)

        if self._pool is None:
            count(range(num_layers), self._tables[0])
            return
        step = len(self._tables)
        self._pending = [
            self._pool.submit(count, range(first, num_layers, step), table)
            for first, table in enumerate(self._tables)
        ]

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
