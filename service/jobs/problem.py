"""From what a caller asked for to the inputs of a problem: names and objects, never a path.

Nothing here needs pydantic: a job's process reads the request as the JSON that was stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.errors import InputError
from placement.tasks.problem import ProblemInputs

if TYPE_CHECKING:
    from placement.calibration import Calibration
    from placement.model import ModelShape
    from placement.topology import Topology
    from service.schemas import EvaluationRequest, SolveRequest
    from service.settings import Settings

__all__ = ["check_request", "for_callers", "inputs_of", "solver_of"]

_PROBLEM_OPTIONS = (
    "semantics",
    "objective",
    "window",
    "spare_slots",
    "fill_memory",
    "replica_split",
    "max_imbalance",
    "risk",
    "sample",
    "source_format",
)
_OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)")
_NAMES = {"from": "source_format", "start": "start_placement_id"}


def inputs_of(spec: Mapping[str, Any], *, trace: str) -> ProblemInputs:
    """Return the inputs of a problem.

    Parameters
    ----------
    spec
        Body of a solve or an evaluation, as JSON.
    trace
        Local file or folder of the trace.

    Raises
    ------
    InputError
        If topology, model or calibration make no sense.
    """
    options = spec.get("options") or {}
    return ProblemInputs(
        trace=trace,
        topology=_topology(spec["topology"]),
        model=_model(spec.get("model")),
        calibration=_calibration(options.get("calibration")),
        **{name: options[name] for name in _PROBLEM_OPTIONS if name in options},
    )


def _topology(given: object) -> Topology:
    from placement.topology import Topology

    return _cluster(given) if isinstance(given, str) else Topology.from_dict(given)


@lru_cache(maxsize=8)
def _cluster(shorthand: str) -> Topology:
    """Parse a shorthand once: a server checks many requests for the same cluster."""
    from placement.topology import parse_shorthand

    return parse_shorthand(shorthand)


def _model(given: object) -> ModelShape | None:
    from placement.model import model_from_fields, preset_model

    if given is None:
        return None
    return preset_model(given) if isinstance(given, str) else model_from_fields(given)


def _calibration(given: Mapping[str, Any] | None) -> Calibration | None:
    from placement.calibration import calibration_from_dict

    if given is None:
        return None
    try:
        return calibration_from_dict(given)
    except InputError as exc:
        raise InputError(f"calibration: {exc}") from exc


def solver_of(name: str) -> str:
    """Return the name of a solver, or of the portfolio.

    Raises
    ------
    InputError
        If there is none, with the nearest one.
    """
    from placement._suggest import did_you_mean
    from placement.solvers.registry import solver_names

    names = ("auto", *solver_names())
    if name not in names:
        raise InputError(f"unknown solver {name!r}; {did_you_mean(name, names)}")
    return name


def check_request(
    request: SolveRequest | EvaluationRequest | Mapping[str, Any],
    settings: Settings | None = None,
    *,
    trace: Mapping[str, Any] | None = None,
) -> None:
    """Refuse what can be seen to make no sense without reading the trace.

    Whether slots and memory hold the experts is left to the job, which says by how much they do not.

    Parameters
    ----------
    request
        The body, or its JSON.
    settings
        What is allowed here.
    trace
        Summary of the trace's artifact (``num_experts``), where it is known.

    Raises
    ------
    InputError
        What is wrong, in one line.
    """
    spec = request if isinstance(request, Mapping) else request.model_dump(mode="json")
    options = spec.get("options") or {}
    inputs = inputs_of(spec, trace="")
    solver_of(options.get("solver") or "auto")
    if options.get("max_moves") is not None and spec.get("start_placement_id") is None:
        raise InputError(
            f"max_moves is {options['max_moves']}, but there is no start_placement_id to count moves from"
        )
    if options.get("fill_memory") and options.get("spare_slots"):
        raise InputError("fill_memory fills the memory already: leave spare_slots out")
    threads = options.get("threads", 1)
    if settings is not None and threads > settings.max_threads:
        raise InputError(f"threads is {threads}; at most {settings.max_threads} are allowed here")
    _check_model(inputs.model, trace or {})


def _check_model(model: object, trace: Mapping[str, Any]) -> None:
    """Refuse a model that routes among other experts than the trace."""
    from placement.model import ModelShape

    experts = trace.get("num_experts")
    if isinstance(model, ModelShape) and isinstance(experts, int) and experts != model.num_experts:
        raise InputError(f"model {model.name} has {model.num_experts} experts per layer, the trace {experts}")


def for_callers(text: str, names: Mapping[Path, str]) -> str:
    """Return a message in the caller's terms, on one line.

    Parameters
    ----------
    names
        What local files are to be called: their paths are nobody's business. Options lose their dashes.
    """
    for path, name in names.items():
        text = text.replace(str(path), name)
    text = _OPTION.sub(lambda found: _NAMES.get(found[1], found[1].replace("-", "_")), text)
    return " ".join(text.split())
