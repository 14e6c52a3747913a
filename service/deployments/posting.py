"""What ranks post: windows of counts, checked value by value without numpy, packed for the database."""

from __future__ import annotations

import sys
import zlib
from array import array
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from service.deployments.records import LoadPart
from service.errors import InvalidError

__all__ = ["MOST_PAIRS", "WindowsPosted", "parse_windows"]

MOST_PAIRS = 1 << 48
"""Pairs of one expert in one window; more is a slip of the pen."""

MOST_NUMBER = (1 << 53) - 1
"""Largest number of a window: what JSON holds exactly everywhere."""

MOST_WINDOWS = 1024
MOST_VERSION = (1 << 31) - 1
COMPRESSION = 1


class WindowPosted(BaseModel):
    """One window of one rank."""

    window: int = Field(ge=0, le=MOST_NUMBER, description="Its number: each once, the same on all ranks.")
    tokens: float | None = Field(
        default=None, ge=0, description="Tokens that it covers; default: pairs over layers and top-k."
    )
    load: list[list[Annotated[int, Field(ge=0, le=MOST_PAIRS)]]] = Field(
        description="Token-expert pairs of logical experts, [layers][experts]."
    )


class WindowsPosted(BaseModel):
    """Body of ``POST /v1/deployments/{name}/windows``."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(default=0, ge=0, description="Below the deployment's num_ranks.")
    version: int | None = Field(default=None, ge=1, description="Version of the placement that ran.")
    windows: list[WindowPosted] = Field(min_length=1, max_length=MOST_WINDOWS)


def parse_windows(body: bytes, *, facts: Mapping[str, Any], num_ranks: int) -> list[LoadPart]:
    """Check the windows of a body against a deployment.

    Raises
    ------
    InvalidError
        Naming the window, layer and expert of what is wrong.
    """
    document = _object(_json(body), "the body", known=("rank", "version", "windows"))
    rank = _whole(document.get("rank", 0), "rank", least=0, most=num_ranks - 1)
    version = document.get("version")
    if version is not None:
        version = _whole(version, "version", least=1, most=MOST_VERSION)
    given = document.get("windows")
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_WINDOWS:
        raise InvalidError(f"windows: must be a list of 1 to {MOST_WINDOWS} windows")
    parts = [_part(one, f"windows.{i}", rank, version, facts) for i, one in enumerate(given)]
    if len({part.window for part in parts}) < len(parts):
        raise InvalidError("windows: the same window is there twice; send each once")
    return parts


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise InvalidError(f"the body is not JSON: {exc}") from exc


def _object(value: Any, where: str, *, known: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidError(f"{where}: must be a JSON object")
    unknown = sorted(set(value) - set(known))
    if unknown:
        named = unknown[0].encode("ascii", "replace").decode()[:40]
        raise InvalidError(f"{where}: has an unknown entry {named!r}; known are {', '.join(known)}")
    return value


def _whole(value: Any, where: str, *, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise InvalidError(f"{where}: must be a whole number from {least} to {most}")
    return value


def _part(given: Any, where: str, rank: int, version: int | None, facts: Mapping[str, Any]) -> LoadPart:
    window = _object(given, where, known=("window", "tokens", "load"))
    number = _whole(window.get("window"), f"{where}.window", least=0, most=MOST_NUMBER)
    rows = window.get("load")
    if not isinstance(rows, list) or len(rows) != facts["layers"]:
        its = f"{len(rows)} layers" if isinstance(rows, list) else "no list of layers"
        raise InvalidError(f"{where}.load: has {its}, the deployment {facts['layers']} MoE layers")
    counts = array("q")
    for layer, row in enumerate(rows):
        counts.extend(_row(row, f"{where}.load.{layer}", facts["experts"]))
    pairs = sum(counts)
    if pairs > MOST_PAIRS:
        raise InvalidError(f"{where}.load: holds {pairs} pairs; at most {MOST_PAIRS} are taken")
    tokens = window.get("tokens")
    if tokens is None:
        tokens = pairs / (facts["layers"] * facts["top_k"])
    if type(tokens) not in (int, float) or not 0 <= tokens <= MOST_PAIRS:
        raise InvalidError(f"{where}.tokens: must be a number from 0 to {MOST_PAIRS}")
    packed = zlib.compress(_little_endian(counts), COMPRESSION)
    return LoadPart(window=number, rank=rank, version=version, tokens=float(tokens), load=packed)


def _row(row: Any, where: str, num_experts: int) -> array[int]:
    """Return a layer's counts; whole floats, as tensors print them, are taken for what they mean."""
    if not isinstance(row, list) or len(row) != num_experts:
        its = f"{len(row)} experts" if isinstance(row, list) else "no list of experts"
        raise InvalidError(f"{where}: has {its}, the deployment {num_experts}")
    if not set(map(type, row)) <= _INTEGERS:
        row = [_count(value, f"{where}.{expert}") for expert, value in enumerate(row)]
    if min(row) < 0 or max(row) > MOST_PAIRS:
        expert = next(i for i, value in enumerate(row) if not 0 <= value <= MOST_PAIRS)
        raise InvalidError(f"{where}.{expert}: is {row[expert]}; counts are from 0 to {MOST_PAIRS}")
    return array("q", row)


_INTEGERS = {int}


def _count(value: Any, where: str) -> int:
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    kind = {bool: "a truth value", str: "a text", float: "a fraction", type(None): "null"}.get(
        type(value), "no number"
    )
    raise InvalidError(f"{where}: is {kind}; counts are whole numbers of token-expert pairs")


def _little_endian(counts: array[int]) -> bytes:
    if sys.byteorder == "big":
        counts.byteswap()
    return counts.tobytes()
