"""Tests of `traces.importers.passes`: ranks interleaved pass by pass, stages found, layers named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from placement.errors import InputError
from tests.traces.importers.samples import small_model
from traces.importers.passes import few, model_layers, naming, pass_source, stages
from traces.source import TraceHeader, read_all


def test_ranks_are_interleaved_within_each_pass() -> None:
    """Four tokens of rank 0 and two of rank 3 alternate evenly; the next pass comes after them."""
    header = TraceHeader(num_layers=1, num_experts=9, top_k=1)
    parts = {(0, 0): [0, 1, 2, 3], (0, 1): [4, 5], (1, 1): [6]}

    def load(index: int, column: int) -> np.ndarray:  # type: ignore[type-arg]
        return np.array(parts[index, column]).reshape(-1, 1, 1)

    source = pass_source(Path("dump"), header, np.array([[4, 2], [0, 1], [0, 0]]), [0, 3], load)
    trace = read_all(source)
    # Rank 0 is at 1/8, 3/8, 5/8 and 7/8 of the pass, rank 3 at 2/8 and 6/8.
    assert trace.experts_TLK.ravel().tolist() == [0, 4, 1, 2, 5, 3, 6]
    assert trace.rank_T is not None
    assert trace.rank_T.tolist() == [3 if expert in (4, 5, 6) else 0 for expert in trace.experts_TLK.ravel()]
    assert source.digest == trace.digest
    with pytest.raises(InputError, match="holds no token"):
        pass_source(Path("dump"), header, np.zeros((2, 2), dtype=np.int64), [0, 3], load)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([1, 2, 3, 7], "1-3, 7"), ([1, 3, 5, 7, 9], "1, 3, 5, 7, ...")],
)
def test_few_numbers_stand_for_many(numbers: list[int], text: str) -> None:
    """Runs are ranges, four at most."""
    assert few(numbers) == text


def test_stages_are_ranks_of_the_same_layers() -> None:
    """Ordered by their layers, whatever the order of the ranks."""
    assert stages([{4, 5}, {0, 1}, {4, 5}, {0, 1}]) == [[1, 3], [0, 2]]
    with pytest.raises(InputError, match="ranks 0 and 2 both ran layer 1"):
        stages([{0, 1}, {2}, {1, 3}])


def test_layers_are_the_models() -> None:
    """All of them without a model."""
    assert model_layers({3, 1}, None) == (1, 3)
    assert model_layers({1, 2, 3, 4}, small_model()) == (1, 2, 3)
    with pytest.raises(InputError, match="lacks layer 3 of small"):
        model_layers({1, 2}, small_model())


def test_files_of_a_folder_are_named() -> None:
    """The folder is named further out; a file given alone is the path itself."""
    folder = Path("dump")
    with pytest.raises(InputError, match=r"^rank0: wrong$"), naming(folder, folder / "rank0"):
        raise InputError("wrong")
    damaged = pytest.raises(InputError, match=r"^rank0: is damaged or incomplete \('x'\)")
    with damaged, naming(folder, folder / "rank0", KeyError):
        raise KeyError("x")
    with pytest.raises(InputError, match=r"^wrong$"), naming(folder, folder):
        raise InputError("wrong")
    with pytest.raises(InputError, match="cannot be read"), naming(folder, folder / "rank0"):
        raise PermissionError("no")
