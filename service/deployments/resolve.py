"""From a deployment's spec to topology, model and problem; needs numpy, reads no file that a caller names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.calibration import Calibration, calibration_from_dict
from placement.errors import InputError
from placement.model import ModelShape, model_from_fields, preset_model
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, ReplicaSplit, Semantics, make_problem
from placement.profile import RoutingProfile
from placement.topology import Topology, parse_shorthand

__all__ = ["Resolved", "check_fits", "facts_of", "resolve"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_SHAPE = frozenset({"layers", "experts", "top_k"})
MOST_CELLS = 1 << 22
"""Layers times experts; more is a slip of the pen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A spec, understood.

    Parameters
    ----------
    model
        Sizes; None where the spec gives a shape alone.
    slots_D
        Slots that each device has in a layer.
    """

    topology: Topology
    model: ModelShape | None
    num_layers: int
    num_experts: int
    top_k: int
    calibration: Calibration | None
    semantics: Semantics
    replica_split: ReplicaSplit
    slots_D: IntArray

    @property
    def has_costs(self) -> bool:
        """Whether steps have a price: by sizes, or by a calibration that needs none."""
        return self.model is not None or (self.calibration is not None and self.calibration.flat)

    def problem(
        self, load_WLE: npt.NDArray[Any], *, device_of_slot_S: IntArray, window_steps: int = 1
    ) -> PlacementProblem:
        """Return the problem of some load windows, which is that of balance: loads know no tokens.

        Parameters
        ----------
        window_steps
            Steps that a window sums up; its loads are those of a mean step.
        """
        load = np.asarray(load_WLE, dtype=np.float64) / window_steps
        return make_problem(
            RoutingProfile(load_WLE=load, window_tokens_W=_tokens_W(load, self.top_k), top_k=self.top_k),
            self.topology,
            model=self.model,
            semantics=self.semantics,
            objective=Objective.BALANCE,
            calibration=self.calibration,
            replica_split=self.replica_split,
            device_of_slot_S=device_of_slot_S,
        )


def _tokens_W(load_WLE: FloatArray, top_k: int) -> FloatArray:
    tokens_W = load_WLE.sum(axis=2).max(axis=1) / top_k
    return np.asarray(np.maximum(tokens_W, np.finfo(np.float64).tiny))


def resolve(spec: Mapping[str, Any]) -> Resolved:
    """Understand a spec, and check that experts and weights fit the cluster.

    Semantics and splits that go by tokens are replaced by what loads can tell: ``dispatch``, and even shares.

    Raises
    ------
    InputError, InfeasibleError
        If something in it is wrong, with its place; or the experts do not fit.
    """
    topology, model = _topology(spec["topology"]), _model(spec["model"])
    layers, experts, top_k = _shape(spec["model"]) if model is None else _shape_of(model)
    if not 1 <= top_k <= experts:
        raise InputError(f"model: top-{top_k} of {experts} experts is impossible")
    if layers * experts > MOST_CELLS:
        raise InputError(f"model: {layers} layers of {experts} experts are more than the service takes")
    options = spec["options"]
    calibration = _calibration(options.get("calibration"))
    problem = make_problem(
        RoutingProfile(load_WLE=np.ones((1, layers, experts)), window_tokens_W=np.ones(1), top_k=top_k),
        topology,
        model=model,
        semantics=Semantics.DISPATCH,
        objective=Objective.BALANCE,
        calibration=calibration,
        spare_slots=options["spare_slots"],
        slots_from_memory=options["fill_memory"],
    )
    semantics, split = Semantics(options["semantics"]), ReplicaSplit(options["replica_split"])
    return Resolved(
        topology=topology,
        model=model,
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        calibration=calibration,
        semantics=Semantics.DISPATCH if semantics is Semantics.STAY_PUT else semantics,
        replica_split=split if split is ReplicaSplit.LP else ReplicaSplit.EVEN,
        slots_D=problem.slots_D,
    )


def _topology(given: Any) -> Topology:
    if isinstance(given, str):
        return parse_shorthand(given)
    return Topology.from_dict(given, source="topology")


def _model(given: Any) -> ModelShape | None:
    if isinstance(given, str):
        return preset_model(given)
    if set(given) <= _SHAPE:
        return None
    return model_from_fields(given, source="model")


def _shape(given: Mapping[str, Any]) -> tuple[int, int, int]:
    for name in ("layers", "experts", "top_k"):
        value = given.get(name)
        if type(value) is not int or not 1 <= value <= MOST_CELLS:
            raise InputError(f"model.{name} is {value!r}; it must be a whole number from 1 to {MOST_CELLS}")
    return given["layers"], given["experts"], given["top_k"]


def _shape_of(model: ModelShape) -> tuple[int, int, int]:
    return model.num_layers, model.num_experts, model.top_k


def _calibration(given: Mapping[str, Any] | None) -> Calibration | None:
    if given is None:
        return None
    try:
        return calibration_from_dict(given)
    except InputError as exc:
        raise InputError(f"options.calibration: {exc}") from exc


def facts_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what follows from a spec and is needed without numpy.

    Raises
    ------
    InputError, InfeasibleError
        As for `resolve`; or a limit of the policy asks for prices that this spec does not give.
    """
    found, policy = resolve(spec), spec["policy"]
    for limit in ("max_pay_back_steps", "max_pay_back_seconds"):
        if policy[limit] is None:
            continue
        if found.model is None:
            raise InputError(
                f"policy.{limit} needs the sizes of the experts; name the model, or give all of its fields"
            )
        if found.calibration is not None and found.calibration.unit != "s":
            raise InputError(f"policy.{limit} needs costs in seconds; the calibration has none")
    return {
        "layers": found.num_layers,
        "experts": found.num_experts,
        "top_k": found.top_k,
        "devices": found.topology.num_devices,
        "slots": int(found.slots_D.sum()),
        "model_name": None if found.model is None else found.model.name,
        "expert_bytes": None if found.model is None else found.model.bytes_per_expert(),
    }


def check_fits(found: Resolved, placement: Placement) -> None:
    """Verify that a deployment can run a placement.

    Raises
    ------
    InputError
        Naming what does not fit, with the numbers.
    """
    for name, mine, its in (
        ("MoE layers", found.num_layers, placement.num_layers),
        ("experts", found.num_experts, placement.num_experts),
        ("devices", found.topology.num_devices, placement.num_devices),
    ):
        if mine != its:
            raise InputError(f"the placement has {its} {name}, the deployment {mine}")
    held_LD = placement.count_LED.sum(axis=1, dtype=np.int64)
    over = held_LD > found.slots_D
    if over.any():
        layer, device = (int(i[0]) for i in np.nonzero(over))
        raise InputError(
            f"layer {layer} of the placement puts {held_LD[layer, device]} experts on device {device}, which "
            f"has {found.slots_D[device]} slots there; raise options.spare_slots, or solve for these slots"
        )
