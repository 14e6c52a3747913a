"""Synthetic traces of any length, drawn from the knobs of `synthesize`."""

from __future__ import annotations

from typing import Any

import numpy as np

from traces.source import TraceHeader
from traces.synthesize.drawn import DrawnSource, block_generator
from traces.synthesize.parametric import Knobs, Router, bursts
from traces.trace import Trace

__all__ = ["SyntheticSource"]

_DRAWN_AT_ONCE = 1 << 22


class SyntheticSource(DrawnSource):
    """A trace like that of `synthesize`, but drawn block by block: it may be longer than memory.

    Every block has its own random numbers, which follow from the seed and the block's number, so that any
    range of tokens is drawn without those before it. (`synthesize` draws the same router's tokens from one
    stream of numbers: its traces are others.)

    Parameters
    ----------
    seed
        Seed; the same arguments give the same trace.
    **knobs
        As `synthesize` takes them.

    Raises
    ------
    InputError
        If a number is out of range.
    """

    def __init__(self, *, seed: int, **knobs: Any) -> None:
        self._knobs = Knobs(**knobs)
        rng = block_generator(seed, 0, stream=0)
        num_sequences = -(-self._knobs.num_tokens // self._knobs.sequence_tokens)
        # One small number per sequence is kept, whatever the trace's length.
        self._domain_of_sequence = bursts(rng, num_sequences, self._knobs.num_domains).astype(np.int32)
        self._router = Router(rng, self._knobs)
        self._seed = seed
        header = TraceHeader(
            num_layers=self._knobs.num_layers,
            num_experts=self._knobs.num_experts,
            top_k=self._knobs.top_k,
            model_name="synthetic",
            moe_layer_ids=tuple(range(self._knobs.num_layers)),
            domain_names=self._knobs.domain_names,
        )
        drawn = max(1, _DRAWN_AT_ONCE // self._knobs.num_experts)
        super().__init__(header, self._knobs.num_tokens, drawn, self._block)

    def _block(self, block: int, tokens: int) -> Trace:
        knobs, header = self._knobs, self.header
        first = block * max(1, _DRAWN_AT_ONCE // knobs.num_experts)
        token_T = np.arange(first, first + tokens)
        sequence_T, position_T = np.divmod(token_T, knobs.sequence_tokens)
        domain_T = self._domain_of_sequence[sequence_T].astype(np.int64)
        time_T = (token_T / max(knobs.num_tokens - 1, 1)).astype(np.float32)
        rng = block_generator(self._seed, block)
        experts_TLK = np.empty((tokens, header.num_layers, header.top_k), dtype=header.dtype)
        for layer, choice_TK in enumerate(self._router.route(rng, domain_T, time_T)):
            experts_TLK[:, layer] = choice_TK
        return Trace.trusted(
            experts_TLK=experts_TLK,
            num_experts=header.num_experts,
            sequence_T=sequence_T,
            position_T=position_T,
            domain_T=domain_T,
            domain_names=header.domain_names,
            model_name=header.model_name,
            moe_layer_ids=header.moe_layer_ids,
        )
