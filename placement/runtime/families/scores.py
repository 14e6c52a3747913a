"""Families whose router returns the logits of all experts, from which the block takes the top-k itself.

The same operations on the same tensor give the same ids, ties included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from placement.runtime.families.fused import FusedFamily
from placement.runtime.families.protocol import MoELayer

__all__ = ["ScoresFamily"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoresFamily(FusedFamily):
    """A family whose top-k is that of the router's logits.

    Parameters
    ----------
    logits_output
        Position of the logits in the router's output tuple; `None` where they are all of the output.
    softmax
        Whether the block takes the top-k of the softmax, in the type of the logits: rounding may tie there
        what differs before.
    """

    logits_output: int | None = None
    softmax: bool = False

    def read_top_k(self, router_output: Any, layer: MoELayer) -> torch.Tensor:
        """Top-k of the logits, ``[tokens, top-k]``."""
        at = self.logits_output
        logits_TE: torch.Tensor = router_output if at is None else router_output[at]
        if self.softmax:
            logits_TE = torch.softmax(logits_TE, dim=1, dtype=logits_TE.dtype)
        return torch.topk(logits_TE, layer.top_k, dim=1).indices
