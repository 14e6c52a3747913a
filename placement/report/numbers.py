"""Numbers as a reader wants them: a sensible number of digits, a true minus, seconds in a fitting unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["NO_VALUE", "PER_CENT", "Scale", "capital", "number", "percent", "plural"]

NO_VALUE = "\N{EN DASH}"
"""Stands where a figure does not exist."""

MINUS = "\N{MINUS SIGN}"

PER_CENT = "\N{NO-BREAK SPACE}%"
"""Follows a share; no line breaks before it."""

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def number(value: float | None, *, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, thousands apart; whole digits are never cut."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def percent(share: float | None, *, digits: int = 1, signed: bool = False) -> str:
    """Return a share in per cent; what rounds to zero has no sign."""
    if share is None or not math.isfinite(share):
        return NO_VALUE
    value = round(100.0 * share, digits)
    if value == 0:
        return f"{0:.{digits}f}{PER_CENT}"
    sign = MINUS if value < 0 else "+" if signed else ""
    return f"{sign}{abs(value):,.{digits}f}{PER_CENT}"


def capital(text: str) -> str:
    """Return a text with its first letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 window``, ``2 windows``, ``2 switches``."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{count:,} {noun}{ending}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A unit to show values in.

    Parameters
    ----------
    factor
        What one shown unit is worth in the original unit.
    unit
        Its name.
    """

    factor: float
    unit: str

    @classmethod
    def of(cls, largest: float, unit: str) -> Scale:
        """Return the scale for values up to `largest`: seconds become ms, µs or ns; others stay."""
        if unit != "s":
            return cls(factor=1.0, unit=unit)
        for factor, name in _SECONDS:
            if largest >= factor:
                return cls(factor=factor, unit=name)
        return cls(factor=1.0, unit=unit)

    def text(self, value: float | None, *, digits: int = 4) -> str:
        """Return the value in this unit, without the unit's name."""
        return number(None if value is None else value / self.factor, digits=digits)
