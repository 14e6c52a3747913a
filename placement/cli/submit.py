"""``moe-placement submit``: have the service solve."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.inputs import (
    CalibrationOption,
    FillMemoryOption,
    FromOption,
    JsonOption,
    MaxImbalanceOption,
    ModelOption,
    ObjectiveOption,
    ReplicaSplitOption,
    RiskOption,
    SampleOption,
    SeedOption,
    SemanticsOption,
    SpareSlotsOption,
    ThreadsOption,
    TimeLimitOption,
    TopologyOption,
    WindowOption,
    warn,
)
from placement.cli.remote import (
    AllowHttpOption,
    TokenFileOption,
    UrlOption,
    calibration_document,
    connect,
    model_document,
    topology_document,
)
from placement.errors import InputError, ServiceError

if TYPE_CHECKING:
    from placement.cli.progress import Progress
    from placement.stopping import Cancellation
    from service.client import Client, Event, Solve

__all__ = ["submit"]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SOLVE = re.compile(r"s-[0-9a-z]{26}")
LOOK_S = 0.05


def submit(
    trace: Annotated[
        str,
        typer.Argument(
            help="File of any trace format, folder of a data set, or the id of one that the service holds.",
            show_default=False,
        ),
    ],
    topology: TopologyOption,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="With --wait: placement file to write (placement.json).", show_default=False
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the end, show progress, write the placement.")
    ] = False,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    allow_http: AllowHttpOption = False,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            "--idempotency-key",
            help="The same key is given the same solve. Default: from the run that this is part of "
            "(torchrun, SLURM, Kubeflow, SkyPilot), else a new one.",
            show_default=False,
        ),
    ] = None,
    priority: Annotated[int, typer.Option("--priority", help="-100 to 100; higher ones go first.")] = 0,
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="Only check trace, topology, model and options.")
    ] = False,
    model: ModelOption = None,
    semantics: SemanticsOption = "dispatch",
    objective: ObjectiveOption = "step-time",
    window: WindowOption = None,
    spare_slots: SpareSlotsOption = 0,
    max_imbalance: MaxImbalanceOption = 1.05,
    risk: RiskOption = "mean",
    calibration: CalibrationOption = None,
    replica_split: ReplicaSplitOption = "even",
    fill_memory: FillMemoryOption = False,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            help="Placement that the result must not be worse than: a file, or the id of one or of a solve.",
            show_default=False,
        ),
    ] = None,
    max_moves: Annotated[
        int | None,
        typer.Option(
            "--max-moves", help="With --start: most expert copies to move. Default: any.", show_default=False
        ),
    ] = None,
    solver: Annotated[str, typer.Option("--solver", help="As for solve.")] = "auto",
    time_limit: TimeLimitOption = None,
    threads: ThreadsOption = 1,
    seed: SeedOption = 0,
    sample: SampleOption = None,
    source_format: FromOption = None,
    json: JsonOption = False,
) -> None:
    """Send TRACE to the service and have it solved there.

    With --wait, Ctrl-C stops the solve early and keeps the best placement so far.
    """
    if out is not None and not wait:
        raise InputError(f"-o {out} needs --wait; or fetch the placement once the solve has ended")
    if wait and validate_only:
        raise InputError("--validate-only has nothing to wait for; leave --wait out")
    if max_moves is not None and start is None:
        raise InputError(f"--max-moves {max_moves} needs --start PLACEMENT to count moves from")
    options = {
        "semantics": semantics,
        "objective": objective,
        "window": window,
        "risk": risk,
        "max_imbalance": max_imbalance,
        "replica_split": replica_split,
        "calibration": calibration_document(calibration),
        "sample": sample,
        "source_format": source_format,
        "spare_slots": spare_slots,
        "fill_memory": fill_memory,
        "solver": solver,
        "time_limit": time_limit,
        "threads": threads,
        "seed": seed,
        "max_moves": max_moves,
    }
    cluster, shape = topology_document(topology), model_document(model)
    with connect(url, token_file=token_file, allow_http=allow_http) as client:
        request: dict[str, Any] = {
            "trace_id": _trace_id(client, trace, shape),
            "topology": cluster,
            "model": shape,
            "start": _start_id(client, start, cluster, shape),
            "options": options,
            "priority": priority,
            "validate_only": validate_only,
        }
        solve = client.submit(**request, idempotency_key=idempotency_key or _key_of_run(request))
        if wait:
            _finish(client, solve, out or Path("placement.json"), limit_s=time_limit, json=json)
        else:
            _tell(solve, checked=validate_only, json=json)


def _trace_id(client: Client, trace: str, model: str | dict[str, Any] | None) -> str:
    """Return the id of a trace, sending it first where it is a file."""
    if _DIGEST.fullmatch(trace):
        return trace
    if "://" in trace:
        raise InputError(f"trace {trace} is a URL; the service takes files and folders of this machine")
    from placement.cli.progress import showing_progress

    with showing_progress(f"sending {trace}"):
        return client.upload_trace(trace, model=model if isinstance(model, str) else None).id


def _start_id(
    client: Client,
    start: str | None,
    topology: str | dict[str, Any],
    model: str | dict[str, Any] | None,
) -> str | None:
    """Return the id of the placement to start from, sending it first where it is a file."""
    if start is None or _DIGEST.fullmatch(start) or _SOLVE.fullmatch(start):
        return start
    from placement.cli.placements import load_placement
    from placement.io import dump_json, placement_to_dict
    from placement.model import model_from_fields
    from placement.topology import Topology, parse_shorthand

    cluster = (
        parse_shorthand(topology)
        if isinstance(topology, str)
        else Topology.from_dict(topology, source="--topology")
    )
    shape = model_from_fields(model, source="--model") if isinstance(model, dict) else model
    placement = load_placement(Path(start), model=shape, num_devices=cluster.num_devices)
    return client.upload_placement(dump_json(placement_to_dict(placement)).encode())


def _key_of_run(request: dict[str, Any]) -> str | None:
    from service.client.ranks import run_key

    return run_key(request)


def _finish(client: Client, solve: Solve, out: Path, *, limit_s: float | None, json: bool) -> None:
    """Wait for a solve, and write its placement."""
    from placement.cli.progress import cancel_on_interrupt, showing_progress
    from placement.io import dump_json, write_text
    from placement.stopping import Cancellation

    cancellation = Cancellation()
    with (
        cancel_on_interrupt(cancellation),
        showing_progress(f"{solve.id} is queued", limit_s=limit_s) as progress,
        _stopping(client, solve.id, cancellation),
    ):
        ended = client.wait(solve.id, on_event=_shown(progress))
    if (failure := ended.failure()) is not None:
        raise failure
    if ended.status != "succeeded" and ended.error is not None:
        warn(f"{ended.id} is {ended.status}: {ended.error.get('message')}; its best placement stands")
    for note in (ended.result or {}).get("notes") or ():
        warn(str(note))
    write_text(out, client.placement(ended.id).content.decode())
    if json:
        found = {"id": ended.id, "status": ended.status, "placement": str(out)}
        typer.echo(dump_json({**(ended.result or {}), **found, "placement_id": ended.placement_id}))
    else:
        typer.echo(f"{_line(ended)}\nwritten to {out}")


@contextmanager
def _stopping(client: Client, solve_id: str, cancellation: Cancellation) -> Iterator[None]:
    """Stop the solve when Ctrl-C asks for it; listening goes on, since what it has found is wanted."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_S):
            if cancellation():
                try:
                    client.stop(solve_id)
                except ServiceError as exc:
                    warn(f"{solve_id} could not be stopped: {exc}")
                return

    watcher = threading.Thread(target=watch, name="stop-solve", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _shown(progress: Progress) -> Callable[[Event], None]:
    """Return what shows the events of a solve."""

    def show(event: Event) -> None:
        incumbent = event.incumbent
        if incumbent is not None:
            figures = f"{_figure(incumbent.objective)}, bound {_figure(incumbent.lower_bound)}"
            progress.task(f"{incumbent.solver}: {figures}, gap {_share(incumbent.gap)}")
        elif event.kind == "progress":
            progress.task(str(event.data.get("phase", "running")))

    return show


def _tell(solve: Solve, *, checked: bool, json: bool) -> None:
    from placement.io import dump_json

    if json:
        typer.echo(dump_json(dict(solve.document)))
    elif not checked:
        typer.echo(
            f"{solve.id} is {solve.status}; moe-placement fetch {solve.id} --wait 600 -o placement.json"
        )
    elif solve.is_final:
        facts = ", ".join(
            f"{key} {value}" for key, value in (solve.result or {}).items() if type(value) is int
        )
        typer.echo(f"valid: {facts}")
    else:
        typer.echo(f"{solve.id} is {solve.status}: the check takes longer; moe-placement status {solve.id}")


def _line(solve: Solve) -> str:
    """Return what came of a solve in a line."""
    result = solve.result or {}
    objective = result.get("objective") or {}
    parts = [
        f"{_figure(objective.get('value'))} {objective.get('unit') or ''}".rstrip(),
        f"gap {_share(objective.get('gap'))} (bound {_figure(objective.get('lower_bound'))})",
    ]
    if result.get("solver"):
        parts.append(f"by {result['solver']}")
    if result.get("elapsed_s") is not None:
        parts.append(f"in {result['elapsed_s']:.1f} s")
    return ", ".join([*parts, str(result.get("termination") or solve.status)])


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.6g}"


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.1%}"
