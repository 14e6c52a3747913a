"""What the commands that talk to the service share: where it is, who calls, and local files sent along."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.errors import InputError

if TYPE_CHECKING:
    from service.client import Client

__all__ = [
    "DEADLINE_S",
    "SOON_S",
    "AllowHttpOption",
    "TokenFileOption",
    "UrlOption",
    "calibration_document",
    "connect",
    "model_document",
    "needs_client",
    "topology_document",
]

UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="The service (MOE_PLACEMENT_URL, http://127.0.0.1:8700).", show_default=False),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="File with the bearer token (or MOE_PLACEMENT_TOKEN, MOE_PLACEMENT_TOKEN_FILE).",
        show_default=False,
    ),
]
AllowHttpOption = Annotated[
    bool, typer.Option("--allow-http", help="Send the token unencrypted to another machine, too.")
]


SOON_S = 15.0
"""How long a command that only asks goes on trying."""

DEADLINE_S = 120.0
"""How long one that submits or waits does: it outlives a restart of the service."""


def connect(
    url: str | None, *, token_file: Path | None, allow_http: bool, deadline_s: float = DEADLINE_S
) -> Client:
    """Return a client of the service.

    Parameters
    ----------
    deadline_s
        Seconds for a request with its repetitions.

    Raises
    ------
    InputError
        If the extra is not installed, or URL and token do not do.
    """
    try:
        from service.client import Client

        return Client(url, token_file=token_file, allow_http=allow_http, deadline_s=deadline_s)
    except ImportError as exc:
        raise needs_client(exc) from exc


def needs_client(missing: ImportError) -> InputError:
    """Return the error for an installation without the client."""
    return InputError(
        f"this command needs the client of the service ({missing.name} is missing): "
        "pip install 'moe-placement[client]'"
    )


def topology_document(topology: str) -> str | dict[str, Any]:
    """Return a topology as it is sent: a shorthand as it is, a file as what it holds.

    Raises
    ------
    InputError
        If it is neither.
    """
    from placement.topology import parse_shorthand, parse_topology

    if topology.lower().endswith((".yaml", ".yml")) or os.path.isfile(topology):
        return parse_topology(topology).to_dict()
    parse_shorthand(topology)
    return topology


def model_document(model: str | None) -> str | dict[str, Any] | None:
    """Return a model as it is sent: a preset's name, or the shape that a file gives.

    Raises
    ------
    InputError
        If there is no such model.
    """
    from placement.model import preset_model, resolve_model

    if model is None:
        return None
    shape = resolve_model(model)
    try:
        if preset_model(model) == shape:
            return model
    except InputError:
        # It is a file.
        pass
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(shape).items()}


def calibration_document(calibration: Path | None) -> dict[str, Any] | None:
    """Return what a calibration file holds.

    Raises
    ------
    InputError
        If it is none.
    """
    import json

    from placement.calibration import read_calibration

    if calibration is None:
        return None
    read_calibration(calibration)
    found: dict[str, Any] = json.loads(calibration.read_text(encoding="utf-8"))
    return found
