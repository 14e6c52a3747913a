"""The YAML file of a batch: many traces, topologies and options, crossed.

::

    name: what-if                     # default: the file's name
    traces:                           # files, folders or URLs; paths are relative to this file
      - data/chat
      - name: code                    # default: from the path
        path: dumps/code
        from: sglang-tokens           # default: found out by content
        model: deepseek-v3            # sizes; default: the trace's own
        physical_map: dumps/map.json  # for dumps of physical ids that lack it
        held_out: data/code-later     # fit on all windows of `path`, score on this trace
    topologies:                       # as for --topology; a file's path is relative to this file
      - h100:2x8
      - name: rack
        topology: rack.yaml
        price_per_device_hour: 2.5    # default: none, and costs are not priced
    solve:                            # options of every cell, named as on the command line with underscores
      window: 4096
      time_limit: 30
    grid:                             # options to cross: every combination is a cell
      spare_slots: [0, 16]
      seed: [0, 1, 2]
    exclude:                          # cells to leave out: those that fit all keys of an entry
      - {topology: rack, spare_slots: 16}
      - {trace: [chat, code], seed: 2}
    held_out: alternate               # fit on even windows, score on odd ones; or none: fit on all
    split_layers: false               # true: solve layers one by one, spread over workers

Options: semantics, objective, window, spare_slots, fill_memory, replica_split, max_imbalance, risk,
calibration, model, sample, solver, time_limit, threads, seed. An option that is not given has the default of
``solve``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from placement._fields import Fields, brief, load_yaml, read_text
from placement._suggest import did_you_mean
from placement.errors import InputError
from placement.problem import Objective, ReplicaSplit, Risk, Semantics

__all__ = ["MAX_CELLS", "OPTIONS", "BatchSpec", "Cell", "TopologyEntry", "TraceEntry", "read_spec"]

MAX_CELLS = 100_000
"""Cells that a batch may have at most."""

HELD_OUT = ("alternate", "none")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_LONGEST_NAME = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEntry:
    """A trace of a batch: its name, and what `solve` is told of it.

    Parameters
    ----------
    name
        What outputs call it.
    path
        File, folder or URL.
    source_format, model, physical_map
        As for ``solve``.
    held_out
        Trace to score on; None to hold windows of this one out.
    """

    name: str
    path: str
    source_format: str | None = None
    model: str | None = None
    physical_map: str | None = None
    held_out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyEntry:
    """A topology of a batch.

    Parameters
    ----------
    name
        What outputs call it.
    topology
        Shorthand or YAML file, as for ``--topology``.
    price_per_device_hour
        What a device costs for an hour, in whatever currency; None where costs are not priced.
    """

    name: str
    topology: str
    price_per_device_hour: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One solve of a batch.

    Parameters
    ----------
    name
        Folder of its results, for instance ``chat/rack/seed=1,spare_slots=0``.
    trace, topology
        What is placed where.
    options
        Options of ``solve`` that are given.
    varied
        Those of them that the grid varies.
    held_out
        ``alternate`` or ``none``; a trace of its own to score on comes before either.
    split_layers
        Whether layers are solved one by one.
    """

    name: str
    trace: TraceEntry
    topology: TopologyEntry
    options: Mapping[str, Any]
    varied: tuple[str, ...] = ()
    held_out: str = "alternate"
    split_layers: bool = False


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """A batch, complete and checked.

    Parameters
    ----------
    name
        Its name.
    cells
        What to solve, in order.
    num_excluded
        Combinations that were left out.
    """

    name: str
    cells: tuple[Cell, ...]
    num_excluded: int = 0
    source: str = field(default="", compare=False)


def _text(fields: Fields, key: str) -> Any:
    return fields.text(key)


def _one_of(*names: str) -> Callable[[Fields, str], Any]:
    def read(fields: Fields, key: str) -> Any:
        value = fields.text(key)
        if value is not None and value not in names:
            raise InputError(
                f"{fields.source}: {fields.at(key)} {value!r} is unknown; {did_you_mean(value, names)}"
            )
        return value

    return read


def _choice(kind: type[StrEnum]) -> Callable[[Fields, str], Any]:
    return _one_of(*(str(member) for member in kind))


def _integer(minimum: int) -> Callable[[Fields, str], Any]:
    return lambda fields, key: fields.integer(key, minimum=minimum)


def _positive(fields: Fields, key: str) -> Any:
    return fields.number(key)


def _factor(fields: Fields, key: str) -> Any:
    value = fields.number(key)
    if value is not None and value < 1:
        raise fields.wrong(key, "a number of 1 or more")
    return value


def _truth(fields: Fields, key: str) -> Any:
    value = fields.raw(key)
    if value is not None and not isinstance(value, bool):
        raise fields.wrong(key, "true or false")
    return value


def _solver(fields: Fields, key: str) -> Any:
    from placement.solvers.registry import solver_names

    return _one_of("auto", *solver_names())(fields, key)


OPTIONS: Mapping[str, Callable[[Fields, str], Any]] = MappingProxyType(
    {
        "semantics": _choice(Semantics),
        "objective": _choice(Objective),
        "window": _integer(1),
        "spare_slots": _integer(0),
        "fill_memory": _truth,
        "replica_split": _choice(ReplicaSplit),
        "max_imbalance": _factor,
        "risk": _choice(Risk),
        "calibration": _text,
        "model": _text,
        "sample": _integer(1),
        "solver": _solver,
        "time_limit": _positive,
        "threads": _integer(1),
        "seed": _integer(0),
    }
)
"""Options of a cell, and how each is read."""

_KEYS = ("name", "traces", "topologies", "solve", "grid", "exclude", "held_out", "split_layers")


def read_spec(path: str | os.PathLike[str]) -> BatchSpec:
    """Read the YAML file of a batch.

    Raises
    ------
    InputError
        If it cannot be read or an entry is wrong, naming the entry.
    """
    file = Path(path)
    source = str(file)
    values = load_yaml(read_text(file, what="batch file"), source=source)
    top = Fields(values, source=source, known=_KEYS, required=("traces", "topologies"))
    reader = _Reader(source, file.resolve().parent)
    traces = reader.entries(top, "traces", reader.trace)
    topologies = reader.entries(top, "topologies", reader.topology)
    options, grid = reader.options(top), reader.grid(top)
    if both := [name for name in grid if name in options]:
        raise InputError(f"{source}: {both[0]} is under solve and under grid; leave one out")
    held_out = _one_of(*HELD_OUT)(top, "held_out") or "alternate"
    split_layers = bool(_truth(top, "split_layers"))
    names = {"trace": [entry.name for entry in traces], "topology": [entry.name for entry in topologies]}
    exclude = reader.exclude(top, names | {name: [value] for name, value in options.items()} | grid)
    count = len(traces) * len(topologies)
    for choices in grid.values():
        count *= len(choices)
    if count > MAX_CELLS:
        raise InputError(
            f"{source}: asks for {count} cells; {MAX_CELLS} are possible, so cut the batch in parts"
        )
    labels = [_labels(name, choices) for name, choices in grid.items()]
    cells = []
    for trace, topology, *chosen in itertools.product(traces, topologies, *labels):
        varied = {name: grid[name][index] for name, (index, _) in zip(grid, chosen, strict=True)}
        given = {name: value for name, value in (options | varied).items() if value is not None}
        facts = {"trace": trace.name, "topology": topology.name, **options, **varied}
        if any(_fits(rule, facts) for rule in exclude):
            continue
        cells.append(
            Cell(
                name=_cell_name(trace, topology, [label for _, label in chosen]),
                trace=trace,
                topology=topology,
                options=given,
                varied=tuple(grid),
                held_out=held_out,
                split_layers=split_layers,
            )
        )
    if not cells:
        raise InputError(f"{source}: exclude leaves no cell out of {count}")
    for cell in cells:
        if cell.split_layers:
            _check_split(cell, source)
    return BatchSpec(
        name=top.text("name") or file.stem, cells=tuple(cells), num_excluded=count - len(cells), source=source
    )


def _check_split(cell: Cell, source: str) -> None:
    """Layers are solved apart only where the objective is a sum over them."""
    semantics = cell.options.get("semantics", "dispatch")
    objective = cell.options.get("objective", "step-time")
    if semantics == "stay-put" and objective != "balance":
        raise InputError(
            f"{source}: split_layers goes without semantics stay-put, where a layer's cost depends on its "
            f"neighbours ({cell.name}); leave split_layers out"
        )
    if cell.options.get("risk", "mean") != "mean":
        raise InputError(
            f"{source}: split_layers goes with risk mean alone: others are of all layers' sum ({cell.name})"
        )


class _Reader:
    """Reads the parts of a batch file."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.folder = source, folder

    def entries(self, top: Fields, key: str, read: Callable[[Any, str], Any]) -> list[Any]:
        found = [read(value, f"{key}[{index}]") for index, value in enumerate(top.items(key))]
        names = [entry.name for entry in found]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise InputError(
                    f"{self.source}: {key}[{index}] is named {name!r} as {key}[{names.index(name)}] is; "
                    "give it another with name:"
                )
        return found

    def trace(self, value: Any, place: str) -> TraceEntry:
        known = ("name", "path", "from", "model", "physical_map", "held_out")
        fields = self._fields({"path": value} if isinstance(value, str) else value, place, known, "path")
        path = fields.text("path") or ""
        return TraceEntry(
            name=self._name(fields, _stem(path)),
            path=self._path(path),
            source_format=fields.text("from"),
            model=self._existing(fields.text("model")),
            physical_map=self._path(fields.text("physical_map")),
            held_out=self._path(fields.text("held_out")),
        )

    def topology(self, value: Any, place: str) -> TopologyEntry:
        known = ("name", "topology", "price_per_device_hour")
        fields = self._fields(
            {"topology": value} if isinstance(value, str) else value, place, known, "topology"
        )
        text = fields.text("topology") or ""
        is_file = text.lower().endswith((".yaml", ".yml"))
        return TopologyEntry(
            name=self._name(fields, _stem(text) if is_file else text.replace(":", "-")),
            topology=self._path(text) if is_file else text,
            price_per_device_hour=fields.number("price_per_device_hour"),
        )

    def options(self, top: Fields) -> dict[str, Any]:
        fields = self._fields(top.mapping("solve"), "solve", tuple(OPTIONS))
        return {name: self._option(fields, name, name) for name in OPTIONS if name in fields}

    def grid(self, top: Fields) -> dict[str, list[Any]]:
        fields = self._fields(top.mapping("grid"), "grid", tuple(OPTIONS))
        grid: dict[str, list[Any]] = {}
        for name in (name for name in OPTIONS if name in fields):
            choices: dict[str, Any] = {}
            for index, value in enumerate(fields.items(name)):
                label = f"{name}[{index}]"
                choice = self._option(self._fields({label: value}, "grid", (label,)), label, name)
                if repr(choice) in choices:
                    raise InputError(f"{self.source}: grid.{label} is {brief(value)} a second time")
                choices[repr(choice)] = choice
            grid[name] = list(choices.values())
        return grid

    def _option(self, fields: Fields, key: str, name: str) -> Any:
        value = OPTIONS[name](fields, key)
        if name == "calibration":
            return self._path(value)
        return self._existing(value) if name == "model" else value

    def exclude(self, top: Fields, values: Mapping[str, list[Any]]) -> list[dict[str, list[Any]]]:
        """Read the rules: for each key the values that fit, all of them among those that cells have."""
        rules = []
        for index, rule in enumerate(top.items("exclude")):
            place = f"exclude[{index}]"
            fields = self._fields(rule, place, tuple(values))
            if not rule:
                raise InputError(f"{self.source}: {place} is empty and would leave every cell out; remove it")
            wanted: dict[str, list[Any]] = {}
            for key in (key for key in values if key in rule):
                given = fields.raw(key)
                wanted[key] = [
                    self._as_read(key, one) for one in (given if isinstance(given, list) else [given])
                ]
                for one in wanted[key]:
                    if one not in values[key]:
                        known = ", ".join(brief(value) for value in values[key])
                        raise InputError(
                            f"{self.source}: {fields.at(key)} {brief(one)} fits no cell; there are: {known}"
                        )
            rules.append(wanted)
        return rules

    def _as_read(self, key: str, value: Any) -> Any:
        """Return a value as cells have it: paths as seen from the file's folder."""
        if isinstance(value, str) and key == "calibration":
            return self._path(value)
        return self._existing(value) if isinstance(value, str) and key == "model" else value

    def _fields(self, value: Any, place: str, known: tuple[str, ...], *required: str) -> Fields:
        return Fields(value, source=self.source, place=place, known=known, required=required)

    def _name(self, fields: Fields, default: str) -> str:
        given = fields.text("name")
        if given is None:
            return _slug(default)
        if not _NAME.fullmatch(given):
            raise fields.wrong("name", "up to 100 letters, digits, '.', '_', '+' and '-' (it names a folder)")
        return given

    def _path(self, path: str | None) -> Any:
        """Return a path as seen from the file's folder; URLs stay."""
        return path if path is None or "://" in path else str(self.folder / path)

    def _existing(self, name: str | None) -> str | None:
        """Return the path that a model is named by, where it is one; names of presets stay."""
        return str(self.folder / name) if name is not None and (self.folder / name).exists() else name


def _fits(rule: Mapping[str, list[Any]], cell: Mapping[str, Any]) -> bool:
    return all(cell.get(key) in values for key, values in rule.items())


def _stem(path: str) -> str:
    name = path.rstrip("/").rpartition("/")[2]
    return name.rpartition(".")[0] or name


def _slug(text: str) -> str:
    """Return a text as it may name a folder."""
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.")
    return slug[:100] or "unnamed"


def _labels(name: str, choices: list[Any]) -> list[tuple[int, str]]:
    """Return the number of each choice and what folders call it: distinct, however long paths are."""
    labels: dict[str, int] = {}
    for index, value in enumerate(choices):
        text = "default" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        label = f"{name}={_slug(_stem(text) if name in ('calibration', 'model') else text)}"
        labels[label if label not in labels else f"{label}-{index}"] = index
    return [(index, label) for label, index in labels.items()]


def _cell_name(trace: TraceEntry, topology: TopologyEntry, labels: list[str]) -> str:
    """Return the folder of a cell: trace, topology, and what the grid varies."""
    name = ",".join(labels)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return "/".join(part for part in (trace.name, topology.name, name) if part)
