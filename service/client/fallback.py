"""What a job runs with when nobody can say better: experts in order, in equal consecutive shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from placement.errors import InputError

if TYPE_CHECKING:
    from placement.model import ModelShape
    from placement.plan import Placement
    from placement.topology import Topology

__all__ = ["Fallback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """What the job is: every placement must fit it, and one can always be made.

    Parameters
    ----------
    topology, model
        The cluster and the model that the job runs.
    """

    topology: Topology
    model: ModelShape

    @classmethod
    def of(cls, topology: str | Mapping[str, Any] | Topology, model: str | ModelShape) -> Fallback:
        """Read what names topology and model: a text as on the command line, or themselves.

        Raises
        ------
        InputError
            If there is no such thing.
        """
        from placement.model import resolve_model
        from placement.topology import Topology, parse_topology

        if isinstance(topology, str):
            topology = parse_topology(topology)
        elif isinstance(topology, Mapping):
            topology = Topology.from_dict(dict(topology), source="topology")
        return cls(topology=topology, model=resolve_model(model) if isinstance(model, str) else model)

    def contiguous(self) -> Placement:
        """Return the placement of an engine that nobody tells anything.

        Raises
        ------
        InfeasibleError
            If slots or memory do not hold the experts.
        """
        from dataclasses import replace

        import numpy as np

        from placement.problem import make_problem
        from placement.profile import RoutingProfile
        from placement.solvers.contiguous import contiguous_placement

        shape = self.model
        # Any traffic does: none is looked at.
        profile = RoutingProfile(
            load_WLE=np.ones((1, shape.num_layers, shape.num_experts)),
            window_tokens_W=np.ones(1),
            top_k=shape.top_k,
        )
        spare_slots = -shape.num_experts % self.topology.num_devices if self.topology.slots_D is None else 0
        problem = make_problem(
            profile,
            self.topology,
            model=shape,
            semantics="allgather",
            objective="balance",
            spare_slots=spare_slots,
        )
        found = contiguous_placement(problem)
        return replace(found, model_name=shape.name, moe_layer_ids=shape.moe_layer_ids or None)

    def check(self, placement: Placement) -> None:
        """Refuse a placement that is for something else.

        Raises
        ------
        InputError
            If so, with both numbers.
        """
        wanted = {
            "num_layers": self.model.num_layers,
            "num_experts": self.model.num_experts,
            "num_devices": self.topology.num_devices,
        }
        for name, number in wanted.items():
            if getattr(placement, name) != number:
                raise InputError(
                    f"{name} of the placement is {getattr(placement, name)}, the job has {number}"
                )
