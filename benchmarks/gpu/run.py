"""Runs the parts one after the other, each in processes of its own with a time limit, and gathers what comes.

A part that fails, hangs or finds too few GPUs is recorded as such and the next one starts. The output folder
holds ``results.json``, ``log.txt``, and for each transport ``layers_*.csv`` and ``calibration_*.json``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import machine
from benchmarks.gpu.parts import Part

__all__ = ["RESULTS_FILE", "Run", "run"]

RESULTS_FILE = "results.json"
LOG_FILE = "log.txt"
TAIL_CHARACTERS = 3000
GRACE_S = 40.0
"""The launcher gives its ranks 30 s to end."""
LEAST_S = 20.0
"""A part is not begun with less time than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where and how to run.

    Parameters
    ----------
    folder
        What `prepare` wrote.
    out
        Where results go.
    tiny
        On the CPU, in miniature.
    total_s
        Seconds for all parts.
    commit
        What to call this version of the code.
    repeats
        Timed passes.
    """

    folder: Path
    out: Path
    tiny: bool = False
    total_s: float = 560.0
    commit: str | None = None
    repeats: int = 20


def run(parts: Sequence[Part], how: Run) -> dict[str, Any]:
    """Run parts and write the results after each of them.

    Returns
    -------
    dict
        Contents of ``results.json``: ``machine``, and by part its ``status``, ``seconds`` and ``result``.
    """
    how.out.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + how.total_s
    results: dict[str, Any] = {"machine": machine(how.commit), "parts": {}}
    for part in parts:
        results["parts"][part.name] = _run_part(part, how, ends_s - time.monotonic())
        _write(how.out / RESULTS_FILE, results)
        told = results["parts"][part.name]
        print(f"{part.name}: {told['status']} in {told['seconds']:.0f} s", flush=True)
        if told["status"] not in ("ok", "skipped"):
            print(told["tail"][-1200:], flush=True)
    return results


def _run_part(part: Part, how: Run, left_s: float) -> dict[str, Any]:
    gpus = torch.cuda.device_count()
    needed = max(1, part.ranks)
    if not how.tiny and gpus < needed:
        return _skipped(f"needs {needed} GPUs, there are {gpus}")
    if left_s < LEAST_S:
        return _skipped("no time left")
    if part.writes_layers:
        _layers_file(part, how).unlink(missing_ok=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        commands = _commands(part, how, Path(scratch), gpus)
        limit_s = min(part.timeout_s, left_s)
        codes, tail = _call(commands, part, how, limit_s)
        found = [_read(file) for file, _ in commands]
    status = "ok" if all(code == 0 for code in codes) else "failed"
    status = "timeout" if any(code is None for code in codes) else status
    return {
        "status": status,
        "seconds": time.monotonic() - began_s,
        "result": _merged([one for one in found if one]),
        "tail": "" if status == "ok" else tail,
    }


def _layers_file(part: Part, how: Run) -> Path:
    return how.out / f"layers_{part.transport}.csv"


def _skipped(why: str) -> dict[str, Any]:
    return {"status": "skipped", "seconds": 0.0, "result": {}, "tail": why}


def _merged(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the results of processes: lists one after the other, mappings key by key."""
    merged: dict[str, Any] = {}
    for one in found:
        for key, value in one.items():
            if isinstance(value, list):
                merged[key] = merged.get(key, []) + value
            elif isinstance(value, dict):
                merged[key] = {**merged.get(key, {}), **value}
            else:
                merged[key] = value
    return merged


def _commands(part: Part, how: Run, scratch: Path, gpus: int) -> list[tuple[Path, list[str]]]:
    """Processes to start, each with the file that it writes its result to."""
    if part.ranks:
        file = scratch / "result.json"
        return [(file, _command(part, how, file, part.instances, device=None))]
    shares = max(1, gpus)
    commands = []
    for number in range(shares):
        file = scratch / f"result{number}.json"
        mine = part.instances[number::shares]
        device = f"cuda:{number}" if gpus else "cpu"
        if mine:
            commands.append((file, _command(part, how, file, mine, device=device)))
    return commands


def _command(part: Part, how: Run, file: Path, instances: Sequence[str], *, device: str | None) -> list[str]:
    python = [sys.executable]
    if part.ranks > 1:
        # By number: the host's own name need not resolve where no network is.
        python += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        python += ["--nproc-per-node", str(part.ranks)]
    if "." in part.worker:
        budget = ["--budget", str(part.budget_s)] if part.budget_s else []
        tiny = ["--tiny"] if how.tiny else []
        return [*python, "-m", part.worker, "--out", str(file), *budget, *tiny]
    command = [*python, "-m", "benchmarks.gpu.worker", part.worker, "--out", str(file)]
    command += ["--folder", str(how.folder), "--budget", str(part.budget_s), "--repeats", str(how.repeats)]
    command += ["--instances", *instances] if instances else []
    command += ["--device", device] if device else []
    if part.transport:
        command += ["--transport", part.transport]
        command += ["--layers", str(_layers_file(part, how))] if part.writes_layers else []
        command += ["--calibration", str(how.out / f"calibration_{part.transport}.json")]
    return [*command, *part.options, *(["--tiny"] if how.tiny else [])]


def _call(
    commands: Sequence[tuple[Path, list[str]]], part: Part, how: Run, limit_s: float
) -> tuple[list[int | None], str]:
    """Run processes side by side; return their exit codes, None past the limit, and the end of the log."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **part.environment}
    log = how.out / LOG_FILE
    begins = log.stat().st_size if log.exists() else 0
    ends_s = time.monotonic() + limit_s
    with log.open("ab") as out:
        out.write(f"\n=== {part.name}\n".encode())
        out.flush()
        # A session of its own, so that all of a part's processes can be ended at once.
        started = [
            subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            for _, command in commands
        ]
        codes = [_wait(process, ends_s) for process in started]
    with log.open("rb") as written:
        written.seek(begins)
        text = written.read().decode(errors="replace")
    return codes, _telling(text)[-TAIL_CHARACTERS:]


def _telling(text: str) -> str:
    """Return what the processes wrote, without the launcher's account of their end."""
    lines = text.splitlines()
    ends = [
        number for number, line in enumerate(lines) if "torch/distributed/elastic/multiprocessing" in line
    ]
    return "\n".join(lines[: ends[0]] if ends else lines)


def _wait(process: subprocess.Popen[bytes], ends_s: float) -> int | None:
    try:
        return process.wait(max(0.1, ends_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        _end(process)
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; the launcher ends its ranks, which lead their own sessions."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(file: Path) -> dict[str, Any]:
    """Return a result, or nothing where a process left none."""
    if not file.exists():
        return {}
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def _write(file: Path, results: dict[str, Any]) -> None:
    part = file.with_suffix(".partial")
    part.write_text(json.dumps(results), encoding="utf-8")
    os.replace(part, file)
