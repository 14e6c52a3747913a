"""Computes for a controller: one question a line on standard input, one answer a line on standard output.

``python -m service.deployments.child``; it ends with its input, so also when the controller is killed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import orjson

from placement.errors import PlacementError
from service.artifacts import ArtifactFiles
from service.deployments.analysis import Analysis
from service.settings import read_settings
from service.state.database import open_database

__all__ = ["main", "serve"]


def serve(analysis: Analysis, questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer questions until there are no more."""
    tasks: dict[str, Callable[..., dict[str, Any]]] = {
        "evaluate": analysis.evaluate,
        "prepare": analysis.prepare,
        "judge": analysis.judge,
    }
    for line in questions:
        question = orjson.loads(line)
        try:
            answer: dict[str, Any] = {"answer": tasks[question.pop("task")](**question)}
        except (PlacementError, MemoryError) as exc:
            answer = {"error": " ".join(str(exc).split()) or type(exc).__name__}
        answers.write(orjson.dumps(answer) + b"\n")
        answers.flush()


def main() -> None:
    """Serve the controller that started this process."""
    # Ctrl-C goes to every process of a terminal; this one ends when its controller has ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = read_settings()
    database = open_database(settings.database, upgrade=False)
    try:
        files = ArtifactFiles(settings.data_dir, url=settings.artifact_url)
        serve(Analysis(database, files), sys.stdin.buffer, sys.stdout.buffer)
    finally:
        database.close()


if __name__ == "__main__":
    main()
