"""Whatever a document holds, reading it ends in a placement or in one line that says why not."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
from formats.samples import HYBRID, place
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.formats.document import parse_document
from placement.formats.files import FORMATS, encode_as, placement_from_document
from placement.formats.layers import ModelLayers
from placement.formats.protocol import FormatOptions
from placement.plan import Placement

ONE = place([[0, 3, 1, 2], [0, 3, 1, 2]], moe_layer_ids=(1, 2), model_name="hybrid")
OPTIONS = FormatOptions(layers=ModelLayers.of(HYBRID), num_devices=2)
GOOD = {name: parse_document(encode_as(ONE, name, OPTIONS)) for name in FORMATS}

numbers = st.integers(-2, 9) | st.sampled_from([2**31, 2**63, 2**64, -(2**70)])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to every value within a document."""
    found = [path] if path else []
    inner = dict(enumerate(document)) if isinstance(document, list) else document
    for key, value in inner.items() if isinstance(inner, dict) else ():
        found += places(value, (*path, key))
    return found


def changed(document: Any, path: tuple[Any, ...], change: Any, value: Any) -> Any:
    """Return a copy in which the value at a path is replaced, removed, or has another beside it."""
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if change == "replace":
        parent[path[-1]] = value
    elif change == "remove":
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.insert(path[-1], value)
    else:
        parent["extra"] = value
    return document


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30)
@given(data=st.data())
def test_damaged_documents(name: str, data: st.DataObject) -> None:
    """One value that is replaced, removed or added never ends in anything but our own error."""
    path = data.draw(st.sampled_from(places(GOOD[name])))
    change = data.draw(st.sampled_from(["replace", "remove", "add"]))
    document = changed(GOOD[name], path, change, data.draw(values))
    with suppress(InputError):
        assert isinstance(placement_from_document(document, OPTIONS), Placement)


@settings(max_examples=60)
@given(document=values, known=st.booleans())
def test_any_document(document: Any, known: bool) -> None:
    """JSON of any shape is refused, whether the model is known or not."""
    with pytest.raises(InputError):
        placement_from_document(document, OPTIONS if known else None)
