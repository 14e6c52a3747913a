"""One job in a process of its own: ``python -m service.jobs.child ORDER``, started by `service.jobs.runner`.

It can be killed at any moment: what it had told by then stands.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from placement.errors import InfeasibleError, InputError, NoPlacementFoundError, PlacementError
from placement.tasks.problem import collecting_notes
from service.jobs.bounds import bind_to_parent, end_group, limit_process
from service.jobs.channel import Channel
from service.jobs.order import Order
from service.jobs.problem import for_callers
from service.jobs.work import Stopping, Work

__all__ = ["main"]

CODES: tuple[tuple[type[PlacementError], str], ...] = (
    (InputError, "invalid"),
    (InfeasibleError, "infeasible"),
    (NoPlacementFoundError, "no-placement"),
)


def main() -> None:
    """Do what the order's file says, and tell of it on standard output."""
    order = Order.read(Path(sys.argv[1]))
    bind_to_parent(order.parent)
    limit_process(memory_bytes=order.memory_bytes, niceness=order.niceness)
    channel, stopping = Channel(), Stopping()
    channel.listen(stopping.stop, end_group)
    with collecting_notes() as notes:
        work = Work(order=order, channel=channel, stopping=stopping, end=_end, notes=notes)
        _tell_failure(work)
    _end()


def _tell_failure(work: Work) -> None:
    """Run a job; what its caller can mend is told with a code, anything else is a crash."""
    try:
        work.run()
    except PlacementError as exc:
        code = next((code for kind, code in CODES if isinstance(exc, kind)), "internal")
        work.channel.send("error", {"code": code, "message": for_callers(str(exc), work.names)})
    except MemoryError:
        size = work.order.memory_bytes / 2**20
        message = f"the job needs more than the {size:,.0f} MiB of memory that one may use here"
        work.channel.send("error", {"code": "out-of-memory", "message": message})
    except OSError as exc:
        message = f"the job's scratch folder cannot be used: {exc.strerror or exc}"
        work.channel.send("error", {"code": "internal", "message": message})


def _end() -> None:
    """End now: nothing is left to be written, and a solver's threads need not be waited for."""
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
