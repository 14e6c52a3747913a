"""The checksum sees every kind of damage that a transfer can do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.runtime.migration.checksum import LINE, RowChecksum

CHECK = RowChecksum(torch.device("cpu"))
LINE_BYTES = 8 * LINE


def content(lines: int, seed: int = 0) -> torch.Tensor:
    """Bytes of bfloat16 weights, as experts have them."""
    weights = torch.randn(lines * LINE_BYTES // 2, generator=torch.Generator().manual_seed(seed)) * 0.02
    return weights.bfloat16().view(torch.uint8).clone()


def of(part: torch.Tensor) -> int:
    return int(CHECK.of(part.view(torch.int64)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.data())
def test_one_flipped_bit(lines: int, data: st.DataObject) -> None:
    """Any bit of any byte."""
    part = content(lines)
    before = of(part)
    part[data.draw(st.integers(0, len(part) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert of(part) != before


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([8, 64, 1000, LINE_BYTES, 2 * LINE_BYTES]), st.data())
def test_swapped_chunks(size: int, data: st.DataObject) -> None:
    """Any two chunks of the same size, wherever they lie."""
    part = content(6)
    before = of(part)
    places = len(part) // size
    first, second = data.draw(
        st.lists(st.integers(0, places - 1), min_size=2, max_size=2, unique=True).map(sorted)
    )
    a, b = part[first * size :][:size].clone(), part[second * size :][:size].clone()
    part[first * size :][:size], part[second * size :][:size] = b, a
    assert of(part) != before


@pytest.mark.parametrize("missing", [1, 7, 8, LINE_BYTES, LINE_BYTES + 8])
def test_truncation(missing: int) -> None:
    """An end that did not arrive."""
    part = content(3, seed=1)
    part[-1] = 1
    short = part.clone()
    short[-missing:] = 0
    assert of(short) != of(part)


def test_the_same_words_at_any_time() -> None:
    """Weights that grow do not change; words are the bytes' own, the first line's counted by hand."""
    small, large = content(1), content(40)
    fresh = RowChecksum(torch.device("cpu"))
    before = int(fresh.of(small.view(torch.int64)))
    fresh.prepare(40 * LINE_BYTES)
    assert before == int(fresh.of(small.view(torch.int64))) == of(small)
    assert int(fresh.of(large.view(torch.int64))) == of(large) != of(small)
    one = torch.zeros(LINE, dtype=torch.int64)
    one[0] = 1
    two = one * 2
    assert int(CHECK.of(two)) == (2 * int(CHECK.of(one)) + 2**63) % 2**64 - 2**63
