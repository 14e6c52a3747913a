"""From a plan file and a trace to a plan for a mixed cluster.

Shape letters: T tokens, L MoE layers, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement._fields import Fields
from placement.errors import InputError

if TYPE_CHECKING:
    from placement.devices import DeviceKind
    from placement.model import ModelShape
    from placement.planning.hetero import DeviceClass, HeteroJob, HeteroPlan, ZebraGroup
    from placement.planning.transformer import TransformerShape
    from placement.tasks.plan_spec import PlanSpec

__all__ = ["HeteroQuestion", "plan_hetero_from", "question_of"]

FloatArray = npt.NDArray[np.float64]

GIB, GBIT = 2.0**30, 1e9 / 8

TRAINING_BYTES = 16.0
"""Bytes per weight in training: weights and gradients of 16 bits, master weights and moments of 32."""

NO_FLASH_KINDS = ("v100", "v100-32", "t4")
"""Presets that FlashAttention does not support (it needs Ampere or newer)."""

WINDOW_TOKENS = 4096
"""Tokens of a stretch of the trace; every other stretch is planned for, those between judge the plan."""

_KEYS = (
    "classes",
    "model",
    "transformer",
    "sequence_length",
    "tokens_per_step",
    "micro_batches",
    "backward",
    "bytes_per_weight",
    "attention_gib",
    "activation_gib",
    "exchange",
    "roles",
    "trace",
)

_REQUIRED = ("classes", "model", "transformer", "sequence_length", "tokens_per_step")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeteroQuestion:
    """What a file asks, complete.

    Parameters
    ----------
    classes, job, groups
        As `plan_hetero` takes them.
    held_out_LE
        Loads to judge the plan by, ``[layers, experts]``; None without a trace.
    """

    classes: list[DeviceClass]
    job: HeteroJob
    groups: list[ZebraGroup] | None
    held_out_LE: FloatArray | None


def question_of(spec: PlanSpec, *, trace: str | None = None) -> HeteroQuestion:
    """Return what a file asks, for its own trace or another; even loads without any.

    Parameters
    ----------
    spec
        The file; `examples/plans/hetero.yaml` explains its keys.
    trace
        Routing instead of the file's own.

    Raises
    ------
    InputError
        If the file or the trace is wrong, or they do not fit each other.
    """
    given = spec.fields(known=_KEYS, required=_REQUIRED)
    model = spec.model(given.raw("model"))
    transformer = spec.transformer(given.raw("transformer"), model=model)
    classes = _classes(spec, given, transformer)
    source = trace or (spec.found(given.text("trace") or "") if "trace" in given else None)
    groups = _roles(spec, given, classes) if "roles" in given else None
    fit_LE, held_out_LE = np.ones((model.num_layers, model.num_experts)), None
    if source is not None:
        fit_LE, held_out_LE = _loads(source, model)
    job = _job(given, transformer, fit_LE)
    return HeteroQuestion(classes=classes, job=job, groups=groups, held_out_LE=held_out_LE)


def plan_hetero_from(spec: PlanSpec, *, trace: str | None = None) -> HeteroPlan:
    """Plan what a file describes; see `question_of`.

    Raises
    ------
    InputError
        If the file or the trace is wrong, or they do not fit each other.
    InfeasibleError
        If memory holds the model under no roles.
    """
    from placement.planning.hetero import plan_hetero

    asked = question_of(spec, trace=trace)
    return plan_hetero(asked.classes, asked.job, groups=asked.groups, held_out_LE=asked.held_out_LE)


def _classes(spec: PlanSpec, given: Fields, transformer: TransformerShape) -> list[DeviceClass]:
    values = enumerate(given.items("classes"))
    length = given.integer("sequence_length") or 1
    return [_device_class(value, f"classes[{at}]", spec, transformer, length) for at, value in values]


def _device_class(
    value: object, place: str, spec: PlanSpec, transformer: TransformerShape, length: int
) -> DeviceClass:
    from placement.planning.hetero import NO_FLASH_PENALTY, class_from_sheet

    known = ("name", "kind", "count", "tflops", "memory_gib", "nic_gbits", "score_penalty", "measured")
    entry = Fields(value, source=spec.source, place=place, known=known, required=("kind", "count"))
    kind = _kind(entry)
    default = NO_FLASH_PENALTY if kind.name in NO_FLASH_KINDS else 1.0
    its = class_from_sheet(
        kind,
        count=entry.integer("count") or 1,
        transformer=transformer,
        sequence_length=length,
        score_penalty=entry.number("score_penalty") or default,
        name=entry.text("name") or kind.name,
        memory_bytes=int((entry.number("memory_gib") or 0.0) * GIB),
        bandwidth=(entry.number("nic_gbits") or 0.0) * GBIT,
    )
    if "measured" not in entry:
        return its
    return _measured(its, Fields(
        entry.raw("measured"), source=spec.source, place=f"{place}.measured",
        known=("tokens", "attention_ms", "experts_ms", "head_ms"),
        required=("tokens", "attention_ms", "experts_ms"),
    ))  # fmt: skip


def _kind(entry: Fields) -> DeviceKind:
    from placement.devices import device_kind

    try:
        kind = device_kind(entry.text("kind") or "")
    except InputError as exc:
        raise InputError(f"{entry.source}: {entry.at('kind')}: {exc}") from exc
    tflops = entry.number("tflops")
    return kind if tflops is None else replace(kind, measured_flops=tflops * 1e12)


def _measured(its: DeviceClass, given: Fields) -> DeviceClass:
    """Return the class with measured times instead of computed ones."""
    tokens = given.number("tokens") or 1.0
    attention, experts, head = (
        given.number(f"{part}_ms", zero=part == "head") for part in ("attention", "experts", "head")
    )
    return replace(
        its,
        attention_s=(attention or 0.0) * 1e-3 / tokens,
        expert_s=(experts or 0.0) * 1e-3 / tokens,
        head_s=its.head_s if head is None else head * 1e-3 / tokens,
    )


def _job(given: Fields, transformer: TransformerShape, load_LE: FloatArray) -> HeteroJob:
    from placement.planning.hetero import HeteroJob
    from placement.tier import ACROSS_EFFICIENCY, ACROSS_LATENCY_S

    model = transformer.moe
    training = given.number("backward", zero=True)
    backward = 2.0 if training is None else training
    per_weight = given.number("bytes_per_weight") or (TRAINING_BYTES if backward else 2.0)
    weights = transformer.attention_params * transformer.num_layers + 2.0 * (
        transformer.vocabulary_size * model.hidden_size
    )
    weights += transformer.shared_expert_params() * model.num_layers
    attention_gib = given.number("attention_gib", zero=True)
    exchange = Fields(
        given.raw("exchange") or {},
        source=given.source,
        place="exchange",
        known=("dispatch_us", "combine_us", "efficiency", "free_bytes"),
    )
    efficiency = exchange.number("efficiency") or ACROSS_EFFICIENCY
    if efficiency > 1:
        raise exchange.wrong("efficiency", "a share of the bandwidth, up to 1")
    free = exchange.raw("free_bytes") or False
    if not isinstance(free, bool):
        raise exchange.wrong("free_bytes", "true or false")
    latency = [exchange.number(f"{way}_us", zero=True) for way in ("dispatch", "combine")]
    latency_s = [ACROSS_LATENCY_S if value is None else value * 1e-6 for value in latency]
    return HeteroJob(
        load_LE=load_LE,
        tokens_per_step=given.number("tokens_per_step") or 1.0,
        micro_batches=_micro_batches(given),
        backward=backward,
        expert_bytes=int(model.params_per_expert * per_weight),
        attention_bytes=int(weights * per_weight if attention_gib is None else attention_gib * GIB),
        activation_bytes=int((given.number("activation_gib", zero=True) or 0.0) * GIB),
        token_bytes=0.0 if free else model.top_k * model.token_bytes() / efficiency,
        dispatch_latency_s=latency_s[0],
        combine_latency_s=latency_s[1],
    )


def _micro_batches(given: Fields) -> tuple[int, ...]:
    numbers = given.integers("micro_batches") or [4, 8]
    if min(numbers) < 1 or max(numbers) > 1024:
        raise given.wrong("micro_batches", "a list of numbers from 1 to 1024")
    return tuple(numbers)


def _roles(spec: PlanSpec, given: Fields, classes: list[DeviceClass]) -> list[ZebraGroup]:
    from placement.planning.hetero import ZebraGroup

    roles = Fields(
        given.raw("roles"), source=spec.source, place="roles", known=("groups", "attention", "experts"),
        required=("attention", "experts"),
    )  # fmt: skip
    sides = {}
    for side in ("attention", "experts"):
        counts = roles.mapping(side)
        entry = Fields(counts, source=spec.source, place=f"roles.{side}", known=[its.name for its in classes])
        sides[side] = tuple(entry.integer(its.name, minimum=0) or 0 for its in classes)
    try:
        return [
            ZebraGroup(
                classes=tuple(classes),
                attention=sides["attention"],
                experts=sides["experts"],
                num_groups=roles.integer("groups") or 1,
            )
        ]
    except InputError as exc:
        raise InputError(f"{spec.source}: roles: {exc}") from exc


def _loads(trace: str, model: ModelShape) -> tuple[FloatArray, FloatArray | None]:
    """Return the loads of every other stretch of a trace, and of those between, ``[layers, experts]``."""
    from placement.tasks.plan_spec import read_traffic

    read = read_traffic(trace)
    about = read.origin
    found = {"layers": about.num_layers, "experts": about.num_experts, "top-k": about.top_k}
    wanted = {"layers": model.num_layers, "experts": model.num_experts, "top-k": model.top_k}
    for name, value in found.items():
        if value != wanted[name]:
            raise InputError(f"{trace}: {name} is {value}, model {model.name!r} has {wanted[name]}")
    stretch_T = np.arange(len(read.experts_TLK)) // WINDOW_TOKENS
    halves = [_counted(read.experts_TLK[stretch_T % 2 == half], model.num_experts) for half in (0, 1)]
    if halves[1].sum() == 0:
        return halves[0], None
    return halves[0], halves[1]


def _counted(experts_TLK: npt.NDArray[np.unsignedinteger], num_experts: int) -> FloatArray:
    layers = range(experts_TLK.shape[1])
    counts = [np.bincount(experts_TLK[:, layer].ravel(), minlength=num_experts) for layer in layers]
    return np.stack(counts).astype(np.float64)
