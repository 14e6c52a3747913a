"""Where recorded tokens go: the protocol, and the sink that keeps them in memory.

Shape letters: T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.trace import UNKNOWN_DOMAIN, Trace

__all__ = ["MemorySink", "TraceSink"]

IntArray = npt.NDArray[np.int64]
ExpertArray = npt.NDArray[np.unsignedinteger[Any]]


class TraceSink(Protocol):
    """Takes recorded tokens; `traces.store.DatasetWriter` and `MemorySink` are two."""

    def append(
        self,
        experts_TLK: ExpertArray,
        *,
        sequence_T: IntArray,
        position_T: IntArray,
        domain_T: IntArray | None,
    ) -> None:
        """Add tokens, in recorded order."""
        ...

    def close(self) -> None:
        """Finish; nothing is appended afterwards."""
        ...


class MemorySink:
    """Keeps recorded tokens in memory.

    Parameters
    ----------
    num_experts, model_name, moe_layer_ids, domain_names
        As in `Trace`.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        model_name: str | None = None,
        moe_layer_ids: tuple[int, ...] | None = None,
        domain_names: tuple[str, ...] = (),
    ) -> None:
        self._header: dict[str, Any] = {
            "num_experts": num_experts,
            "model_name": model_name,
            "moe_layer_ids": moe_layer_ids,
            "domain_names": domain_names,
        }
        self._batches: list[tuple[ExpertArray, IntArray, IntArray, IntArray]] = []

    def append(
        self,
        experts_TLK: ExpertArray,
        *,
        sequence_T: IntArray,
        position_T: IntArray,
        domain_T: IntArray | None,
    ) -> None:
        """Add tokens, in recorded order."""
        domains_T = np.full_like(sequence_T, UNKNOWN_DOMAIN) if domain_T is None else domain_T
        self._batches.append((experts_TLK, sequence_T, position_T, domains_T))

    def close(self) -> None:
        """Do nothing: the tokens stay readable."""

    def trace(self) -> Trace:
        """Return what was recorded.

        Raises
        ------
        InputError
            If nothing was.
        """
        if not self._batches:
            raise InputError("nothing was recorded: the model ran no token")
        experts_TLK, sequence_T, position_T, domain_T = map(np.concatenate, zip(*self._batches, strict=True))
        return Trace(
            experts_TLK=experts_TLK,
            sequence_T=sequence_T,
            position_T=position_T,
            domain_T=domain_T,
            **self._header,
        )
