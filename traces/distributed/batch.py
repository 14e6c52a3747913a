"""Runs a batch: every cell solved somewhere, its placement written whole, the rows gathered in a table.

What a cell is solved by comes from outside (`CellWork`): this module knows tasks, files and rows, and neither
costs nor solvers. In the output folder::

    manifest.json                       what is done, with checksums; a run that was ended goes on from it
    results.jsonl                       one row for each cell, in the order of the batch file
    cells/TRACE/TOPOLOGY/.../placement.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from placement.errors import InfeasibleError, InputError, NoPlacementFoundError
from placement.io import dump_json, write_json, write_text
from traces.distributed.executor import Executor
from traces.distributed.spec import BatchSpec, Cell
from traces.distributed.task import Failure, Outcome, Task
from traces.distributed.work import MANIFEST, WorkFolder
from traces.files import reading, writing

__all__ = ["RESULTS", "BatchReport", "CellAnswer", "CellWork", "run_batch"]

RESULTS = "results.jsonl"

_SMALL_BYTES = 4 * 2**20
_ANSWERS = {InfeasibleError.exit_code: "infeasible", NoPlacementFoundError.exit_code: "no-placement"}
"""Failures that answer a question of the grid: no other try would end otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellAnswer:
    """What solving a cell gives, as plain data.

    Parameters
    ----------
    row
        Its row of the table.
    placement
        Its placement file.
    """

    row: dict[str, Any]
    placement: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellWork:
    """How cells are solved: functions of a module, so that any worker can call them.

    Parameters
    ----------
    solve
        Solves a cell in one go.
    count_layers, solve_layer, join
        For cells with `split_layers`: how many layers there are, the answer for one as plain data, and the
        answer of the cell from those of its layers in order.
    """

    solve: Callable[[Cell], CellAnswer]
    count_layers: Callable[[Cell], int]
    solve_layer: Callable[[Cell, int], dict[str, Any]]
    join: Callable[[Cell, Sequence[dict[str, Any]]], CellAnswer]


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """How a batch ended.

    Parameters
    ----------
    rows
        One for each cell that has an answer, in the batch's order; ``status`` is ``done``, ``infeasible`` or
        ``no-placement``.
    set_aside
        Rows of the cells that failed; ``status`` is ``failed``.
    num_resumed, num_changed
        Cells whose answers an earlier run left, and those whose inputs have changed since.
    """

    rows: tuple[dict[str, Any], ...]
    set_aside: tuple[dict[str, Any], ...]
    num_resumed: int
    num_changed: int

    @property
    def done(self) -> tuple[dict[str, Any], ...]:
        """Rows of the cells that have a placement."""
        return tuple(row for row in self.rows if row["status"] == "done")


def _ignore(done: int, total: int, text: str) -> None:
    """Take no notice."""


def run_batch(
    spec: BatchSpec,
    out: Path,
    *,
    work: CellWork,
    executor: Executor,
    on_error: str = "fail",
    resume: bool = False,
    progress: Callable[[int, int, str], None] = _ignore,
) -> BatchReport:
    """Solve the cells of a batch.

    Cells that no placement can satisfy, and those that their time limit ended before there was one, are
    answers and rows. Whatever else goes wrong in a cell ends the batch, or sets the cell aside, as `on_error`
    says; what is done stays in either case, as it does when the process is interrupted or killed.

    Parameters
    ----------
    spec
        The batch.
    out
        Output folder.
    work
        How cells are solved.
    executor
        Where.
    on_error
        ``fail`` or ``skip``.
    resume
        Go on with what an earlier run left in `out`. Cells are solved again where their options or input
        files have changed; what failed is tried again.
    progress
        Called with cells done, cells in all and what ended last.

    Raises
    ------
    InputError
        If `out` holds results already and `resume` does not say to go on with them, or cannot be written; or
        whatever a cell raised.
    PlacementError
        What the first cell that failed raised, naming it.
    """
    if on_error not in ("fail", "skip"):
        raise InputError(f"--on-error is {on_error!r}; it must be fail or skip")
    if not resume and (out / MANIFEST).exists():
        raise InputError(
            f"{out}: holds the results of an earlier run; go on with --resume or choose another folder"
        )
    with WorkFolder(out, kind="batch", identity={}) as folder:
        batch = _Batch(
            spec=spec, folder=folder, work=work, executor=executor, on_error=on_error, progress=progress
        )
        try:
            batch.begin()
            for outcome in executor.outcomes():
                batch.take(outcome)
        finally:
            # However it ends, what is done is in the table.
            executor.cancel()
            batch.write_results()
    return batch.report()


@dataclass(kw_only=True, eq=False)
class _Batch:
    spec: BatchSpec
    folder: WorkFolder
    work: CellWork
    executor: Executor
    on_error: str
    progress: Callable[[int, int, str], None]
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    layers: dict[int, list[dict[str, Any] | None]] = field(default_factory=dict)
    num_resumed: int = 0
    num_changed: int = 0

    def begin(self) -> None:
        """Take over what is done and submit the rest."""
        prints: dict[str, str] = {}
        self.digests = [_digest(cell, prints) for cell in self.spec.cells]
        for index, cell in enumerate(self.spec.cells):
            entry = self.folder.entry(cell.name)
            if entry is not None and entry["digest"] == self.digests[index]:
                self.rows[index] = dict(entry["row"])
                self.num_resumed += 1
                continue
            self.num_changed += entry is not None
            if cell.split_layers:
                self._submit("count", index, self.work.count_layers, cell)
            else:
                self._submit("solve", index, self.work.solve, cell)
        self._tell("")

    def _submit(
        self, what: str, index: int, function: Callable[..., Any], *arguments: Any, layer: int = 0
    ) -> None:
        name = self.spec.cells[index].name + (f" layer {layer}" if what == "layer" else "")
        self.executor.submit(
            Task(key=(what, index, layer), name=name, function=function, arguments=arguments)
        )

    def take(self, outcome: Outcome) -> None:
        """Do what follows from a task that ended."""
        what, index, layer = str(outcome.key[0]), int(outcome.key[1]), int(outcome.key[2])
        if index in self.failed or index in self.rows:
            return  # Another layer of a cell that has its answer.
        if outcome.failure is not None:
            self._fail(index, outcome.failure, f" layer {layer}" if what == "layer" else "")
        elif what == "count":
            self._begin_layers(index, int(outcome.value))
        elif what == "layer":
            self._take_layer(index, layer, outcome.value)
        else:
            self._finish(index, outcome.value)

    def _begin_layers(self, index: int, num_layers: int) -> None:
        """Submit the layers that no earlier run has left."""
        cell = self.spec.cells[index]
        self.layers[index] = [self._saved_layer(index, layer) for layer in range(num_layers)]
        for layer, answer in enumerate(self.layers[index]):
            if answer is None:
                self._submit("layer", index, self.work.solve_layer, cell, layer, layer=layer)
        self._join_if_complete(index)

    def _layer_file(self, index: int, layer: int) -> Path:
        return self._folder_of(index) / f"layer-{layer:05d}.json"

    def _layer_key(self, index: int, layer: int) -> str:
        return f"{self.spec.cells[index].name}#{layer}"

    def _saved_layer(self, index: int, layer: int) -> dict[str, Any] | None:
        entry = self.folder.entry(self._layer_key(index, layer))
        if entry is None or entry["digest"] != self.digests[index]:
            return None
        path = self._layer_file(index, layer)
        with reading(path, ValueError):
            answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return answer

    def _take_layer(self, index: int, layer: int, answer: dict[str, Any]) -> None:
        path = self._layer_file(index, layer)
        _make_folder(path.parent)
        write_json(path, answer)
        self.folder.record(self._layer_key(index, layer), file=path, digest=self.digests[index])
        self.layers[index][layer] = answer
        done = sum(answer is not None for answer in self.layers[index])
        self._tell(f"{self.spec.cells[index].name}: layer {done} of {len(self.layers[index])}")
        self._join_if_complete(index)

    def _join_if_complete(self, index: int) -> None:
        if all(answer is not None for answer in self.layers[index]):
            self._submit("join", index, self.work.join, self.spec.cells[index], self.layers[index])

    def _finish(self, index: int, answer: CellAnswer) -> None:
        """Write a cell's placement and note its row."""
        cell = self.spec.cells[index]
        path = self._folder_of(index) / "placement.json"
        _make_folder(path.parent)
        write_json(path, answer.placement)
        placed = {"placement": path.relative_to(self.folder.folder).as_posix()}
        self._note(index, "done", placed | answer.row, file=path)
        for layer in range(len(self.layers.pop(index, ()))):
            self.folder.forget(self._layer_key(index, layer))
        self._tell(cell.name)

    def _note(self, index: int, status: str, facts: dict[str, Any], file: Path | None = None) -> None:
        cell = self.spec.cells[index]
        # As JSON gives it back, so that a row is the same in this run and in one that takes it over.
        row: dict[str, Any] = json.loads(dump_json(_row(cell, status, facts)))
        self.rows[index] = row
        self.folder.record(cell.name, file=file, digest=self.digests[index], row=row)

    def _fail(self, index: int, failure: Failure, where: str) -> None:
        cell = self.spec.cells[index]
        if failure.exit_code in _ANSWERS:
            self._note(index, _ANSWERS[failure.exit_code], {"error": failure.message})
        elif self.on_error == "fail":
            raise failure.error(cell.name + where)
        else:
            error = failure.error(cell.name + where)
            code = getattr(error, "exit_code", 1)
            self.failed[index] = _row(cell, "failed", {"error": str(error), "exit_code": code})
        rest = [("layer", index, layer) for layer in range(len(self.layers.get(index, ())))]
        self.executor.withdraw(rest)
        self._tell(f"{cell.name}: {failure.message}")

    def _folder_of(self, index: int) -> Path:
        return self.folder.folder / "cells" / self.spec.cells[index].name

    def _tell(self, text: str) -> None:
        self.progress(len(self.rows) + len(self.failed), len(self.spec.cells), text)

    def write_results(self) -> None:
        """Write the table of what is done by now."""
        rows = {**self.rows, **self.failed}
        lines = (dump_json(rows[index]) + "\n" for index in sorted(rows))
        write_text(self.folder.folder / RESULTS, "".join(lines))

    def report(self) -> BatchReport:
        return BatchReport(
            rows=tuple(self.rows[index] for index in sorted(self.rows)),
            set_aside=tuple(self.failed[index] for index in sorted(self.failed)),
            num_resumed=self.num_resumed,
            num_changed=self.num_changed,
        )


def _row(cell: Cell, status: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    varied = {name: cell.options.get(name) for name in cell.varied}
    about = {"cell": cell.name, "trace": cell.trace.name, "topology": cell.topology.name, "options": varied}
    return {**about, "status": status, **facts}


def _make_folder(path: Path) -> None:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def _digest(cell: Cell, prints: dict[str, str]) -> str:
    """Return what tells whether a cell is still the same: its options, and the state of its input files."""
    entries = {**asdict(cell.trace), "topology": cell.topology.topology, **cell.options}
    names = ("path", "physical_map", "held_out", "topology", "calibration", "model")
    files = {name: str(entries[name]) for name in names if entries.get(name) is not None}
    for path in files.values():
        if path not in prints:
            prints[path] = _fingerprint(path)
    known = {
        "trace": asdict(cell.trace),
        "topology": asdict(cell.topology),
        "options": dict(cell.options),
        "held_out": cell.held_out,
        "split_layers": cell.split_layers,
        "files": {name: prints[path] for name, path in files.items()},
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: str) -> str:
    """Return the state of a file or folder, cheap to know; of small files it is the content."""
    file = Path(path)
    if "://" in path or not file.exists():
        return "unknown"
    with reading(file):
        if file.is_dir():
            entries = sorted((entry.name, *_state(entry)) for entry in file.iterdir() if entry.is_file())
            return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        if file.stat().st_size <= _SMALL_BYTES:
            return hashlib.sha256(file.read_bytes()).hexdigest()
        return json.dumps(_state(file))


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
