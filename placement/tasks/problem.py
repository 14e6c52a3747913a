"""From a trace and options to a problem, and what the result of a solve is labelled with.

What is to be told about the input is logged as a warning; `collecting_notes` gathers it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from placement.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from placement.calibration import Calibration
    from placement.model import ModelShape
    from placement.plan import Placement
    from placement.problem import PlacementProblem
    from placement.profile import RoutingProfile
    from placement.topology import Topology
    from traces.counts import ExpertCounts
    from traces.source import TraceSource
    from traces.statistics import RoutingStatistics

__all__ = ["ProblemInputs", "TraceOrigin", "collecting_notes", "default_window", "labelled"]

_log = logging.getLogger(__name__)

MOST_DEFAULT_WINDOW = 4096
DEFAULT_WINDOWS = 16


def default_window(num_tokens: int) -> int:
    """Return 4096 tokens, or for short traces the power of two that gives at least 16 windows."""
    window = MOST_DEFAULT_WINDOW
    while window > 1 and num_tokens // window < DEFAULT_WINDOWS:
        window //= 2
    return window


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOrigin:
    """What is known of a trace beside its traffic.

    Parameters
    ----------
    digest
        Digest of the content.
    num_layers, num_experts, top_k, model_name, moe_layer_ids
        As in `traces.trace.Trace`.
    """

    digest: str
    num_layers: int
    num_experts: int
    top_k: int
    model_name: str | None
    moe_layer_ids: tuple[int, ...] | None

    @classmethod
    def of(cls, traffic: TraceSource | ExpertCounts) -> TraceOrigin:
        """Return the origin of an opened trace."""
        from traces.counts import ExpertCounts

        about = traffic if isinstance(traffic, ExpertCounts) else traffic.header
        return cls(
            digest=traffic.digest,
            num_layers=about.num_layers,
            num_experts=about.num_experts,
            top_k=about.top_k,
            model_name=about.model_name,
            moe_layer_ids=about.moe_layer_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemInputs:
    """The options of a problem, named as on the command line.

    Texts for `topology` and `model` and a path for `calibration` may name files, as on the command line; who
    takes them from strangers resolves them first.
    """

    trace: str
    topology: str | Topology
    model: str | ModelShape | None = None
    semantics: str = "dispatch"
    objective: str = "step-time"
    window: int | None = None
    spare_slots: int = 0
    fill_memory: bool = False
    replica_split: str = "even"
    max_imbalance: float = 1.05
    risk: str = "mean"
    calibration: Path | Calibration | None = None
    sample: int | None = None
    source_format: str | None = None
    physical_map: Path | None = None

    def problem(
        self, *, device_of_slot_S: npt.NDArray[np.int64] | None = None
    ) -> tuple[PlacementProblem, TraceOrigin]:
        """Read the files and build the problem.

        Parameters
        ----------
        device_of_slot_S
            Slots of a given placement; otherwise they follow from topology and spare slots.
        """
        from placement.problem import Objective, ReplicaSplit, Risk, Semantics, make_problem
        from placement.topology import parse_topology

        choices = {
            "semantics": _choice(Semantics, self.semantics, "--semantics"),
            "objective": _choice(Objective, self.objective, "--objective"),
            "risk": _choice(Risk, self.risk, "--risk"),
            "replica_split": _choice(ReplicaSplit, self.replica_split, "--replica-split"),
        }
        topology = parse_topology(self.topology) if isinstance(self.topology, str) else self.topology
        calibration = self._calibration()
        profile, origin = self._traffic(topology.num_devices)
        model = self._model(origin, quiet=calibration.flat)
        problem = make_problem(
            profile,
            topology,
            model=model,
            calibration=calibration,
            spare_slots=self.spare_slots,
            slots_from_memory=self.fill_memory,
            max_imbalance=self.max_imbalance,
            device_of_slot_S=device_of_slot_S,
            **choices,
        )
        return problem, origin

    def _calibration(self) -> Calibration:
        from placement.calibration import DataSheetCalibration, read_calibration

        if self.calibration is None:
            return DataSheetCalibration()
        return read_calibration(self.calibration) if isinstance(self.calibration, Path) else self.calibration

    def _traffic(self, num_devices: int) -> tuple[RoutingProfile, TraceOrigin]:
        """Read the trace into the optimizer's profile."""
        from placement.model import resolve_model
        from traces.counts import ExpertCounts
        from traces.readers import ReadOptions, open_trace
        from traces.statistics import RoutingStatistics, build_profile

        if self.window is not None and self.window < 1:
            raise InputError(f"--window is {self.window}; it must be 1 or more")
        named = resolve_model(self.model) if isinstance(self.model, str) else self.model
        options = ReadOptions(model=named, physical_map=self.physical_map)
        traffic = open_trace(self.trace, format=self.source_format, options=options)
        if isinstance(traffic, ExpertCounts):
            if self.window is not None:
                _log.warning("--window has no effect: the trace counts experts by windows of its own")
            return traffic.profile(), TraceOrigin.of(traffic)
        if isinstance(traffic, RoutingStatistics):
            self._warn_of_statistics(traffic)
            return traffic.profile(num_devices), TraceOrigin.of(traffic)
        window = default_window(traffic.num_tokens) if self.window is None else self.window
        profile = build_profile(
            traffic, window_tokens=window, max_sampled_tokens=self.sample, num_devices=num_devices
        )
        self._tell_what_is_left_out(profile, traffic.num_tokens, window)
        return profile, TraceOrigin.of(traffic)

    def _warn_of_statistics(self, statistics: RoutingStatistics) -> None:
        """Say which options statistics cannot follow any more, and what they lack."""
        if self.window not in (None, statistics.window_tokens):
            _log.warning(
                f"--window has no effect: the statistics have windows of {statistics.window_tokens} tokens"
            )
        if self.sample is not None:
            _log.warning("--sample has no effect: statistics have a sample of their own")
        if statistics.sample is None:
            _log.warning("the statistics keep no tokens: only what loads alone decide can be priced")

    def _tell_what_is_left_out(self, profile: RoutingProfile, num_tokens: int, window: int) -> None:
        """Say so where a long trace is not taken whole, unless that was asked for."""
        if profile.num_windows < num_tokens // window:
            _log.warning(
                f"kept {profile.num_windows:,} of {num_tokens // window:,} windows, evenly spaced, for memory"
            )
        if self.sample is None and profile.num_sampled_tokens < num_tokens:
            _log.warning(
                f"sampled {profile.num_sampled_tokens:,} of {num_tokens:,} tokens; --sample takes others"
            )

    def _model(self, trace: TraceOrigin, *, quiet: bool) -> ModelShape | None:
        """Sizes of the model that was named, of the trace's, or of the one preset with its shape."""
        from placement.model import match_model, preset_model, resolve_model

        if self.model is not None:
            return resolve_model(self.model) if isinstance(self.model, str) else self.model
        if trace.model_name is not None:
            try:
                return preset_model(trace.model_name)
            except InputError:
                # A recorded model need not be a preset; its shape may match one all the same.
                pass
        model = match_model(trace.num_layers, trace.num_experts, trace.top_k)
        if model is not None and not quiet:
            _log.warning(
                f"assuming the sizes of {model.name} ({model.num_layers} MoE layers, top-{model.top_k} of "
                f"{model.num_experts}); name another with --model"
            )
        return model


def _choice(kind: type[StrEnum], value: str, option: str) -> str:
    from placement._suggest import did_you_mean

    names = [str(member) for member in kind]
    if value not in names:
        raise InputError(f"{option} {value!r} is unknown; {did_you_mean(value, names)}")
    return value


def labelled(placement: Placement, problem: PlacementProblem, trace: TraceOrigin) -> Placement:
    """Return a placement that says which model and decoder layers it is for."""
    model = problem.model
    name = trace.model_name or (model.name if model is not None else None)
    layers = trace.moe_layer_ids or (model.moe_layer_ids if model is not None else None)
    facts = dict(placement.extra.get("model", {}))
    if model is not None and layers == model.moe_layer_ids:
        # What engines that count other layers than ours need to know.
        facts["num_decoder_layers"] = model.num_decoder_layers
        facts["num_mtp_layers"] = model.num_mtp_layers
        if model.top_groups < model.num_expert_groups:
            facts["num_expert_groups"] = model.num_expert_groups
    extra = {**placement.extra, "model": facts} if facts else placement.extra
    return replace(placement, model_name=name, moe_layer_ids=layers, extra=extra)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.notes: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.notes.append(" ".join(record.getMessage().split()))


@contextmanager
def collecting_notes() -> Iterator[list[str]]:
    """Gather what the packages note about their input, instead of telling it."""
    loggers = [logging.getLogger(name) for name in ("placement", "traces")]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    collector = _Collector()
    for logger in loggers:
        logger.handlers, logger.propagate = [collector], False
    try:
        yield collector.notes
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
