"""Tests of fitted routers: synthetic traces have the moments they were fitted to, and reveal no more."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from placement.errors import InputError
from traces.counts import ExpertCounts
from traces.source import MemorySource, TraceHeader, read_all
from traces.statistics import collect
from traces.synthesize import FittedRouting, fit, fit_routing, synthesize
from traces.synthesize.fit import pair_roots
from traces.synthesize.moments import Moments
from traces.trace import Trace

FloatArray = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def real() -> Trace:
    """A trace with all traits: skew, domains in bursts, co-activation, affinity of layers, drift."""
    return synthesize(
        num_tokens=32768,
        num_layers=3,
        num_experts=12,
        top_k=3,
        sequence_tokens=256,
        coactivation=3.0,
        layer_affinity=0.9,
        drift=0.8,
        seed=4,
    )


@pytest.fixture(scope="module")
def moments(real: Trace) -> Moments:
    """Its moments, by windows of 1024 tokens."""
    return Moments.of(MemorySource(real), window_tokens=1024)


@pytest.fixture(scope="module")
def router(moments: Moments) -> FittedRouting:
    """A router fitted to them."""
    return fit_routing(moments)


def apart(p: Any, q: Any) -> float:
    """Mean total variation distance of tables, layer by layer."""
    each = [0.5 * np.abs(a / a.sum() - b / b.sum()).sum() for a, b in zip(p, q, strict=True)]
    return float(np.mean(each))


def test_moments_are_those_of_the_tokens(real: Trace, moments: Moments) -> None:
    """Counted by hand: shares of a window, pairs in a layer, pairs in consecutive layers."""
    ids = real.experts_TLK.astype(np.int64)
    share_E = np.bincount(ids[1024:2048, 1].ravel(), minlength=12) / 1024
    np.testing.assert_allclose(moments.share_WLE[1, 1], share_E)
    chosen_TLE = np.zeros((len(ids), 3, 12))
    np.put_along_axis(chosen_TLE, ids, 1.0, axis=2)
    pairs_EE = chosen_TLE[:, 2].T @ chosen_TLE[:, 2] / len(ids)
    np.fill_diagonal(pairs_EE, 0.0)
    assert moments.pair_LEE is not None
    assert moments.next_LEE is not None
    np.testing.assert_allclose(moments.pair_LEE[2], pairs_EE)
    np.testing.assert_allclose(moments.next_LEE[0], chosen_TLE[:, 0].T @ chosen_TLE[:, 1] / len(ids))


def test_a_synthetic_trace_has_the_moments(moments: Moments, router: FittedRouting) -> None:
    """Loads, pairs and transitions are far nearer than those of independent choices."""
    drawn = Moments.of(router.source(65536, seed=1), window_tokens=1024)
    assert moments.pair_LEE is not None
    assert moments.next_LEE is not None
    mean_LE = moments.share_WLE.mean(axis=0)
    assert apart(drawn.share_WLE.mean(axis=0), mean_LE) < 0.02
    chance_LEE = np.stack([np.outer(mean_E, mean_E) for mean_E in mean_LE])
    for table_EE in chance_LEE:
        np.fill_diagonal(table_EE, 0.0)
    assert apart(drawn.pair_LEE, moments.pair_LEE) < 0.25 * apart(chance_LEE, moments.pair_LEE)
    after_LEE = np.stack([np.outer(a, b) for a, b in itertools.pairwise(mean_LE)])
    assert apart(drawn.next_LEE, moments.next_LEE) < 0.35 * apart(after_LEE, moments.next_LEE)


def test_windows_come_back_in_their_order(moments: Moments, router: FittedRouting) -> None:
    """Of as many tokens, every window has the loads of the one it was fitted to: bursts and drift."""
    drawn = Moments.of(router.source(seed=2), window_tokens=1024)
    mine = drawn.share_WLE - drawn.share_WLE.mean(axis=0)
    theirs = moments.share_WLE - moments.share_WLE.mean(axis=0)
    assert np.corrcoef(mine.ravel(), theirs.ravel())[0, 1] > 0.95
    assert np.abs(mine).mean() == pytest.approx(np.abs(theirs).mean(), rel=0.08)


def test_the_seed_decides_and_any_range_is_the_same_part(router: FittedRouting) -> None:
    """The same seed gives the same trace, another one another; a range is drawn without what is before."""
    source = router.source(5000, seed=3)
    whole = read_all(source)
    assert source.digest == whole.digest == read_all(router.source(5000, seed=3)).digest
    assert router.source(5000, seed=4).digest != source.digest
    for start, stop in ((0, 1), (1000, 1100), (3000, 5000)):
        blocks = list(router.source(5000, seed=3).blocks(start, stop, max_tokens=300))
        assert all(block.num_tokens <= 300 for block in blocks)
        ids = np.concatenate([block.experts_TLK for block in blocks])
        np.testing.assert_array_equal(ids, whole.experts_TLK[start:stop])


def test_of_many_windows_every_nth_is_kept(moments: Moments, monkeypatch: pytest.MonkeyPatch) -> None:
    """The synthetic trace is as long all the same, its windows in the order of those kept."""
    monkeypatch.setattr(fit, "_MOST_CELLS", 10 * 36)
    router = fit_routing(moments)
    assert (router.num_windows, router.traffic_windows) == (8, 32)
    assert router.source(seed=0).num_tokens == 32768


@pytest.mark.parametrize("num_tokens", [1, 1000, 40_000])
def test_any_length_can_be_drawn(router: FittedRouting, num_tokens: int) -> None:
    """Shorter traces take every n-th window, longer ones repeat runs of them."""
    trace = read_all(router.source(num_tokens, seed=0))
    assert trace.num_tokens == num_tokens
    assert Trace(experts_TLK=trace.experts_TLK, num_experts=12).num_tokens == num_tokens


def test_statistics_without_tokens_are_enough(real: Trace, moments: Moments) -> None:
    """A fit from statistics without a sample is the same as one from the trace: no token is looked at."""
    stats = replace(collect(MemorySource(real), window_tokens=1024), sample=None)
    first, second = fit_routing(Moments.of(stats)), fit_routing(moments)
    np.testing.assert_array_equal(first.select_LCE, second.select_LCE)
    np.testing.assert_array_equal(first.factor_WLE, second.factor_WLE)


def test_counts_give_loads_alone(moments: Moments) -> None:
    """Windows' loads are imitated; pairs are those of chance."""
    load_WLE = np.round(moments.share_WLE * 1024).astype(np.int64)
    router = fit_routing(Moments.of(ExpertCounts(load_WLE=load_WLE, top_k=3)))
    assert router.select_LCE.shape == (3, 1, 12)
    drawn = Moments.of(router.source(seed=1), window_tokens=1024)
    assert apart(drawn.share_WLE.mean(axis=0), moments.share_WLE.mean(axis=0)) < 0.02


def test_top_1_of_one_layer_is_fitted_too() -> None:
    """There are neither pairs nor transitions."""
    trace = synthesize(num_tokens=4096, num_layers=1, num_experts=8, top_k=1, sequence_tokens=64, seed=0)
    moments = Moments.of(MemorySource(trace), window_tokens=256)
    assert moments.pair_LEE is None
    assert moments.next_LEE is None
    drawn = Moments.of(fit_routing(moments).source(16384, seed=0), window_tokens=256)
    assert apart(drawn.share_WLE.mean(axis=0), moments.share_WLE.mean(axis=0)) < 0.03


def test_all_experts_may_be_selected() -> None:
    """With top-k of as many experts every token selects all."""
    trace = synthesize(num_tokens=512, num_layers=2, num_experts=4, top_k=4, sequence_tokens=64, seed=0)
    drawn = read_all(fit_routing(Moments.of(MemorySource(trace))).source(seed=0))
    assert (np.sort(drawn.experts_TLK, axis=2) == np.arange(4)).all()


def test_roots_make_pairs() -> None:
    """Off the diagonal, x_e x_f sums to (k - 1) p_e; equal experts have equal roots."""
    select_CE = np.array([[0.7, 0.6, 0.4, 0.3], [0.5, 0.5, 0.5, 0.5]])
    x_CE = pair_roots(select_CE, 2)
    pairs_E = x_CE * (x_CE.sum(axis=1, keepdims=True) - x_CE)
    np.testing.assert_allclose(pairs_E, select_CE, rtol=1e-3)
    np.testing.assert_allclose(x_CE[1], np.sqrt(0.5 / 3))


def test_a_router_is_kept_in_a_file(tmp_path: Path, router: FittedRouting) -> None:
    """It comes back bit by bit, and so do its traces."""
    path = tmp_path / "router.npz"
    router.save(path)
    assert FittedRouting.sniff(path)
    again = FittedRouting.load(path)
    assert again.header == router.header
    for name in ("select_LCE", "follow_LCC", "weight_WLC", "factor_WLE"):
        np.testing.assert_array_equal(getattr(again, name), getattr(router, name))
    assert again.source(2000, seed=1).digest == router.source(2000, seed=1).digest


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, router: FittedRouting, keep: float) -> None:
    """In one line that names it."""
    path = tmp_path / "router.npz"
    router.save(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match=f"{path}: is damaged or incomplete"):
        FittedRouting.load(path)


def test_another_archive_is_refused(tmp_path: Path) -> None:
    """A trace is no router."""
    path = tmp_path / "trace.npz"
    np.savez(path, topk=np.zeros((1, 1, 1), dtype=np.uint8))
    assert not FittedRouting.sniff(path)
    with pytest.raises(InputError, match="is damaged or incomplete"):
        FittedRouting.load(path)


HEADER = TraceHeader(num_layers=2, num_experts=4, top_k=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_LCE": np.full((2, 3, 5), 0.2)}, r"select_LCE has shape \(2, 3, 5\), not \(2, 3, 4\)"),
        ({"select_LCE": np.full((2, 3, 4), 0.5)}, "no probabilities that sum to top-k"),
        ({"select_LCE": np.full((2, 3, 4), np.nan)}, "select_LCE holds numbers that are negative or not"),
        ({"follow_LCC": np.full((1, 3, 3), -1.0)}, "follow_LCC holds numbers that are negative"),
        ({"weight_WLC": np.zeros((5, 2, 3))}, "a window has no class"),
        ({"weight_WLC": np.ones((0, 2, 3))}, "weight_WLC has shape|factor_WLE has shape"),
        ({"factor_WLE": np.ones((4, 2, 4))}, r"factor_WLE has shape \(4, 2, 4\)"),
        ({"window_tokens": 0}, "windows of at least one token"),
        ({"traffic_windows": 4}, "5 windows are kept of 4"),
    ],
)
def test_what_is_no_router_is_refused(changes: dict[str, Any], message: str) -> None:
    """Shapes and probabilities are checked."""
    parts: dict[str, Any] = {
        "header": HEADER,
        "window_tokens": 8,
        "traffic_windows": 5,
        "select_LCE": np.full((2, 3, 4), 0.25),
        "follow_LCC": np.full((1, 3, 3), 1 / 9),
        "weight_WLC": np.full((5, 2, 3), 1 / 3),
        "factor_WLE": np.ones((5, 2, 4)),
    }
    assert FittedRouting(**parts).num_windows == 5
    with pytest.raises(InputError, match=message):
        FittedRouting(**{**parts, **changes})


def test_fits_that_are_impossible_are_refused(moments: Moments, router: FittedRouting) -> None:
    """A class at least, a round at least, a token at least."""
    with pytest.raises(InputError, match="-1 classes in 150 rounds"):
        fit_routing(moments, num_classes=-1)
    with pytest.raises(InputError, match="in 0 rounds"):
        fit_routing(moments, rounds=0)
    with pytest.raises(InputError, match="num_tokens is -1"):
        router.source(-1, seed=0)
