"""Numbers as a reader wants them."""

from __future__ import annotations

import math

import pytest

from placement.report.numbers import Scale, number, percent, plural


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (25887.5, "25,888"),
        (1.4614, "1.461"),
        (0.012345, "0.01235"),
        (0.0, "0"),
        (-3.25, "\u22123.250"),
        (None, "\u2013"),
        (math.nan, "\u2013"),
        (math.inf, "\u2013"),
    ],
)
def test_number_keeps_four_digits(value: float | None, text: str) -> None:
    """Four significant digits, whole digits never cut, a dash for what does not exist."""
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "signed", "text"),
    [
        (0.2271, False, "22.7\u00a0%"),
        (-0.2271, True, "\u221222.7\u00a0%"),
        (0.019, True, "+1.9\u00a0%"),
        (-0.0001, True, "0.0\u00a0%"),
        (1.0, False, "100.0\u00a0%"),
        (None, True, "\u2013"),
    ],
)
def test_percent_has_a_true_minus_and_no_signed_zero(share: float | None, signed: bool, text: str) -> None:
    """Shares become per cents with one decimal; what rounds to zero has no sign."""
    assert percent(share, signed=signed) == text


@pytest.mark.parametrize(
    ("count", "noun", "text"), [(1, "window", "1 window"), (2, "window", "2 windows"), (3, "box", "3 boxes")]
)
def test_plural(count: int, noun: str, text: str) -> None:
    """A noun agrees with its count."""
    assert plural(count, noun) == text


@pytest.mark.parametrize(
    ("largest", "unit", "shown", "text"),
    [
        (2.5, "s", "s", "2.500"),
        (0.0073, "s", "ms", "7.300"),
        (4.2e-5, "s", "µs", "42.00"),
        (9e4, "cost", "cost", "90,000"),
    ],
)
def test_scale_fits_seconds_and_leaves_other_units(largest: float, unit: str, shown: str, text: str) -> None:
    """Seconds are shown in the largest unit that is not above them; a cost stays a cost."""
    scale = Scale.of(largest, unit)
    assert (scale.unit, scale.text(largest)) == (shown, text)
