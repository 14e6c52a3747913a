"""Attention beside the experts."""

from __future__ import annotations

from typing import Any

import pytest

from placement.errors import InputError
from placement.model_shape import ModelShape
from placement.planning.transformer import TransformerShape

MOE = ModelShape(
    name="tiny",
    num_layers=2,
    num_experts=4,
    top_k=2,
    hidden_size=8,
    expert_hidden_size=16,
    num_shared_experts=1,
)


def test_attention_has_four_square_matrices_by_default() -> None:
    """4 x 8 x 8 weights."""
    assert TransformerShape(moe=MOE, num_attention_heads=2).attention_params == 256


def test_operations_of_attention() -> None:
    """Projections 2 x 256 a token; scores 4 s d = 4 x 10 x 8 a token, half of it under a causal mask."""
    shape = TransformerShape(moe=MOE, num_attention_heads=2)
    assert shape.attention_flops(tokens=3, sequence_length=10) == 3 * (512 + 160)
    assert shape.attention_flops(tokens=3, sequence_length=10, causal=False) == 3 * (512 + 320)


def test_shared_experts_are_as_large_as_routed_ones() -> None:
    """Three matrices of 8 x 16."""
    assert TransformerShape(moe=MOE, num_attention_heads=2).shared_expert_params() == 3 * 8 * 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 1, "attention_params": -1}, "attention_params is -1"),
        ({"num_attention_heads": 1, "vocabulary_size": -5}, "vocabulary_size is -5"),
    ],
)
def test_numbers_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    """The message names model, number and value."""
    with pytest.raises(InputError, match=f"model 'tiny': {message}"):
        TransformerShape(moe=MOE, **values)
