"""Greedy packing of weighted items into bins that all hold the same number of items.

Shape letters: L layers (independent problems), N items, B bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasibleError, InputError

__all__ = ["check_weight", "pack_equal", "pack_equal_ranked"]

IntArray = npt.NDArray[np.int64]


def check_weight(weight_LN: npt.ArrayLike, *, name: str) -> npt.NDArray[np.floating[Any]]:
    """Return loads as a float array ``[layers, items]``, single precision kept where given.

    Raises
    ------
    InputError
        If it is not a table of numbers, is empty, or a value or the sum of a row is negative or not finite.
    """
    try:
        weight = np.asarray(weight_LN)
    except ValueError as exc:
        raise InputError(f"{name} must be a table [layers, items] with rows of equal length") from exc
    if weight.dtype.kind not in "iuf":
        raise InputError(f"{name} holds {weight.dtype} values, not numbers")
    if weight.ndim != 2 or 0 in weight.shape:
        raise InputError(f"{name} has shape {weight.shape}, not [layers, items]")
    values = weight if weight.dtype == np.float32 else weight.astype(np.float64)
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        layer, item = (int(i[0]) for i in np.nonzero(bad))
        raise InputError(
            f"{name}[{layer}][{item}] is {values[layer, item]}; loads are finite and not negative"
        )
    with np.errstate(over="ignore"):
        total_L = values.sum(axis=1)
    if np.isinf(total_L).any():
        raise InputError(f"{name} of layer {int(np.isinf(total_L).argmax())} sums to infinity; scale it down")
    return values


def pack_equal(weight_LN: npt.ArrayLike, num_bins: int) -> IntArray:
    """Pack items into bins of equal count so that the heaviest bin is light.

    Longest first: items in order of falling weight, each into the lightest bin that has room. Equal
    weights go by item number, equally light bins by bin number. With one item per bin nothing can be
    balanced and item ``i`` stays in bin ``i``.

    Parameters
    ----------
    weight_LN
        Weight of each item, ``[layers, items]``; every layer is packed on its own.
    num_bins
        Bins; must divide the items.

    Returns
    -------
    IntArray
        Bin of each item, ``[layers, items]``.

    Raises
    ------
    InputError
        If the weights are malformed or there is no bin.
    InfeasibleError
        If the items do not divide evenly over the bins.
    """
    return pack_equal_ranked(weight_LN, num_bins)[0]


def pack_equal_ranked(weight_LN: npt.ArrayLike, num_bins: int) -> tuple[IntArray, IntArray]:
    """Pack as `pack_equal` does; also return the place of each item within its bin, in order of packing.

    Raises
    ------
    InputError, InfeasibleError
        As `pack_equal`.
    """
    weight = check_weight(weight_LN, name="weight")
    num_layers, num_items = weight.shape
    capacity = _capacity(num_items, num_bins)
    if capacity == 1:
        identity = np.broadcast_to(np.arange(num_items, dtype=np.int64), weight.shape)
        return identity.copy(), np.zeros(weight.shape, dtype=np.int64)
    # All layers take their heaviest item at once, then their second heaviest, and so on.
    order_LN = np.argsort(-weight, axis=1, kind="stable")
    layer_L = np.arange(num_layers)
    load_LB = np.zeros((num_layers, num_bins), dtype=weight.dtype)
    count_LB = np.zeros((num_layers, num_bins), dtype=np.int64)
    bin_LN = np.empty(weight.shape, dtype=np.int64)
    rank_LN = np.empty(weight.shape, dtype=np.int64)
    for item_L in order_LN.T:
        bin_L = np.where(count_LB < capacity, load_LB, np.inf).argmin(axis=1)
        bin_LN[layer_L, item_L] = bin_L
        rank_LN[layer_L, item_L] = count_LB[layer_L, bin_L]
        load_LB[layer_L, bin_L] += weight[layer_L, item_L]
        count_LB[layer_L, bin_L] += 1
    return bin_LN, rank_LN


def _capacity(num_items: int, num_bins: int) -> int:
    if num_bins < 1:
        raise InputError(f"{num_bins} bins; there must be 1 or more")
    if num_items % num_bins:
        raise InfeasibleError(
            f"{num_items} items do not divide evenly over {num_bins} bins ({num_items % num_bins} left over)"
        )
    return num_items // num_bins
