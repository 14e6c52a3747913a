"""Bodies of JSON requests: bounded, strict, checked, and one clear line for what is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import UnionType
from typing import TypeVar, Union, get_args, get_origin

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError

from placement._suggest import did_you_mean
from service.errors import InvalidError, TooLargeError, UnsupportedMediaError

__all__ = ["check_json", "hash_of", "parse_body", "read_body", "refusal_of"]

Model = TypeVar("Model", bound=BaseModel)

MOST_DEPTH = 64
"""Objects and lists within each other; the deepest document of ours has 6."""

MOST_TOLD = 20
"""Errors that the answer lists."""

JSON_TYPES = ("application/json", "application/x-json", "text/json")


async def read_body(request: Request, model: type[Model], *, most_bytes: int) -> Model:
    """Read and check the body of a request.

    Raises
    ------
    InvalidError
        If it is not JSON, or not what `model` describes.
    TooLargeError
        If it has more than `most_bytes` bytes.
    UnsupportedMediaError
        If its content type is another, or it is compressed.
    """
    _check_type(request)
    return parse_body(await _bytes_of(request, most_bytes), model)


def parse_body(body: bytes, model: type[Model]) -> Model:
    """Check the bytes of a body.

    Raises
    ------
    InvalidError
        If they are not JSON, or not what `model` describes.
    """
    if not body:
        raise InvalidError("body: is empty; it must be a JSON object")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise InvalidError(f"body: is not JSON: {exc}") from exc
    # Both are rare, so that a look at the bytes saves the walk.
    if b"\\u0000" in body or body.count(b"{") + body.count(b"[") > MOST_DEPTH:
        check_json(document)
    try:
        return model.model_validate(document)
    except ValidationError as exc:
        raise refusal_of(exc, model) from exc


def check_json(document: object) -> None:
    """Refuse what databases cannot keep: NUL characters in texts, and nesting without end.

    Raises
    ------
    InvalidError
        If there is any.
    """
    level = [document]
    for _ in range(MOST_DEPTH + 1):
        for value in level:
            if isinstance(value, dict) and any("\x00" in key for key in value):
                raise InvalidError("body: has a NUL character (\\u0000) in a key")
            if isinstance(value, str) and "\x00" in value:
                raise InvalidError("body: has a NUL character (\\u0000) in a text")
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise InvalidError(f"body: is nested more than {MOST_DEPTH} deep")


def hash_of(request: BaseModel) -> str:
    """Return the SHA-256 of a request: of what it means, not of how it was written."""
    text = orjson.dumps(request.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(text).hexdigest()


def refusal_of(error: ValidationError, model: type[BaseModel]) -> InvalidError:
    """Return what pydantic found as a problem: its first line in the detail, all of them in ``errors``."""
    found = list(dict.fromkeys(_lines(error, model)))
    where, what = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    errors = [{"where": where, "what": what} for where, what in found[:MOST_TOLD]]
    return InvalidError(f"{where}: {what}{more}", errors=errors)


def _check_type(request: Request) -> None:
    given = request.headers.get("content-type", JSON_TYPES[0])
    kind = given.partition(";")[0].strip().lower()
    if kind not in JSON_TYPES and not kind.endswith("+json"):
        raise UnsupportedMediaError(f"body: is {kind[:100] or 'of no type'}; send application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaError("body: is compressed, which only traces may be; send it as it is")


async def _bytes_of(request: Request, most_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most_bytes:
        raise TooLargeError(f"body: has {declared} bytes; at most {most_bytes:,} are taken here")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most_bytes:
            raise TooLargeError(f"body: has more than the {most_bytes:,} bytes that are taken here")
        chunks.append(chunk)
    return b"".join(chunks)


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _lines(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield where something is wrong, and what."""
    for one in error.errors(include_url=False, include_input=False, include_context=False):
        path, names = _path(one["loc"], model)
        if one["type"] == "extra_forbidden":
            unknown = str(one["loc"][-1])[:100]
            yield ".".join([*path, unknown]), f"is unknown; {did_you_mean(unknown, names)}"
        else:
            yield ".".join(path) or "body", f"{one['msg'][:1].lower()}{one['msg'][1:]}"


def _path(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[list[str], list[str]]:
    """Return the fields on the way to an error, without names of alternatives, and those beside it."""
    path: list[str] = []
    here: type[BaseModel] | None = model
    for step in loc:
        if here is None or str(step) not in here.model_fields:
            continue
        path.append(str(step))
        inner = _model_in(here.model_fields[str(step)].annotation)
        if inner is None:
            break
        here = inner
    return path, sorted(here.model_fields) if here is not None else []


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Return the model that a field holds, or that one of its alternatives is."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType):
        found = (_model_in(one) for one in get_args(annotation))
        return next((one for one in found if one is not None), None)
    return None
