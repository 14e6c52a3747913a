"""From a file that says what fabric to plan to the plan.

Shape letters: L layers, S servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from placement._suggest import did_you_mean
from placement.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from placement._fields import Fields
    from placement.planning.fabric import FabricPlan, FabricRegion, OpticalSwitch, PlacedTraffic
    from placement.tasks.plan_spec import PlanSpec
    from placement.topology import Topology

__all__ = ["FabricTask", "fabric_task"]

MEGABYTE = 1e6

KEYS = (
    "topology",
    "servers",
    "ocs_ports",
    "eps_ports",
    "link_gbits",
    "switch",
    "window_ms",
    "training",
    "pairing",
    "prices_gbits",
    "oversubscription",
    "nodes",
    "time_limit_s",
    "demand_mb",
    "synthetic",
    "trace",
    "model",
    "calibration",
    "trace_window",
    "sample",
    "batch_tokens",
    "placement_work_s",
)

TRACE_KEYS = ("model", "calibration", "trace_window", "sample", "batch_tokens", "placement_work_s")

PAIRINGS = ("directed", "paired")

DEFAULT_BATCH_TOKENS = 65536
DEFAULT_SAMPLE = 16384
DEFAULT_PLACEMENT_WORK_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricTask:
    """A plan and what it was made from.

    Parameters
    ----------
    plan
        The plan.
    source
        Name of the file that said what to plan.
    traffic
        What the demand comes from, in words.
    """

    plan: FabricPlan
    source: str
    traffic: str


def fabric_task(spec: PlanSpec, *, trace: str | None = None) -> FabricTask:
    """Plan what a file asks for.

    Parameters
    ----------
    trace
        Routing to plan for instead of what the file names.

    Raises
    ------
    InputError
        If the file asks for something that does not exist or contradicts itself.
    InfeasibleError
        If the region cannot be built or cannot serve its demand.
    """
    return _Reader(spec, trace).task()


class _Reader:
    """Reads one file."""

    def __init__(self, spec: PlanSpec, trace: str | None) -> None:
        self.spec = spec
        self.fields: Fields = spec.fields(known=KEYS)
        named = self.fields.text("trace")
        self.trace = trace if trace is not None else None if named is None else spec.found(named)
        value = self.fields.raw("topology")
        self.topology: Topology | None = None if value is None else spec.topology(value)

    def task(self) -> FabricTask:
        """Read, plan."""
        from placement.planning.fabric import Effort, Timing, plan_fabric
        from placement.planning.fabric.planner import OVERSUBSCRIPTION

        fields, region = self.fields, self._region()
        generation = fields.integer("prices_gbits")
        oversubscription = fields.number("oversubscription")
        nodes = fields.integer("nodes", minimum=0)
        effort = Effort(time_limit_s=fields.number("time_limit_s"))
        if nodes is not None:
            effort = Effort(nodes=nodes, time_limit_s=effort.time_limit_s)
        timing = Timing(
            window_s=(fields.number("window_ms", zero=True) or 0.0) / 1e3,
            training=self._flag("training", default=True),
            paired=self._pairing() == "paired",
        )
        demand, traffic = self._demand(region), None
        if demand is None:
            traffic = self._traffic()
        plan = plan_fabric(
            region,
            demand=demand,
            traffic=traffic,
            timing=timing,
            generation=generation,
            oversubscription=OVERSUBSCRIPTION if oversubscription is None else oversubscription,
            effort=effort,
        )
        return FabricTask(plan=plan, source=self.spec.source, traffic=self._words(region))

    def _words(self, region: FabricRegion) -> str:
        if self.trace is not None:
            return f"routing of {self.trace}"
        if "demand_mb" in self.fields:
            return "demand as given"
        return f"synthetic demand between {region.num_servers} servers"

    def _flag(self, key: str, *, default: bool) -> bool:
        value = self.fields.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fields.wrong(key, "true or false")
        return value

    def _pairing(self) -> str:
        name = self.fields.text("pairing") or PAIRINGS[0]
        if name not in PAIRINGS:
            raise self.fields.wrong("pairing", " or ".join(PAIRINGS))
        return name

    def _region(self) -> FabricRegion:
        from placement.planning.fabric import FabricRegion

        fields = self.fields
        servers, topology = fields.integer("servers", minimum=2), self.topology
        if servers is None and topology is None:
            raise InputError(f"{self.spec.source}: servers is missing; give it, or a topology")
        if topology is not None and servers not in (None, topology.num_nodes):
            raise InputError(
                f"{self.spec.source}: servers is {servers}, the topology has {topology.num_nodes} nodes; "
                "leave one of them out"
            )
        ocs_ports, eps_ports = fields.integer("ocs_ports"), fields.integer("eps_ports", minimum=0)
        if ocs_ports is None and topology is not None and topology.tiers[-1].ports is not None:
            # The topology says how many links a server has; two of them, as MixNet's, go to packet switches.
            eps_ports = 2 if eps_ports is None else eps_ports
            ocs_ports = topology.tiers[-1].ports - eps_ports
        return FabricRegion(
            num_servers=topology.num_nodes if topology is not None else int(servers or 0),
            ocs_ports=6 if ocs_ports is None else ocs_ports,
            eps_ports=2 if eps_ports is None else eps_ports,
            link_gbits=fields.number("link_gbits") or self._link_gbits(),
            switch=self._switch(),
        )

    def _link_gbits(self) -> float:
        if self.topology is None:
            return 400.0
        return self.topology.kinds[0].nic_bandwidth * 8 / 1e9

    def _switch(self) -> OpticalSwitch:
        from placement._fields import Fields
        from placement.planning.fabric import OPTICAL_SWITCHES, OpticalSwitch

        value, place = self.fields.raw("switch"), "switch"
        if value is None and self.topology is not None and self.topology.optical_switch is not None:
            value, place = self.topology.optical_switch, "topology.optical_switch"
        if value is None:
            return OPTICAL_SWITCHES["mixnet"]
        if isinstance(value, str):
            if value not in OPTICAL_SWITCHES:
                raise InputError(
                    f"{self.spec.source}: switch {value!r} is unknown; "
                    f"{did_you_mean(value, OPTICAL_SWITCHES)}"
                )
            return OPTICAL_SWITCHES[value]
        known = ("name", "ports", "reconfiguration_ms")
        fields = Fields(value, source=self.spec.source, place=place, known=known, required=("ports",))
        delay_ms = fields.number("reconfiguration_ms", zero=True)
        ports = fields.integer("ports", minimum=2)
        assert ports is not None
        return OpticalSwitch(
            name=fields.text("name") or "optical switch",
            ports=ports,
            reconfiguration_s=(25.0 if delay_ms is None else delay_ms) / 1e3,
        )

    def _demand(self, region: FabricRegion) -> npt.NDArray[np.float64] | None:
        """Return demand that the file gives or has drawn; None where a trace makes it."""
        from placement._fields import Fields
        from placement.planning.fabric import synthetic_demand

        given = [key for key in ("demand_mb", "synthetic") if key in self.fields]
        given += ["trace"] if self.trace is not None else []
        if len(given) != 1:
            raise InputError(
                f"{self.spec.source}: give one of demand_mb, synthetic and trace, "
                f"not {' and '.join(given) or 'none'}"
            )
        if self.trace is not None:
            return None
        for key in TRACE_KEYS:
            if key in self.fields:
                raise InputError(f"{self.spec.source}: {key} has no effect without a trace; leave it out")
        if "demand_mb" in self.fields:
            return self._given_demand(region)
        known = ("skew", "seed", "layers", "mean_mb")
        fields = Fields(self.fields.raw("synthetic"), source=self.spec.source, place="synthetic", known=known)
        skew, mean_mb = fields.number("skew", zero=True), fields.number("mean_mb")
        return synthetic_demand(
            region.num_servers,
            skew=0.6 if skew is None else skew,
            seed=fields.integer("seed", minimum=0) or 0,
            num_layers=fields.integer("layers") or 1,
            mean_bytes=(64.0 if mean_mb is None else mean_mb) * MEGABYTE,
        )

    def _given_demand(self, region: FabricRegion) -> npt.NDArray[np.float64]:
        rows, size = self.fields.items("demand_mb"), region.num_servers
        try:
            matrix = np.array(rows, dtype=np.float64)
        except (ValueError, TypeError):
            matrix = np.empty(0)
        if matrix.ndim == 2:
            matrix = matrix[None]
        if matrix.ndim != 3 or matrix.shape[1:] != (size, size):
            raise self.fields.wrong(
                "demand_mb", f"a matrix of {size} rows of {size} numbers, or a list of such"
            )
        return matrix * MEGABYTE

    def _traffic(self) -> PlacedTraffic:
        from placement.planning.fabric import PlacedTraffic
        from placement.tasks.problem import ProblemInputs

        if self.topology is None:
            raise InputError(
                f"{self.spec.source}: topology is missing; with a trace it says where devices are"
            )
        assert self.trace is not None
        fields, model = self.fields, self.fields.raw("model")
        sample, work_s = fields.integer("sample"), fields.number("placement_work_s")
        problem, _ = ProblemInputs(
            trace=self.trace,
            topology=self.topology,
            model=None if model is None else self.spec.model(model),
            window=fields.integer("trace_window"),
            sample=DEFAULT_SAMPLE if sample is None else sample,
            calibration=self.spec.calibration(fields.raw("calibration")),
        ).problem()
        return PlacedTraffic(
            problem=problem,
            batch_tokens=fields.integer("batch_tokens") or DEFAULT_BATCH_TOKENS,
            placement_work_s=DEFAULT_PLACEMENT_WORK_S if work_s is None else work_s,
        )
