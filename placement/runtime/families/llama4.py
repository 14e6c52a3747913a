"""Llama-4: its router returns a score for every expert, zero for those that a token did not select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from placement.runtime.families.protocol import MoELayer
from placement.runtime.families.scores import ScoresFamily

__all__ = ["FAMILY", "Llama4Family"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama4Family(ScoresFamily):
    """Scores of all experts, ``[tokens, experts]``, beside the logits they are made from.

    The block multiplies a copy of the tokens for every expert with its score, so that experts which were
    not selected compute zeros; with a placement there is a column for every slot instead.
    """

    def replace_top_k(
        self, router_output: Any, slot_TK: torch.Tensor, layer: MoELayer, num_slots: int
    ) -> Any:
        """Return scores of slots for scores of experts."""
        scores_TE, logits_TE = router_output
        scores_TK = scores_TE.gather(1, self.read_top_k(router_output, layer))
        scores_TS = scores_TE.new_zeros(len(scores_TE), num_slots).scatter(1, slot_TK, scores_TK)
        return scores_TS, logits_TE


FAMILY = Llama4Family(model_type="llama4_text", block="feed_forward", router="router", logits_output=1)
