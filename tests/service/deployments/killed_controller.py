"""A controller that kills itself at a point: ``python -m tests.service.deployments.killed_controller POINT``.

A point is a method of the stores, and whether it dies before or after its work: ``save:after``.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from service.deployments.controller import Controller
from service.settings import read_settings
from service.state.database import open_database
from service.state.deployments import DeploymentStore
from service.state.jobs import JobStore


def arm(owner: type, method: str, when: str) -> None:
    """Have a method kill the process."""
    work = getattr(owner, method)

    def deadly(*args: Any, **options: Any) -> Any:
        if when == "after":
            work(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, method, deadly)


def main() -> None:
    """Run until the point is reached."""
    method, when = sys.argv[1].split(":")
    arm(JobStore if method == "submit" else DeploymentStore, method, when)
    settings = read_settings()
    Controller(open_database(settings.database), settings, look_s=0.02, pause_s=0.0).run()


if __name__ == "__main__":
    main()
