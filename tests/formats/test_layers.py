"""Tests of whose layers a placement's rows are: nothing is guessed, contradictions are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from formats.samples import HYBRID, place

from placement.errors import InputError
from placement.formats.layers import ModelLayers, layers_of, stated_layer_ids
from placement.model import MODELS
from placement.plan import Placement

ROWS = [[0, 1, 2, 3], [3, 2, 1, 0]]


def test_the_layers_of_a_model() -> None:
    """Dense layers at both ends, prediction layers behind the decoder."""
    layers = ModelLayers.of(HYBRID)
    assert (layers.moe_layer_ids, layers.num_decoder_layers, layers.mtp_layer_ids) == ((1, 2), 4, (4,))
    assert ModelLayers.of(HYBRID, num_mtp_layers=3).mtp_layer_ids == (4, 5, 6)
    assert ModelLayers.of(HYBRID, num_mtp_layers=0).mtp_layer_ids == ()


def test_groups_count_only_where_they_limit() -> None:
    """A router that may use every group chooses among experts, not groups."""
    assert ModelLayers.of(MODELS["deepseek-v3"]).num_expert_groups == 8
    assert ModelLayers.of(replace(MODELS["deepseek-v3"], top_groups=8)).num_expert_groups == 1


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (place(ROWS), None),
        (place(ROWS, moe_layer_ids=(0, 1)), None),  # what a file without a model is numbered with
        (place(ROWS, moe_layer_ids=(1, 2)), (1, 2)),
        (place(ROWS, moe_layer_ids=(0, 1), model_name="m"), (0, 1)),
        (place(ROWS, moe_layer_ids=(0, 1), extra={"model": {"num_decoder_layers": 2}}), (0, 1)),
    ],
)
def test_what_a_placement_states(placement: Placement, expected: tuple[int, ...] | None) -> None:
    """Layers numbered from 0 without any model are a number of layers, not a layer map."""
    assert stated_layer_ids(placement) == expected


def test_nothing_known_stays_unknown() -> None:
    """Neither file nor model says anything; a name that nobody knows is no layer map."""
    assert layers_of(place(ROWS)) is None
    assert layers_of(place(ROWS, moe_layer_ids=(0, 1), model_name="my-moe")) is None


def test_a_named_model_decides() -> None:
    """The model gives what the placement leaves open."""
    assert layers_of(place(ROWS), HYBRID) == ModelLayers.of(HYBRID)
    assert layers_of(place(ROWS, moe_layer_ids=(1, 2)), HYBRID) == ModelLayers.of(HYBRID)


def test_the_file_may_know_its_model() -> None:
    """What a solve wrote down is enough without a model."""
    facts = {"num_decoder_layers": 4, "num_mtp_layers": 1, "num_expert_groups": 2}
    placement = place(ROWS, moe_layer_ids=(1, 2), model_name="hybrid", extra={"model": facts})
    layers = layers_of(placement)
    assert layers is not None
    assert (layers.moe_layer_ids, layers.num_decoder_layers, layers.mtp_layer_ids) == ((1, 2), 4, (4,))
    assert layers.num_expert_groups == 2
    without = layers_of(placement, num_mtp_layers=0)
    assert without is not None
    assert without.mtp_layer_ids == ()


def test_layers_alone_say_nothing_of_the_rest() -> None:
    """A model of an unknown name has its layers, and no more."""
    layers = layers_of(place(ROWS, moe_layer_ids=(1, 2), model_name="hybrid"))
    assert layers is not None
    assert (layers.moe_layer_ids, layers.num_decoder_layers, layers.mtp_layer_ids) == ((1, 2), None, None)


def test_a_preset_is_known_by_its_name() -> None:
    """The name of a published model is as good as --model."""
    model = MODELS["mixtral-8x7b"]
    placement = place([[*range(8)]] * 32, experts=8, model_name="mistralai/Mixtral-8x7B-v0.1")
    assert layers_of(placement) == ModelLayers.of(model)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            place(ROWS, moe_layer_ids=(0, 1), model_name="x"),
            "decoder layers 0, 1, hybrid has .* at 1, 2: it would",
        ),
        (place([ROWS[0]]), "has 1 layers, hybrid has 2 MoE layers 1, 2"),
        (place([[0, 1], [1, 0]], experts=2), "has 2 experts per layer, hybrid has 4"),
    ],
)
def test_contradictions(placement: Placement, message: str) -> None:
    """A placement that is off by a dense layer would load into the wrong layers without a word."""
    with pytest.raises(InputError, match=message):
        layers_of(placement, HYBRID)


def test_a_preset_that_contradicts_is_refused_too() -> None:
    """58 layers counted from 0 are not those of DeepSeek-V3, which begin at 3."""
    placement = place(
        [[*range(256)]] * 58, experts=256, moe_layer_ids=tuple(range(58)), model_name="deepseek-v3"
    )
    with pytest.raises(InputError, match="decoder layers 0-57, deepseek-v3 has its MoE layers at 3-60"):
        layers_of(placement)


@pytest.mark.parametrize(
    "facts",
    [
        {"num_decoder_layers": 2},
        {"num_decoder_layers": 4, "num_mtp_layers": -1},
        {"num_decoder_layers": 4, "num_mtp_layers": "1"},
        {"num_decoder_layers": 4, "num_expert_groups": 0},
    ],
)
def test_a_file_that_contradicts_itself(facts: dict[str, object]) -> None:
    """MoE layers lie within the decoder, and counts are counts."""
    placement = place(ROWS, moe_layer_ids=(1, 2), model_name="hybrid", extra={"model": facts})
    with pytest.raises(InputError, match="its MoE layers go up to 2"):
        layers_of(placement)
