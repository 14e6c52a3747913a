"""Bodies of requests: what is taken, what is refused, and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.api.bodies import hash_of, parse_body
from service.errors import InvalidError
from service.schemas import SolveRequest

TRACE = "sha256:" + "0" * 64
SMALLEST: dict[str, Any] = {"trace_id": TRACE, "topology": "h100:1x2"}


def parse(text: str | bytes) -> SolveRequest:
    return parse_body(text if isinstance(text, bytes) else text.encode(), SolveRequest)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "body: is empty"),
        (b"{", "body: is not JSON"),
        (b"\xff\xfe", "body: is not JSON"),
        (b"[1]", "body: input should be"),
        (b'"text"', "body: input should be"),
        (b"NaN", "body: is not JSON"),
        (json.dumps({**SMALLEST, "options": {"time_limit": 1}}).replace("1}", "1e999}"), "is not JSON"),
        (json.dumps(SMALLEST).replace("h100", "\\ud800"), "is not JSON"),
        (json.dumps({**SMALLEST, "topology": {"a": "x\x00"}}), "NUL"),
        (json.dumps({**SMALLEST, "topology": {"a\x00": 1}}), "NUL"),
        (
            json.dumps({**SMALLEST, "topology": {}}).replace("{}", '{"a":' + "[" * 500 + "]" * 500 + "}"),
            "deep",
        ),
        (json.dumps({**SMALLEST, "topology": {}}).replace("{}", '{"a":' * 5000 + "1" + "}" * 5000), "JSON"),
        (json.dumps({"topology": "h100:1x2"}), "trace_id: field required"),
        (json.dumps({**SMALLEST, "trace_id": "x"}), "trace_id: string should match"),
        (json.dumps({**SMALLEST, "topology": 3}), "topology: input should be"),
        (json.dumps({**SMALLEST, "topologie": 3}), "topologie: is unknown; did you mean 'topology'?"),
        (
            json.dumps({**SMALLEST, "options": {"windw": 3}}),
            "options.windw: is unknown; did you mean 'window'?",
        ),
        (json.dumps({**SMALLEST, "options": {"window": 0}}), "options.window: input should be greater"),
        (json.dumps({**SMALLEST, "options": {"window": 10**40}}), "options.window: unable to parse"),
        (json.dumps({**SMALLEST, "priority": 10**9}), "priority: input should be less"),
    ],
)
def test_a_refused_body_says_where_and_what(body: str | bytes, says: str) -> None:
    """One line, beginning with the member that is wrong."""
    with pytest.raises(InvalidError) as found:
        parse(body)
    assert says in found.value.detail
    assert "\n" not in found.value.detail
    assert "pydantic" not in found.value.detail


def test_all_errors_are_listed() -> None:
    """The detail counts the errors, the list names them."""
    with pytest.raises(InvalidError, match=r"and 2 more") as found:
        parse(json.dumps({"trace_id": 1, "x": 2}))
    assert [error["where"] for error in found.value.extensions["errors"]] == ["trace_id", "topology", "x"]


def test_a_request_is_hashed_by_what_it_means() -> None:
    """Order, spaces and defaults that are written out do not matter; what is asked for does."""
    plain = hash_of(parse(json.dumps(SMALLEST)))
    same = {"topology": "h100:1x2", "options": {"seed": 0}, "trace_id": TRACE, "priority": 0}
    assert hash_of(parse(json.dumps(same, indent=3))) == plain
    assert hash_of(parse(json.dumps({**SMALLEST, "options": {"seed": 1}}))) != plain
    assert hash_of(parse(json.dumps({**SMALLEST, "validate_only": True}))) != plain


def test_an_escaped_backslash_is_no_nul() -> None:
    r"""A text may speak of ``\u0000`` without holding it."""
    body = json.dumps({**SMALLEST, "topology": {"name": "\\u0000"}})
    assert parse(body).topology == {"name": "\\u0000"}
