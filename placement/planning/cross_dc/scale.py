"""How the gain changes as data centres are added: the model over many sizes, no simulation needed.

The paper (arXiv 2510.19470) simulates up to 1,000 data centres with a fixed domain size and with a fixed
share of tokens. Bytes per device stay as they are while data centres are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.errors import InputError
from placement.planning.cross_dc.closed_form import share_of_size, time_of_share
from placement.planning.cross_dc.even import EvenLoad, best_sizes, even_times
from placement.planning.cross_dc.level import divisors

__all__ = ["DEFAULT_CENTRES", "ScalePoint", "scale_curve"]

DEFAULT_CENTRES = (2, 4, 8, 16, 32, 64, 100, 128, 200, 256, 400, 512, 600, 800, 1000)
"""Numbers of data centres of the curve, up to the paper's 1,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePoint:
    """Gain over plain expert parallelism at one number of data centres.

    Parameters
    ----------
    centres
        Data centres.
    fixed_size
        Speed-up with the domain size kept; None where it does not divide the data centres.
    fixed_share
        Speed-up with the share of tokens kept.
    best
        Speed-up with the best domain size within memory, and that size.
    best_size
        Data centres of the best domain.
    """

    centres: int
    fixed_size: float | None
    fixed_share: float
    best: float
    best_size: int


def scale_curve(
    load: EvenLoad, *, size: int, share: float, centres: Sequence[int] = DEFAULT_CENTRES
) -> tuple[ScalePoint, ...]:
    """Return the speed-ups of the outermost level over many numbers of data centres.

    Parameters
    ----------
    load
        The layer; only its outermost level is kept, forward only where the share is fixed.
    size, share
        Domain size, and share of chunks sent as tokens, that are kept.

    Raises
    ------
    InputError
        If the size is below 1 or a number of data centres below 2.
    """
    if size < 1 or min(centres, default=2) < 2:
        raise InputError(
            f"domains of {size} in {list(centres)} data centres; at least 1 of at least 2 is needed"
        )
    return tuple(_point(load, count, size, share) for count in centres)


def _point(load: EvenLoad, count: int, size: int, share: float) -> ScalePoint:
    outer = replace(load, levels=(replace(load.levels[0], size=count),))
    plain_s = even_times(outer, (1,)).step_s
    best = best_sizes(outer)
    forward = replace(outer, training=False)
    shared_s = time_of_share(forward, share)
    fixed = _speed_up(plain_s, even_times(outer, (size,)).step_s) if size in divisors(count) else None
    return ScalePoint(
        centres=count,
        fixed_size=fixed,
        fixed_share=_speed_up(time_of_share(forward, share_of_size(count, 1)), shared_s),
        best=_speed_up(plain_s, best.step_s),
        best_size=best.sizes[0],
    )


def _speed_up(before_s: float, after_s: float) -> float:
    return 1.0 if after_s == 0 else before_s / after_s
