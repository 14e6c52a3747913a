"""The question a solver answers: this traffic, this cluster, this model, this objective.

Shape letters: S slots, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from placement._suggest import did_you_mean
from placement.calibration import Calibration, DataSheetCalibration
from placement.errors import InfeasibleError, InputError
from placement.model import ModelShape
from placement.plan import Placement, equal_slots
from placement.profile import RoutingProfile
from placement.topology import Topology

__all__ = ["Objective", "PlacementProblem", "ReplicaSplit", "Risk", "Semantics", "make_problem"]

IntArray = npt.NDArray[np.int64]

GIB = 1024.0**3

_Choice = TypeVar("_Choice", bound=StrEnum)

DATA_SHEET = DataSheetCalibration()


class Semantics(StrEnum):
    """How the engine moves tokens, hence which traffic a placement can change."""

    DISPATCH = "dispatch"
    """Tokens go to their experts and return home, one copy per device: distinct tokens count."""
    DISPATCH_NODEDUP = "dispatch-nodedup"
    """One copy per token-expert pair: pairs received count."""
    STAY_PUT = "stay-put"
    """A token stays on the device of its first expert: moves between consecutive layers count."""
    ALLGATHER = "allgather"
    """Every device receives every token: a placement changes the load alone."""


class Objective(StrEnum):
    """What is minimised."""

    STEP_TIME = "step-time"
    """Predicted time of one step, summed over layers."""
    BALANCE = "balance"
    """Mean over windows and layers of fullest device / mean device load."""
    TRAFFIC = "traffic"
    """Fanout (dispatch) or hops (stay-put), subject to `max_imbalance`."""


class ReplicaSplit(StrEnum):
    """How the engine spreads an expert's tokens over its replicas; `placement.cost.split` says exactly."""

    EVEN = "even"
    """Loads are shared evenly; a token reads a replica where it already goes, else the first one."""
    NEAREST = "nearest"
    """The replica on the token's home device, else one on its home node (SGLang's static dispatch)."""
    HASH = "hash"
    """One hash of the token's index picks the replica of all of its experts (vLLM)."""
    LP = "lp"
    """In every window the split that makes the fullest device as light as can be (DeepSeek's LPLB)."""


class Risk(StrEnum):
    """How windows are summarised."""

    MEAN = "mean"
    P95 = "p95"
    CVAR95 = "cvar95"

    def summarise(self, value_W: npt.NDArray[np.float64]) -> float:
        """Return the mean, the 95th percentile, or the mean of the worst 5 % of windows."""
        if self is Risk.MEAN:
            return float(value_W.mean())
        if self is Risk.P95:
            return float(np.quantile(value_W, 0.95))
        worst = max(1, round(0.05 * value_W.size))
        return float(np.sort(value_W)[-worst:].mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementProblem:
    """A placement problem, complete and consistent.

    Build it with `make_problem`, which derives the slots and checks memory.

    Parameters
    ----------
    profile, topology, model
        Traffic, cluster, and model sizes (None where no cost depends on them).
    device_of_slot_S
        Slots that a placement may fill, ``[slots]``, in device order.
    semantics, objective, risk, calibration
        What costs, and what is minimised.
    replica_split
        How the engine spreads an expert's tokens over its replicas.
    max_imbalance
        For the traffic objective: largest allowed fullest device / mean device of each layer's summed
        load, 1 or more.

    Raises
    ------
    InputError
        If the pieces do not fit together.
    """

    profile: RoutingProfile
    topology: Topology
    device_of_slot_S: IntArray
    model: ModelShape | None = None
    semantics: Semantics = Semantics.DISPATCH
    objective: Objective = Objective.STEP_TIME
    risk: Risk = Risk.MEAN
    calibration: Calibration = DATA_SHEET
    replica_split: ReplicaSplit = ReplicaSplit.EVEN
    max_imbalance: float = 1.05

    def __post_init__(self) -> None:
        slots = np.sort(np.asarray(self.device_of_slot_S, dtype=np.int64))
        slots.setflags(write=False)
        object.__setattr__(self, "device_of_slot_S", slots)
        # A plain string would pass for a split that it is not: the compiled loops go by identity.
        object.__setattr__(self, "replica_split", _choice(ReplicaSplit, self.replica_split, "replica split"))
        if not (np.isfinite(self.max_imbalance) and self.max_imbalance >= 1):
            raise InputError(f"max_imbalance is {self.max_imbalance}; it must be 1 or more")
        self._check_traffic()
        self._check_homes()
        self._check_split()
        if self.model is not None:
            _check_model(self.model, self.profile)

    def _check_traffic(self) -> None:
        needs_tokens = self.semantics is Semantics.STAY_PUT or (
            self.semantics is Semantics.DISPATCH and self.objective is not Objective.BALANCE
        )
        if needs_tokens and self.profile.num_sampled_tokens == 0:
            raise InputError(
                f"the trace has expert counts only, which cannot serve {self.semantics} {self.objective}; "
                "use --objective balance, or --semantics dispatch-nodedup or allgather"
            )
        if self.objective is Objective.TRAFFIC and self.semantics in (
            Semantics.ALLGATHER,
            Semantics.DISPATCH_NODEDUP,
        ):
            raise InputError(
                f"under {self.semantics} no placement changes the traffic; use --objective balance or "
                "step-time"
            )
        if self.objective is Objective.TRAFFIC and self.risk is not Risk.MEAN:
            raise InputError("the traffic objective is a mean; --risk goes with step-time or balance")

    def _check_homes(self) -> None:
        home_T = self.profile.home_T
        if home_T is not None and int(home_T.max()) >= self.num_devices:
            raise InputError(
                f"tokens of the trace live on device {int(home_T.max())}, the topology has {self.num_devices}"
            )

    def _check_split(self) -> None:
        if self.replica_split is ReplicaSplit.NEAREST and self.profile.home_T is None:
            raise InputError(
                "replica split nearest goes by the tokens' home devices, and the trace knows none; "
                "use --replica-split even, hash or lp"
            )
        if self.replica_split is ReplicaSplit.HASH and self.profile.num_sampled_tokens == 0:
            raise InputError(
                "replica split hash goes by the tokens, and the trace has expert counts only; "
                "use --replica-split even or lp"
            )

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.profile.num_layers

    @property
    def num_experts(self) -> int:
        """Logical experts per layer."""
        return self.profile.num_experts

    @property
    def num_devices(self) -> int:
        """Devices of the topology."""
        return self.topology.num_devices

    @property
    def num_slots(self) -> int:
        """Slots per layer."""
        return int(self.device_of_slot_S.size)

    @property
    def slots_D(self) -> IntArray:
        """Slots of each device, ``[devices]``."""
        return np.bincount(self.device_of_slot_S, minlength=self.num_devices).astype(np.int64)

    @property
    def unit(self) -> str:
        """Unit of the objective."""
        if self.objective is Objective.STEP_TIME:
            return self.calibration.unit
        if self.objective is Objective.BALANCE:
            return "max/mean"
        return "hops/token" if self.semantics is Semantics.STAY_PUT else "devices/token"

    @property
    def layers_are_coupled(self) -> bool:
        """Whether what a layer costs depends on where its neighbours' experts are."""
        return self.semantics is Semantics.STAY_PUT and self.objective is not Objective.BALANCE

    def one_layer(self, layer: int, *, profile: RoutingProfile | None = None) -> PlacementProblem:
        """Return the problem of one layer alone: the same windows and slots.

        Where layers are separate its objective is the layer's term of the whole objective.

        Parameters
        ----------
        profile
            Traffic of all layers to take the layer from; the problem's own by default.
        """
        whole, model = self.profile if profile is None else profile, self.model
        tokens = None if whole.experts_TLK is None else whole.experts_TLK[:, [layer]]
        alone = replace(whole, load_WLE=whole.load_WLE[:, [layer]], experts_TLK=tokens)
        if model is not None:
            model = replace(model, num_layers=1, moe_layer_ids=(), num_decoder_layers=0)
        return replace(self, profile=alone, model=model)

    def with_profile(self, profile: RoutingProfile) -> PlacementProblem:
        """Return the same problem on other traffic."""
        return replace(self, profile=profile)

    def check_placement(self, placement: Placement) -> None:
        """Verify that a placement answers this problem.

        Raises
        ------
        InputError
            If its layers, experts or devices differ from the problem's. Slots may differ: see
            `check_capacity`.
        """
        for name, mine, its in (
            ("MoE layers", self.num_layers, placement.num_layers),
            ("experts", self.num_experts, placement.num_experts),
            ("devices", self.num_devices, placement.num_devices),
        ):
            if mine != its:
                raise InputError(f"the placement has {its} {name}, the problem {mine}")
        placement.check()

    def check_capacity(self, placement: Placement) -> None:
        """Verify that no device holds more experts than this problem gives it slots.

        Raises
        ------
        InfeasibleError
            Naming layer, device and both numbers.
        """
        held_LD = placement.count_LED.sum(axis=1, dtype=np.int64)
        over = held_LD > self.slots_D
        if over.any():
            layer, device = (int(i[0]) for i in np.nonzero(over))
            raise InfeasibleError(
                f"layer {layer} puts {held_LD[layer, device]} experts on device {device}, which has "
                f"{self.slots_D[device]} slots"
            )


def _check_model(model: ModelShape, profile: RoutingProfile) -> None:
    for what, its, seen in (
        ("MoE layers", model.num_layers, profile.num_layers),
        ("experts", model.num_experts, profile.num_experts),
        ("experts per token", model.top_k, profile.top_k),
    ):
        if its != seen:
            raise InputError(f"model {model.name} has {its} {what}, the trace {seen}; name another --model")


def _slots(profile: RoutingProfile, topology: Topology, spare_slots: int) -> IntArray:
    """Device of each slot: the topology's own limits, or equal shares of experts + spare slots."""
    wanted = profile.num_experts + spare_slots
    if topology.slots_D is None:
        return equal_slots(wanted, topology.num_devices)
    limits_D = topology.slots_D
    if int(limits_D.sum()) < profile.num_experts:
        raise InfeasibleError(
            f"{profile.num_experts} experts do not fit the topology's {int(limits_D.sum())} slots per layer; "
            f"{profile.num_experts - int(limits_D.sum())} are missing"
        )
    return np.repeat(np.arange(topology.num_devices, dtype=np.int64), limits_D)


def _slots_from_memory(model: ModelShape | None, profile: RoutingProfile, topology: Topology) -> IntArray:
    """Device of each slot when every device takes the experts that its memory holds, each at most once."""
    if model is None:
        raise InputError(
            "slots follow from memory only where the model's sizes are known; name it with --model"
        )
    copy_bytes = model.num_layers * model.bytes_per_expert()
    fits_D = topology.expert_memory_bytes_D // copy_bytes
    slots_D = np.minimum(fits_D, profile.num_experts).astype(np.int64)
    missing = profile.num_experts - int(slots_D.sum())
    if missing > 0:
        raise InfeasibleError(
            f"memory holds {int(slots_D.sum())} of {profile.num_experts} experts per layer: one expert in "
            f"all {model.num_layers} layers of {model.name} ({model.weight_dtype}) takes "
            f"{copy_bytes / GIB:.2f} GiB; {missing} experts are missing, {missing * copy_bytes / GIB:.1f} GiB"
        )
    return np.repeat(np.arange(topology.num_devices, dtype=np.int64), slots_D)


def _check_memory(model: ModelShape, topology: Topology, slots_D: IntArray) -> None:
    # Weights only: what attention, caches and activations need is the caller's to take off memory_gib.
    need_D = slots_D * float(model.num_layers * model.bytes_per_expert())
    missing_D = need_D - topology.expert_memory_bytes_D
    if (missing_D > 0).any():
        device = int(missing_D.argmax())
        raise InfeasibleError(
            f"{slots_D[device]} experts x {model.num_layers} layers of {model.name} ({model.weight_dtype}) "
            f"need {need_D[device] / GIB:.1f} GiB on device {device}, which has "
            f"{topology.expert_memory_bytes_D[device] / GIB:.1f} GiB: {missing_D[device] / GIB:.1f} GiB are "
            "missing; use more devices, fewer spare slots or a smaller weight type"
        )


def _choice(kind: type[_Choice], name: str, what: str) -> _Choice:
    try:
        return kind(name)
    except ValueError as exc:
        known = [str(choice) for choice in kind]
        raise InputError(f"unknown {what} {name!r}; {did_you_mean(name, known)}") from exc


def make_problem(
    profile: RoutingProfile,
    topology: Topology,
    *,
    model: ModelShape | None = None,
    semantics: Semantics | str = Semantics.DISPATCH,
    objective: Objective | str = Objective.STEP_TIME,
    risk: Risk | str = Risk.MEAN,
    calibration: Calibration | None = None,
    replica_split: ReplicaSplit | str = ReplicaSplit.EVEN,
    spare_slots: int = 0,
    slots_from_memory: bool = False,
    max_imbalance: float = 1.05,
    device_of_slot_S: IntArray | None = None,
) -> PlacementProblem:
    """Build a problem: derive the slots, check that experts and weights fit.

    Parameters
    ----------
    spare_slots
        Slots per layer beyond one per expert, over all devices; replicas fill them or they stay empty.
        Ignored where the topology names each device's slots.
    slots_from_memory
        Give every device as many slots as its memory holds experts over all layers, at most one per expert;
        devices of different memory get different numbers. Needs `model`, goes without `spare_slots`, and is
        ignored where the topology names each device's slots.
    device_of_slot_S
        Slots to use instead, ``[slots]``: those of a placement that is to be evaluated.

    Raises
    ------
    InputError
        If the pieces do not fit together.
    InfeasibleError
        If slots or memory do not hold the experts, with the numbers.
    """
    if spare_slots < 0:
        raise InputError(f"spare_slots is {spare_slots}; it must be 0 or more")
    if slots_from_memory and spare_slots:
        raise InputError(
            f"spare_slots is {spare_slots}, and slots_from_memory fills the memory already; leave one out"
        )
    if device_of_slot_S is not None:
        slots = device_of_slot_S
    elif slots_from_memory and topology.slots_D is None:
        slots = _slots_from_memory(model, profile, topology)
    else:
        slots = _slots(profile, topology, spare_slots)
    if slots.max() >= topology.num_devices:
        raise InputError(
            f"the placement has slots on {int(slots.max()) + 1} devices, the topology {topology.num_devices}"
        )
    slots_D = np.bincount(slots, minlength=topology.num_devices).astype(np.int64)
    if model is not None:
        _check_memory(model, topology, slots_D)
    problem = PlacementProblem(
        profile=profile,
        topology=topology,
        device_of_slot_S=slots,
        model=model,
        semantics=_choice(Semantics, semantics, "semantics"),
        objective=_choice(Objective, objective, "objective"),
        risk=_choice(Risk, risk, "risk"),
        calibration=DataSheetCalibration() if calibration is None else calibration,
        replica_split=_choice(ReplicaSplit, replica_split, "replica split"),
        max_imbalance=max_imbalance,
    )
    if problem.objective is Objective.STEP_TIME:
        # Fail now rather than in the solver if the costs need sizes that nobody gave.
        problem.calibration.expert_curve(topology.kinds[0], model)
    return problem
