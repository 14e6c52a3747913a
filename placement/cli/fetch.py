"""``moe-placement fetch``: get a placement from the service, or the next best thing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placement.cli.inputs import JsonOption
from placement.cli.remote import SOON_S, AllowHttpOption, TokenFileOption, UrlOption, connect, needs_client
from placement.errors import InputError, ServiceError

if TYPE_CHECKING:
    from placement.model import ModelShape
    from service.client import Client, PlacementFile

__all__ = ["fetch"]


def fetch(
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.", show_default=False)],
    solve_id: Annotated[
        str | None,
        typer.Argument(metavar="[ID]", help="Id of a solve or a placement.", show_default=False),
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option(
            "--deployment", help="Instead of ID: what this deployment should run.", show_default=False
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--format",
            help="native, sglang, tensorrt-llm, vllm, vllm-ranks, vllm-ascend, megatron or deepspeed.",
        ),
    ] = "native",
    wait: Annotated[
        float, typer.Option("--wait", help="Seconds to wait for the solve's end, or for a first placement.")
    ] = 0.0,
    timeout: Annotated[
        float,
        typer.Option("--timeout", help="With --deployment: seconds until the service counts as down."),
    ] = 30.0,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="With --deployment: folder that keeps the last good placement, in case the service is down.",
            show_default=False,
        ),
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(
            "-t",
            "--topology",
            help="With --deployment and --model: the cluster, to put experts in order as a last resort.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="The model's sizes: for -t, and for formats that count all layers.",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --deployment: fail rather than fall back.")
    ] = False,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    allow_http: AllowHttpOption = False,
    json: JsonOption = False,
) -> None:
    """Write the placement of a solve, or of a deployment.

    For a deployment, a service that is down is no failure: the last good placement of --cache is written, or
    experts in order (-t, --model), which is said on stderr; --strict fails instead.
    """
    from placement.formats.files import check_name
    from placement.model import resolve_model

    if (solve_id is None) == (deployment is None):
        raise InputError("name either the ID of a solve or placement, or --deployment NAME")
    if not wait >= 0:
        raise InputError(f"--wait is {wait}; it must be 0 or more")
    check_name(out, to)
    shape = None if model is None else resolve_model(model)
    if solve_id is not None:
        _refuse(cache=cache, topology=topology, strict=strict or None)
        with connect(url, token_file=token_file, allow_http=allow_http, deadline_s=SOON_S) as client:
            file = _of_solve(client, solve_id, wait_s=wait)
        _write(file, out, to, shape)
        _tell(out, to, "service", None, json=json)
        return
    if topology is not None and shape is None:
        raise InputError("-t needs --model: both are needed to put experts in order")
    try:
        from service.client.fallback import Fallback
        from service.client.launcher import fetch_placement
    except ImportError as exc:
        raise needs_client(exc) from exc
    found = fetch_placement(
        deployment or "",
        url=url,
        token_file=token_file,
        allow_http=allow_http,
        cache_dir=cache,
        fallback=None if topology is None or shape is None else Fallback.of(topology, shape),
        strict=strict,
        wait_s=wait,
        timeout_s=timeout,
    )
    _write(found.file, out, to, shape)
    _tell(out, to, found.source, found.version, json=json)


def _refuse(**given: object) -> None:
    """Refuse options that mean nothing without a deployment."""
    for name, value in given.items():
        if value is not None:
            raise InputError(f"--{name} goes with --deployment: a solve's placement is either there or not")


def _of_solve(client: Client, solve_id: str, *, wait_s: float) -> PlacementFile:
    """Return the placement of a solve, once it has ended."""
    if wait_s and not solve_id.startswith("sha256:"):
        solve = client.wait(solve_id, timeout_s=wait_s)
        if (failure := solve.failure()) is not None:
            raise failure
        if not solve.is_final:
            raise ServiceError(f"{solve_id} is still {solve.status} after {wait_s:g} s; nothing was written")
    return client.placement(solve_id)


def _write(file: PlacementFile, out: Path, to: str, model: ModelShape | None) -> None:
    """Write what was found; our own form byte for byte."""
    from placement.cli.placements import export_options
    from placement.formats.files import write_as
    from placement.io import write_text

    placement = file.placement()
    if to == "native":
        write_text(out, file.content.decode())
    else:
        write_as(placement, out, to, export_options(placement, model))


def _tell(out: Path, to: str, source: str, version: int | None, *, json: bool) -> None:
    from placement.io import dump_json

    if json:
        typer.echo(dump_json({"placement": str(out), "format": to, "source": source, "version": version}))
    else:
        named = "" if version is None else f", version {version}"
        typer.echo(f"written to {out} (from: {source}{named})")
