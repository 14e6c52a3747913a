"""Llama-4: its block multiplies a copy of all tokens for every expert; here it is shown one expert.

The block sees a router that scores a single "expert" with ones, hands the tokens over as they are, and gets
the sum over the experts that were really selected.

Shape letters: T tokens, E experts, K top-k, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from placement.errors import InputError
from placement.runtime.families.protocol import ModelFamily, MoELayer
from placement.runtime.parallel.experts import Experts

__all__ = ["take_over_scores"]


class _Selection:
    """What the router of a layer selected last, until its experts run."""

    def __init__(self, family: ModelFamily, layer: MoELayer, run: Experts) -> None:
        self._family, self._layer, self._run = family, layer, run
        self._chosen: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Keep ids and scores, and return scores of one expert that takes every token."""
        scores_TE = output[0]
        index_TK = self._family.read_top_k(output, self._layer)
        self._chosen = index_TK, scores_TE.gather(1, index_TK)
        return scores_TE.new_ones(len(scores_TE), 1), *output[1:]

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Run the experts that were selected."""
        if self._chosen is None:
            raise InputError("the experts ran without their router; run the layer whole")
        (index_TK, score_TK), self._chosen = self._chosen, None
        return self._run(hidden_TH, index_TK, score_TK)


def take_over_scores(family: ModelFamily, layer: MoELayer, run: Experts) -> Any:
    """Return the forward pass of a layer's experts, and hook its router."""
    selection = _Selection(family, layer, run)
    layer.router.register_forward_hook(selection.keep)
    return selection.forward
