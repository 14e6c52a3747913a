"""The command's tree, and the one place where errors become exit codes."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from placement.cli.inputs import warn
from placement.errors import PlacementError

__all__ = ["app", "main"]

# typer brings its own copy of click from some version on; its public error names the right base either way.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_CommandError: type[Exception] = _UsageError.__bases__[0]

INTERRUPTED = 130

app = typer.Typer(
    name="moe-placement",
    help="Decide on which GPU every expert of a Mixture-of-Experts model lives, and prove how good that is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
trace_app = typer.Typer(name="trace", help="Record and inspect routing traces.", no_args_is_help=True)
app.add_typer(trace_app)
app.add_typer(import_module("placement.cli.plan").plan_app)
app.add_typer(import_module("placement.cli.token").token_app)


def _register(target: typer.Typer, name: str, module: str, **options: Any) -> None:
    target.command(name, **options)(getattr(import_module(f"placement.cli.{module}"), name))


_register(app, "solve", "solve")
_register(app, "evaluate", "evaluate")
_register(app, "compare", "compare")
_register(app, "advise", "advise")
_register(app, "diff", "diff")
_register(app, "export", "export")
_register(app, "batch", "batch")
_register(app, "verify", "verify")
_register(app, "calibrate", "calibrate")
_register(app, "serve", "serve")
_register(app, "vacuum", "vacuum")
_register(app, "submit", "submit")
_register(app, "status", "status")
_register(app, "fetch", "fetch")
_register(trace_app, "record", "trace_record")
_register(trace_app, "info", "trace_info")
_register(trace_app, "merge", "trace_merge")
_register(trace_app, "window", "trace_window")
_register(trace_app, "statistics", "trace_statistics")
_register(trace_app, "synthesize", "trace_synthesize")
trace_app.command("import")(import_module("placement.cli.trace_import").import_traces)


def _version(wanted: bool) -> None:
    if wanted:
        from placement import __version__

        typer.echo(f"moe-placement {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Place the experts of a Mixture-of-Experts model."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its documented code."""
    _keep_output_to_ourselves()
    sys.exit(run(arguments))


def _keep_output_to_ourselves() -> None:
    """Leave standard output to our results: solvers in C++ print remarks of their own there."""
    if sys.stdout is not sys.__stdout__ or sys.stdout is None:
        return
    sys.stdout.flush()
    ours = os.dup(sys.stdout.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def run(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code.

    0 done, 2 usage or bad input, 3 infeasible, 4 stopped before any placement, 5 service or network,
    130 interrupted where nothing could be kept. Errors take one line on stderr.
    """
    _show_notes()
    try:
        result = app(args=arguments, prog_name="moe-placement", standalone_mode=False)
    except PlacementError as exc:
        return _fail(str(exc), exc.exit_code)
    except _CommandError as exc:
        message: str = exc.format_message()  # type: ignore[attr-defined]
        if not message:
            # No arguments: the help has been printed.
            return 2
        return _fail(f"{message}{_hint(exc)}", 2)
    except typer.Exit as exc:
        return exc.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output is gone; there is nobody to tell.
        sys.stderr.close()
        return 1
    return result if isinstance(result, int) else 0


class _Notes(logging.Handler):
    """Tells what the packages note about their input as our other remarks are told, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def _show_notes() -> None:
    for name in ("placement", "traces"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Notes) for handler in logger.handlers):
            logger.addHandler(_Notes(logging.WARNING))


def _hint(exc: Exception) -> str:
    context = getattr(exc, "ctx", None)
    return f"; see {context.command_path} --help" if context is not None else ""


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"moe-placement: error: {' '.join(message.split())}\n")
    return code
