"""What a plain expert-parallel layer does beside its matrix products: bytes that pass, operations issued.

The program is the usual eager one in PyTorch. ``prepare`` orders pairs (or, de-duplicated, tokens) by
destination, tells every rank how many come, and gathers their rows. ``dispatch`` exchanges rows and, in small
exchanges of their own, what the experts' rank must know of them. ``experts`` orders the rows that came by
expert, gathers them, multiplies, and puts the results back in the order of arrival; de-duplicated rows become
one row for each of their pairs here, and their results are weighed and summed here. ``combine`` exchanges the
results, ``unpermute`` weighs and sums them in float32, each token's.

Bytes are counted for each element of a row of two-byte numbers, reading and writing both, every kernel by
itself. Operations are those that the host issues while the GPU has nothing else to do: after it has waited
for a count. The numbers are those of one such program; where programs differ (weights applied in two-byte
numbers or in float32, results put back into zeros or into empty memory, operations of a sort or a histogram)
the variant was chosen that agrees best with 672 layers measured on two H100, so that agreement with those is
no test of them. A calibration file with measured row handling replaces the counted terms.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEDUP", "PAIRS", "LayerProgram"]

SORT = 8
"""Operations of a sort: a radix sort of 64-bit keys passes over them eight times."""

HISTOGRAM = 5
"""Operations of counting keys: smallest and largest are found and read by the host, then all are counted."""

LIST = 4
"""Operations of listing marked places: they are counted, the host reads how many, selects and splits them."""

WAIT = 1
"""Operations that one reading of numbers by the host is worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProgram:
    """One way to run a layer.

    Parameters
    ----------
    prepare_operations, experts_operations, unpermute_operations
        Operations issued to an idle GPU.
    prepare_bytes
        Bytes per element of the rows sent.
    expand_bytes, reduce_bytes
        Bytes per element of the pairs' rows at the experts, before and after the products.
    unpermute_bytes
        Bytes per element of the rows that came back.
    token_bytes
        Bytes per element of a token's sum.
    arrived_bytes
        Bytes per element of the rows sums are kept for at the experts.
    tag_bytes, tag_bytes_per_choice
        Bytes that go along with each row, one entry for each small exchange: of the row, and of each of the
        experts that its token chose.
    """

    prepare_operations: int
    experts_operations: int
    unpermute_operations: int
    prepare_bytes: float
    expand_bytes: float
    reduce_bytes: float
    unpermute_bytes: float
    token_bytes: float
    arrived_bytes: float
    tag_bytes: tuple[float, ...]
    tag_bytes_per_choice: tuple[float, ...]


PAIRS = LayerProgram(
    # Destinations, their order, counts there and back as lists; each pair's token, row and expert (two).
    prepare_operations=1 + SORT + HISTOGRAM + 2 * WAIT + 4,
    # Order by expert, counts, their running sum and its type, rows; two to set up the first product.
    experts_operations=SORT + HISTOGRAM + 3 + 2,
    # The host is far ahead by now: what is left is the start of kernels.
    unpermute_operations=1,
    prepare_bytes=2 + 2,
    expand_bytes=2 + 2,
    # Zeros, then rows written to their places.
    reduce_bytes=2 + (2 + 2),
    # To float32, times the weight, added to its token's sum (read row, read and write sum).
    unpermute_bytes=(2 + 4) + (4 + 4) + (4 + 4 + 4),
    # Zeros, and back to two bytes.
    token_bytes=4 + (4 + 2),
    arrived_bytes=0,
    tag_bytes=(8,),
    tag_bytes_per_choice=(0,),
)
"""One row for each token-expert pair; weights are applied at home."""

DEDUP = LayerProgram(
    # Destinations, marks (three), rows to send, their counts as lists; rows, experts and weights of each,
    # those of other ranks masked (nine).
    prepare_operations=1 + 3 + LIST + 2 * WAIT + 1 + 9,
    # Marks, list of pairs, their experts, order, rows and weights in it (four), counts, running sum and its
    # type; two to set up the first product.
    experts_operations=1 + LIST + 1 + SORT + 4 + HISTOGRAM + 2 + 2,
    unpermute_operations=1,
    prepare_bytes=2 + 2,
    expand_bytes=2 + 2,
    # Times the weight, added to its row's sum.
    reduce_bytes=(2 + 2) + (2 + 2 + 2),
    unpermute_bytes=(2 + 4) + (4 + 4 + 4),
    token_bytes=4 + (4 + 2),
    # Zeros.
    arrived_bytes=2,
    tag_bytes=(0, 0),
    # Expert ids and float32 weights.
    tag_bytes_per_choice=(8, 4),
)
"""One row for each rank that a token goes to; weights are applied at the experts."""
