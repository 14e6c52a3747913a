"""What several commands take: the options of a problem, and how they become one."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placement.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from placement.model import ModelShape
    from placement.problem import PlacementProblem
    from placement.profile import RoutingProfile
    from traces.counts import ExpertCounts
    from traces.source import TraceSource
    from traces.statistics import RoutingStatistics

__all__ = [
    "CalibrationOption",
    "FillMemoryOption",
    "FromOption",
    "JsonOption",
    "MaxImbalanceOption",
    "ModelOption",
    "ObjectiveOption",
    "PhysicalMapOption",
    "ProblemInputs",
    "ReplicaSplitOption",
    "RiskOption",
    "SampleOption",
    "SeedOption",
    "SemanticsOption",
    "SpareSlotsOption",
    "ThreadsOption",
    "TimeLimitOption",
    "TopologyOption",
    "TraceArgument",
    "TraceOrigin",
    "WindowOption",
    "default_window",
    "warn",
]

TraceArgument = Annotated[
    str,
    typer.Argument(
        help="Data set (folder or URL), .npz, saved statistics or a dump of an engine; found out by content.",
        show_default=False,
    ),
]
TopologyOption = Annotated[
    str,
    typer.Option(
        "-t",
        "--topology",
        help="KIND:NODESxDEVICES (h100:2x8, a40:1x2+v100:1x2) or a YAML file.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Model sizes: a preset's name, a checkpoint folder, config.json or YAML. Default: the trace's.",
        show_default=False,
    ),
]
SemanticsOption = Annotated[
    str, typer.Option("--semantics", help="dispatch, dispatch-nodedup, stay-put or allgather.")
]
ObjectiveOption = Annotated[str, typer.Option("--objective", help="step-time, balance or traffic.")]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Tokens per window (one step). Default: 4096, less for short traces.",
        show_default=False,
    ),
]
SpareSlotsOption = Annotated[
    int, typer.Option("--spare-slots", help="Slots per layer beyond one per expert, over all devices.")
]
FillMemoryOption = Annotated[
    bool,
    typer.Option("--fill-memory", help="As many slots on each device as its memory holds experts."),
]
ReplicaSplitOption = Annotated[
    str,
    typer.Option(
        "--replica-split", help="How the engine spreads tokens over replicas: even, nearest, hash or lp."
    ),
]
MaxImbalanceOption = Annotated[
    float,
    typer.Option("--max-imbalance", help="For traffic: fullest / mean device of each layer's summed load."),
]
RiskOption = Annotated[str, typer.Option("--risk", help="Over windows: mean, p95 or cvar95.")]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Measured curves or linear costs (JSON). Default: data sheet.",
        show_default=False,
    ),
]
SampleOption = Annotated[
    int | None,
    typer.Option(
        "--sample",
        help="Tokens whose expert sets are kept. Default: all, or what fits in memory.",
        show_default=False,
    ),
]
FromOption = Annotated[
    str | None, typer.Option("--from", help="Insist on a trace format.", show_default=False)
]
PhysicalMapOption = Annotated[
    Path | None,
    typer.Option(
        "--physical-map",
        help="Which logical expert each physical slot held, for dumps of physical ids.",
        show_default=False,
    ),
]
TimeLimitOption = Annotated[
    float | None,
    typer.Option("--time-limit", help="Seconds; longer searches deeper.", show_default=False),
]
ThreadsOption = Annotated[int, typer.Option("--threads", help="Threads; results repeat exactly with one.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

MOST_DEFAULT_WINDOW = 4096
DEFAULT_WINDOWS = 16


def warn(message: str) -> None:
    """Tell the user something on stderr."""
    sys.stderr.write(f"moe-placement: {' '.join(message.split())}\n")


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
    """The options of a problem as given on the command line."""

    trace: str
    topology: str
    model: str | None = None
    semantics: str = "dispatch"
    objective: str = "step-time"
    window: int | None = None
    spare_slots: int = 0
    fill_memory: bool = False
    replica_split: str = "even"
    max_imbalance: float = 1.05
    risk: str = "mean"
    calibration: Path | None = None
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
        from placement.calibration import DataSheetCalibration, read_calibration
        from placement.problem import Objective, ReplicaSplit, Risk, Semantics, make_problem
        from placement.topology import parse_topology

        choices = {
            "semantics": _choice(Semantics, self.semantics, "--semantics"),
            "objective": _choice(Objective, self.objective, "--objective"),
            "risk": _choice(Risk, self.risk, "--risk"),
            "replica_split": _choice(ReplicaSplit, self.replica_split, "--replica-split"),
        }
        topology = parse_topology(self.topology)
        calibration = (
            DataSheetCalibration() if self.calibration is None else read_calibration(self.calibration)
        )
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

    def _traffic(self, num_devices: int) -> tuple[RoutingProfile, TraceOrigin]:
        """Read the trace into the optimizer's profile."""
        from placement.model import resolve_model
        from traces.counts import ExpertCounts
        from traces.readers import ReadOptions, open_trace
        from traces.statistics import RoutingStatistics, build_profile

        if self.window is not None and self.window < 1:
            raise InputError(f"--window is {self.window}; it must be 1 or more")
        named = None if self.model is None else resolve_model(self.model)
        options = ReadOptions(model=named, physical_map=self.physical_map)
        traffic = open_trace(self.trace, format=self.source_format, options=options)
        if isinstance(traffic, ExpertCounts):
            if self.window is not None:
                warn("--window has no effect: the trace counts experts by windows of its own")
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
            warn(f"--window has no effect: the statistics have windows of {statistics.window_tokens} tokens")
        if self.sample is not None:
            warn("--sample has no effect: statistics have a sample of their own")
        if statistics.sample is None:
            warn("the statistics keep no tokens: only what loads alone decide can be priced")

    def _tell_what_is_left_out(self, profile: RoutingProfile, num_tokens: int, window: int) -> None:
        """Say so where a long trace is not taken whole, unless that was asked for."""
        if profile.num_windows < num_tokens // window:
            warn(
                f"kept {profile.num_windows:,} of {num_tokens // window:,} windows, evenly spaced, for memory"
            )
        if self.sample is None and profile.num_sampled_tokens < num_tokens:
            warn(f"sampled {profile.num_sampled_tokens:,} of {num_tokens:,} tokens; --sample takes others")

    def _model(self, trace: TraceOrigin, *, quiet: bool) -> ModelShape | None:
        """Sizes of the model that was named, of the trace's, or of the one preset with its shape."""
        from placement.model import match_model, preset_model, resolve_model

        if self.model is not None:
            return resolve_model(self.model)
        if trace.model_name is not None:
            try:
                return preset_model(trace.model_name)
            except InputError:
                # A recorded model need not be a preset; its shape may match one all the same.
                pass
        model = match_model(trace.num_layers, trace.num_experts, trace.top_k)
        if model is not None and not quiet:
            warn(
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


if TYPE_CHECKING:
    from placement.plan import Placement
