"""vLLM plugin: our balancer, or a placement made offline, as vLLM's own expert load balancing policy.

vLLM loads functions of the entry point group ``vllm.general_plugins`` in every process. Ours takes the place
of the policy named ``default``, which ``--enable-eplb`` brings to life; weights are moved by vLLM.
Installing the package changes nothing: one of these variables has to ask for it.

===================================  =====================================================================
``MOE_PLACEMENT_VLLM_PLACEMENT``     A placement file, ours or an engine's: put in place at the first
                                     rebalance, and kept
``MOE_PLACEMENT_VLLM_MAX_MOVES``     Without a file: most expert copies that a rebalance may move, over all
                                     layers
``MOE_PLACEMENT_VLLM``               ``on`` balances without either; ``off`` leaves vLLM as it is whatever
                                     else is set
===================================  =====================================================================

Versions of vLLM are told apart by what their policy looks like, and one that looks unknown is left alone.
Whatever cannot be done ends in a line of vLLM's log and in vLLM's own policy, never in an exception: a server
with less even experts is better than none.

Shape letters: L MoE layers, E logical experts, R physical slots, G ranks.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError, PlacementError

__all__ = ["MAX_MOVES", "PLACEMENT", "SWITCH", "register"]

PLACEMENT = "MOE_PLACEMENT_VLLM_PLACEMENT"
MAX_MOVES = "MOE_PLACEMENT_VLLM_MAX_MOVES"
SWITCH = "MOE_PLACEMENT_VLLM"

_ON, _OFF = ("on", "1", "true", "yes"), ("off", "0", "false", "no")

POLICIES = "vllm.distributed.eplb.policy"

IntArray = npt.NDArray[np.int64]

# A child of vLLM's logger, or its processes would show none of it.
_log = logging.getLogger("vllm.plugins.moe_placement")

_FOREIGN = (
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    LookupError,
    OSError,
)
"""What unknown code may raise when it is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What the environment asks for."""

    placement: Path | None
    max_moves: int | None

    @classmethod
    def of_environment(cls) -> _Settings | None:
        """Return the settings, None where nothing asks for the plugin or it is switched off.

        Raises
        ------
        InputError
            If the switch or the number of moves is none.
        """
        switch = os.environ.get(SWITCH, "").strip().lower()
        path, moves = os.environ.get(PLACEMENT, ""), os.environ.get(MAX_MOVES, "").strip()
        if switch not in ("", *_ON, *_OFF):
            raise InputError(f"{SWITCH} is {switch!r}; it must be on or off")
        if switch in _OFF or not (switch or path or moves):
            return None
        if moves and not (moves.isascii() and moves.isdigit()):
            raise InputError(f"{MAX_MOVES} is {moves!r}; it must be a whole number of 0 or more")
        return cls(placement=Path(path) if path else None, max_moves=int(moves) if moves else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One request of vLLM's."""

    weight: Any
    num_replicas: int
    num_groups: int
    num_nodes: int
    num_ranks: int
    old_LR: IntArray | None

    @classmethod
    def of(cls, given: dict[str, Any]) -> _Call:
        """Read the arguments by name; the number of ranks has had two names."""
        old = given.get("old_global_expert_indices")
        return cls(
            weight=given["weight"],
            num_replicas=int(given["num_replicas"]),
            num_groups=int(given["num_groups"]),
            num_nodes=int(given["num_nodes"]),
            num_ranks=int(given["num_ranks"] if "num_ranks" in given else given["num_gpus"]),
            old_LR=None if old is None else np.asarray(old.detach().cpu().numpy(), dtype=np.int64),
        )


def register() -> None:
    """Put our policy in the place of vLLM's ``default``; does nothing the second time."""
    try:
        settings = _Settings.of_environment()
        if settings is None:
            return
        policies = import_module(POLICIES).EPLB_POLICIES
        if not isinstance(policies, MutableMapping):
            raise TypeError("its policies are no dictionary")
        theirs = policies["default"]
        if getattr(theirs, "is_moe_placement", False):
            return
        policies["default"] = _policy_of(theirs, settings)
    except _FOREIGN as exc:
        _log.warning("moe-placement leaves vLLM's expert load balancing alone: %s", _reason(exc))
        return
    what = (
        f"keeps the placement of {settings.placement}" if settings.placement else "balances by its own means"
    )
    _log.info("moe-placement is the expert load balancing policy: it %s", what)


def _reason(exc: BaseException) -> str:
    return " ".join(f"{type(exc).__name__}: {exc}".split())


def _policy_of(theirs: Any, settings: _Settings) -> type:
    """Derive a policy from vLLM's own, which answers where ours cannot.

    Raises
    ------
    TypeError
        If vLLM's policy is of no kind that is known here.
    """
    signature = _signature_of(theirs)
    wrap = _result_of(theirs, signature)

    def rebalance_experts(cls: type, *args: Any, **kwargs: Any) -> Any:
        """Place the experts; see `register`."""
        bound = signature.bind(*args, **kwargs)
        try:
            call = _Call.of(bound.arguments)
            map_LR = _kept(call, settings.placement) if settings.placement else _balanced(call, settings)
        except (PlacementError, *_FOREIGN) as exc:
            # A serving engine must go on, whatever it has passed.
            _warn_once(f"moe-placement cannot place the experts, vLLM's own policy does: {_reason(exc)}")
            return theirs.rebalance_experts(*args, **kwargs)
        return wrap(map_LR, int(call.weight.shape[1]))

    body = {"is_moe_placement": True, "rebalance_experts": classmethod(rebalance_experts)}
    return type("MoePlacementPolicy", (theirs,), body)


def _signature_of(theirs: Any) -> inspect.Signature:
    """Return what vLLM's policy takes."""
    kind: object = theirs
    if not isinstance(kind, type):
        raise TypeError(f"its default policy is a {type(theirs).__name__}, not a class")
    signature = inspect.signature(theirs.rebalance_experts)
    names = set(signature.parameters)
    needed = {"weight", "num_replicas", "num_groups", "num_nodes"}
    if not needed <= names or not names & {"num_ranks", "num_gpus"}:
        raise TypeError(f"its rebalance_experts takes {', '.join(signature.parameters)}")
    return signature


def _result_of(theirs: Any, signature: inspect.Signature) -> Callable[[IntArray, int], Any]:
    """Find out what vLLM expects back, by asking its own policy for two experts on one rank."""
    import torch

    known = {
        "weight": torch.ones(1, 2),
        "num_replicas": 2,
        "num_groups": 1,
        "num_nodes": 1,
        "num_ranks": 1,
        "num_gpus": 1,
        "old_global_expert_indices": torch.tensor([[0, 1]]),
    }
    answer = theirs.rebalance_experts(**{name: known[name] for name in signature.parameters if name in known})
    if isinstance(answer, torch.Tensor):
        return lambda map_LR, num_experts: torch.from_numpy(map_LR)
    if isinstance(answer, tuple) and len(answer) == 3:
        return _three_maps
    raise TypeError(f"its policy answers with a {type(answer).__name__}")


def _three_maps(map_LR: IntArray, num_experts: int) -> tuple[Any, Any, Any]:
    """Return the maps of older versions: slots, slots of each expert, replicas of each expert."""
    import torch

    from placement.solvers.replicas import logical_to_physical

    slots_LEX, count_LE = logical_to_physical(map_LR, num_experts)
    return torch.from_numpy(map_LR), torch.from_numpy(slots_LEX), torch.from_numpy(count_LE)


# ------------------------------------------------------------------------------------------------ the answers


def _balanced(call: _Call, settings: _Settings) -> IntArray:
    """Balance the loads, moving little away from where things are."""
    from placement.rebalance import rebalance_experts

    shape = (int(call.weight.shape[0]), call.num_replicas)
    whole = call.old_LR is not None and _is_whole(
        call.old_LR, shape, int(call.weight.shape[1]), call.num_ranks
    )
    map_LR, _, _ = rebalance_experts(
        call.weight.detach().cpu().double().numpy(),
        call.num_replicas,
        call.num_groups,
        call.num_nodes,
        call.num_ranks,
        previous=call.old_LR if whole else None,
        max_moves=settings.max_moves if whole else None,
    )
    return np.ascontiguousarray(map_LR, dtype=np.int64)


def _is_whole(old_LR: IntArray, shape: tuple[int, int], num_experts: int, num_ranks: int) -> bool:
    """Whether a map has every expert and no rank holds one twice.

    vLLM's own policy makes duplicates, and a change of the number of ranks leaves holes.
    """
    if old_LR.shape != shape or shape[1] % num_ranks or old_LR.min() < 0 or old_LR.max() >= num_experts:
        return False
    sorted_LGS = np.sort(old_LR.reshape(shape[0], num_ranks, -1), axis=2)
    covered = all(np.unique(row_R).size == num_experts for row_R in old_LR)
    return covered and not (np.diff(sorted_LGS, axis=2) == 0).any()


def _kept(call: _Call, path: Path) -> IntArray:
    """Return the placement of a file; what stays on a rank stays in its slot."""
    wanted_LR = _load(path, call.num_ranks)
    shape = (int(call.weight.shape[0]), call.num_replicas)
    num_experts = int(call.weight.shape[1])
    if wanted_LR.shape != shape or int(wanted_LR.max()) + 1 != num_experts:
        raise InputError(
            f"{path}: places {int(wanted_LR.max()) + 1} experts in {wanted_LR.shape[1]} slots of "
            f"{wanted_LR.shape[0]} layers, the engine runs {num_experts} in {shape[1]} of {shape[0]}; "
            "num_redundant_experts must be slots minus experts"
        )
    if call.old_LR is None or not _is_whole(call.old_LR, shape, num_experts, call.num_ranks):
        return wanted_LR.copy()
    return _in_old_slots(wanted_LR, call.old_LR, call.num_ranks)


@cache
def _load(path: Path, num_ranks: int) -> IntArray:
    """Read the placement once, ``[layers, slots]`` rank by rank."""
    from placement.formats.files import read_placement_file
    from placement.formats.fill import full
    from placement.formats.protocol import FormatOptions
    from placement.formats.rules import by_device

    placement = read_placement_file(path, FormatOptions(num_devices=num_ranks))
    if placement.num_devices != num_ranks:
        raise InputError(f"{path}: is for {placement.num_devices} devices, the engine runs {num_ranks}")
    try:
        return by_device(full(placement), target="vLLM")
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc


def _in_old_slots(wanted_LR: IntArray, old_LR: IntArray, num_ranks: int) -> IntArray:
    """Order each rank's experts so that those it holds already keep their slot."""
    slots = wanted_LR.shape[1] // num_ranks
    kept = np.empty_like(wanted_LR)
    rows = zip(kept.reshape(-1, slots), wanted_LR.reshape(-1, slots), old_LR.reshape(-1, slots), strict=True)
    for kept_S, wanted_S, old_S in rows:
        stays_S = np.isin(old_S, wanted_S)
        kept_S[stays_S] = old_S[stays_S]
        kept_S[~stays_S] = wanted_S[~np.isin(wanted_S, old_S)]
    return kept


@cache
def _warn_once(message: str) -> None:
    # Rebalances come every few minutes for as long as the server runs.
    _log.warning("%s", message)
