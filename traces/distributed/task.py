"""One piece of work that may run anywhere, and what came of it.

This module loads nothing heavy: it is what a fresh worker imports before it settles its threads.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from placement.errors import (
    BackendError,
    InfeasibleError,
    InputError,
    NoPlacementFoundError,
    PlacementError,
    ServiceError,
)

__all__ = ["Failure", "Key", "Loadable", "Outcome", "Task", "perform", "value_of"]

Key = tuple[int | str, ...]

_ERRORS: dict[int, type[PlacementError]] = {
    error.exit_code: error for error in (InputError, InfeasibleError, NoPlacementFoundError, ServiceError)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call of a function.

    Parameters
    ----------
    key
        What the caller knows it by; distinct among the tasks of an executor.
    name
        What messages call it.
    function, arguments
        The call. Both travel by pickle, so the function is one of a module. An argument that is a kept
        result is for `value_of` to load where the task runs.
    keep
        Leave the result where it was made and hand out a reference, for a later task or `Executor.fetch`.
    """

    key: Key
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    keep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a task has no result, in a form that travels between processes.

    Parameters
    ----------
    kind
        Name of the exception's type; ``WorkerLost`` where the task took its worker down.
    message
        One line.
    exit_code
        Exit code of our own errors; None for a failure that nobody foresaw.
    fragment
        The piece of a data set that is damaged, where the error names one.
    details
        Traceback, empty where there is none.
    """

    kind: str
    message: str
    exit_code: int | None = None
    fragment: str | None = None
    details: str = ""

    @classmethod
    def of(cls, exc: Exception) -> Failure:
        """Return the failure that an exception stands for."""
        ours = isinstance(exc, PlacementError)
        fragment = getattr(exc, "fragment", None)
        return cls(
            kind=type(exc).__name__,
            message=" ".join(str(exc).split()) or type(exc).__name__,
            exit_code=exc.exit_code if isinstance(exc, PlacementError) else None,
            fragment=None if fragment is None else str(fragment),
            details="" if ours else "".join(traceback.format_exception(exc)),
        )

    @property
    def is_input(self) -> bool:
        """Whether what was read is to blame."""
        return self.exit_code == InputError.exit_code

    @property
    def was_lost(self) -> bool:
        """Whether the worker ended before the task did."""
        return self.kind == "WorkerLost"

    def error(self, where: str) -> PlacementError:
        """Return the error to raise for it, with the traceback of an unforeseen one as a note."""
        if self.exit_code is not None:
            return _ERRORS.get(self.exit_code, BackendError)(f"{where}: {self.message}")
        told = self.message if self.was_lost else f"{self.kind}: {self.message}"
        error = BackendError(f"{where}: {told}")
        if self.details:
            error.add_note(self.details)
        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a task ended.

    Parameters
    ----------
    key
        Key of the task.
    value
        Its result, or a reference to it where the task keeps it; None where it failed.
    failure
        Why it failed; None where it did not.
    attempts
        Times that it was begun, as far as the executor knows: above 1 where workers were lost.
    elapsed_s
        Seconds of the last attempt.
    """

    key: Key
    value: Any = None
    failure: Failure | None = None
    attempts: int = 1
    elapsed_s: float = 0.0


def perform(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Failure | None, float]:
    """Call a function; return its value, or why it failed, and the seconds it took."""
    began_s = time.perf_counter()
    value, failure = None, None
    try:
        value = function(*arguments)
    except Exception as exc:  # noqa: BLE001 (the seam between processes: whatever it is, it is reported)
        failure = Failure.of(exc)
    return value, failure, time.perf_counter() - began_s


@runtime_checkable
class Loadable(Protocol):
    """Refers to a value that lies elsewhere."""

    def load_kept(self) -> Any:
        """Return the value."""
        ...


def value_of(part: Any) -> Any:
    """Return the value of an argument that may be a kept result, loaded when it is needed and not before."""
    return part.load_kept() if isinstance(part, Loadable) else part
