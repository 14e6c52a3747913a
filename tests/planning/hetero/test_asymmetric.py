"""Tests of Algorithm 1 of HeterMoE."""

from __future__ import annotations

from typing import Any

import pytest

from placement.planning.hetero import asymmetric_offload

FIG_6: dict[str, Any] = {
    "num_layers": 3, "num_experts": 6, "num_attention": 1, "num_expert_devices": 1,
    "attention_s": 1.0, "attention_expert_s": 4 / 3, "expert_s": 4 / 3,
}  # fmt: skip


def test_figure_6() -> None:
    """Gathers 1/3 a layer, an expert costs 4/9: none in the first layer, one in each other."""
    for as_printed in (True, False):
        assert asymmetric_offload(**FIG_6, as_printed=as_printed).offload_L == (0, 1, 1)


def test_the_print_swaps_the_chunk_sizes() -> None:
    """With M = 1 and N = 2 a chunk is n1 = 2 experts acquired, n2 = 1 offloaded by each device."""
    given = {**FIG_6, "num_experts": 12, "num_expert_devices": 2, "num_layers": 5, "attention_s": 1.0}
    # gather 1, T_E^Exp 2, T_E^Attn 1: squeeze as printed (2 x 2 + 1 x 1) x 2/12 = 5/6, as meant 4/6.
    times = {"expert_s": 2.0, "attention_expert_s": 1.0}
    printed = asymmetric_offload(**{**given, **times})
    meant = asymmetric_offload(**{**given, **times}, as_printed=False)
    # floor(cumulative gather / squeeze): 1.2, 2.4, 3.6, 4.8, 6.0 and 1.5, 3, 4.5, 6, 7.5
    assert printed.offload_L == (1, 1, 1, 1, 2)
    assert meant.offload_L == (1, 2, 1, 2, 1)


def test_undefined_where_neither_side_divides_the_other() -> None:
    """4 attention and 3 expert devices, or 7 experts on 2 devices."""
    answer = asymmetric_offload(**{**FIG_6, "num_attention": 4, "num_expert_devices": 3})
    assert answer.offload_L is None
    assert answer.reason == "neither of 4 and 3 divides the other"
    answer = asymmetric_offload(**{**FIG_6, "num_experts": 7, "num_expert_devices": 2, "num_attention": 2})
    assert answer.reason == "7 experts do not divide among 2 devices"


def test_memory_bends_the_pace() -> None:
    """Room for one expert slows the offloading, three that must go hasten it; both at once is undefined."""
    assert asymmetric_offload(**FIG_6, most_offload=1).offload_L == (0, 0, 1)
    assert asymmetric_offload(**FIG_6, most_offload=0).offload_L == (0, 0, 0)
    assert asymmetric_offload(**FIG_6, least_offload=3).offload_L == (1, 1, 1)
    assert asymmetric_offload(**FIG_6, least_offload=3, most_offload=2).offload_L is None


def test_no_idle_time_means_no_offloading() -> None:
    """Where attention is slower nothing is offloaded, and what must go has no answer."""
    slow = {**FIG_6, "attention_s": 2.0}
    assert asymmetric_offload(**slow).offload_L == (0, 0, 0)
    assert "no idle time" in asymmetric_offload(**slow, least_offload=1).reason


@pytest.mark.parametrize("layers", [1, 4, 30])
def test_no_layer_gives_more_than_it_has(layers: int) -> None:
    """However idle attention devices are, an expert device keeps 0 or more."""
    given = {**FIG_6, "num_layers": layers, "attention_s": 0.01, "attention_expert_s": 0.01}
    offload_L = asymmetric_offload(**given).offload_L
    assert offload_L is not None
    assert max(offload_L) <= 6
