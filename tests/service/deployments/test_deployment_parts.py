"""The small parts: posted windows, the trace that is made of them, the child that computes."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from placement.errors import InputError
from service.deployments.calculator import CalculationError, Calculator, RefusedError
from service.deployments.loads import unpacked
from service.deployments.posting import MOST_PAIRS, parse_windows
from service.errors import InvalidError
from tests.service.deployments.desk import AUTO, NAME, ROW, Desk
from traces.counts import ExpertCounts
from traces.readers import open_trace

FACTS = {"layers": 2, "experts": 3, "top_k": 2}

Loads = npt.NDArray[Any]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite alone: nothing here depends on the database."""
    return sqlite_url


@given(
    load_LE=arrays.arrays(np.int64, (2, 3), elements=st.integers(0, 1 << 40)),
    window=st.integers(0, 2**53 - 1),
    rank=st.integers(0, 3),
)
def test_what_is_posted_is_what_is_stored(load_LE: Loads, window: int, rank: int) -> None:
    """Counts survive exactly; tokens follow from them where they are not given."""
    body = orjson.dumps({"rank": rank, "windows": [{"window": window, "load": load_LE.tolist()}]})
    (part,) = parse_windows(body, facts=FACTS, num_ranks=4)
    assert (part.window, part.rank) == (window, rank)
    assert (unpacked(part.load, num_layers=2, num_experts=3) == load_LE).all()
    assert part.tokens == load_LE.sum() / 4


@given(
    st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3), st.lists)
)
def test_whatever_is_posted_as_load_is_taken_or_refused(load: Any) -> None:
    """There is no third way."""
    body = orjson.dumps({"windows": [{"window": 1, "load": load}]})
    try:
        (part,) = parse_windows(body, facts=FACTS, num_ranks=1)
    except InvalidError:
        return
    assert len(zlib.decompress(part.load)) == 2 * 3 * 8


def test_too_many_pairs_are_refused() -> None:
    """Together they must not exceed what one may be."""
    body = orjson.dumps({"windows": [{"window": 1, "load": [[MOST_PAIRS, 0, 0], [1, 0, 0]]}]})
    with pytest.raises(InvalidError, match="holds 281474976710657 pairs"):
        parse_windows(body, facts=FACTS, num_ranks=1)


def test_counts_that_say_how_many_experts_a_token_selects(tmp_path: Path) -> None:
    """They need no model; those that do not say need one."""
    path = tmp_path / "counts.json"
    document = {"logical_count": [[[4, 0, 2], [3, 3, 0]]], "top_k": 2, "model_name": None}
    path.write_text(json.dumps(document))
    counts = open_trace(path)
    assert isinstance(counts, ExpertCounts)
    assert (counts.top_k, counts.num_tokens, counts.model_name) == (2, 3, None)
    path.write_text(json.dumps({**document, "top_k": 4}))
    with pytest.raises(InputError, match="top-4 of 3"):
        open_trace(path)
    path.write_text(json.dumps({"logical_count": document["logical_count"]}))
    with pytest.raises(InputError, match="name the model"):
        open_trace(path)


def calculators() -> list[psutil.Process]:
    """Return the processes that compute for us; a database of the tests may be a child of ours as well."""
    return [one for one in psutil.Process().children() if "service.deployments.child" in one.cmdline()]


def test_a_child_that_dies_is_replaced(desk: Desk) -> None:
    """A question that it was asked is lost; the next one starts another."""
    desk.put(policy=AUTO)
    desk.promote(ROW)
    desk.post(2)
    desk.step()
    assert desk.deployment.drift is not None
    (child,) = calculators()
    child.kill()
    psutil.wait_procs([child], timeout=10)
    desk.post(2)
    desk.until(lambda: (desk.deployment.drift or {}).get("windows") == 4)


def test_a_child_refuses_and_rests(desk: Desk) -> None:
    """What makes no sense is told apart from a child that died; one with nothing to do is ended."""
    calculator = Calculator(desk.settings, idle_s=0.0)
    try:
        with pytest.raises(RefusedError, match="there is no deployment 'none'"):
            calculator.ask("evaluate", name="none")
        desk.put()
        assert calculator.ask("evaluate", name=NAME)["windows"] == 0
        assert len(calculators()) == 1
        calculator.rest()
        assert calculators() == []
        with pytest.raises(CalculationError, match="ended"):
            calculator.ask("no-such-task", name=NAME)
    finally:
        calculator.close()
