"""Reads what a measured calibration file holds; every error names the key and how to mend it.

Needed: ``world_size``, ``expert_ffn_ms`` (for each model a list of ``tokens_per_expert, local_experts, ms``
and, where not all experts had tokens, ``active_experts``) and ``all_to_all_ms_by_MiB_sent_per_rank``
(``[MiB, ms]``, the part that stays at home included).

Used where present: ``gpu``, ``dtype``, ``devices_per_node``, ``all_to_all_ms_by_tier`` and ``tier_ranks``
(curves of other tiers, and how many ranks took part), ``expert_shapes`` (``hidden, expert_hidden,
matrices`` of labels that are no presets), ``hbm_gb_s`` (a copy, bytes read and written), ``prepare_ms,
unpermute_ms, expand_ms, reduce_ms`` (lists of ``rows, hidden, ms``), ``launch_ms``, ``counts_exchange_ms``,
``migration_gb_s``. Anything else is ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from placement._fields import as_number, brief
from placement.calibration.curve import PiecewiseLinear, rising_curve
from placement.calibration.machine import ROW_STEPS, Machine
from placement.calibration.measured import NODE_TIER, ExpertTimes, MeasuredCalibration
from placement.errors import InputError
from placement.model import preset_model
from placement.model_shape import ModelShape, bits_per_weight, canonical_dtype

__all__ = ["ALL_TO_ALL", "EXPERTS", "FORMAT", "measured_from_dict"]

FORMAT = "moe-placement-calibration/1"

ALL_TO_ALL = "all_to_all_ms_by_MiB_sent_per_rank"
BY_TIER = "all_to_all_ms_by_tier"
EXPERTS = "expert_ffn_ms"
SHAPES = "expert_shapes"

_LOG = logging.getLogger(__name__)
_MIB = 1024.0 * 1024.0
_LEAST, _MOST = 1e-12, 1e15
_PRESETS = {"dsv3-slice": "deepseek-v3", "qwen3-30b": "qwen3-30b-a3b"}
"""Models whose expert sizes a measurement's label stands for."""


def measured_from_dict(
    values: Mapping[str, Any], *, shapes: Mapping[str, ModelShape] | None = None
) -> MeasuredCalibration:
    """Build a calibration from measured curves.

    Parameters
    ----------
    values
        Contents of the file; keys that are not known are ignored.
    shapes
        Sizes of models by label, for those that the file does not describe.

    Raises
    ------
    InputError
        If keys are missing or wrong.
    """
    if values.get("format", FORMAT) != FORMAT:
        raise InputError(f"format is {brief(values['format'])}; this version reads {FORMAT!r}")
    world = _integer(values.get("world_size"), "world_size", least=None)
    if world < 2:
        raise InputError(f"world_size is {world}; an all-to-all is measured on 2 GPUs or more")
    dtype = _dtype(values.get("dtype", "bfloat16"))
    read = {label: _points(points, label) for label, points in _mapping(values, EXPERTS).items()}
    if not read:
        raise InputError(f"{EXPERTS} names no model; measure at least one")
    params = _params(values, list(read), shapes or {})
    tiers = _tiers(values, world)
    node = tiers.pop(NODE_TIER, None)
    if ALL_TO_ALL in values or node is None:
        # Of all ranks, which are those of one node unless that was measured by itself.
        whole = _exchange(values.get(ALL_TO_ALL), ALL_TO_ALL, ranks=world)
        node = whole if node is None else node
    return MeasuredCalibration(
        experts={label: _expert_times(points, label, params[label]) for label, points in read.items()},
        node_exchange=node,
        tier_exchange=tiers,
        world_size=world,
        machine=_machine(values, dtype=dtype, weights=_weight_speed(read, params, dtype)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """Experts of one rank, timed once."""

    tokens: float
    local: float
    active: float
    seconds: float


def _points(values: Any, label: str) -> list[_Point]:
    place = f"{EXPERTS}[{brief(label)}]"
    items = _items(values, place)
    points = [_point(item, f"{place}[{index}]") for index, item in enumerate(items)]
    seen: set[tuple[float, float]] = set()
    for point in points:
        key = (point.tokens, point.active / point.local)
        if key in seen:
            raise InputError(f"{place} gives {point.tokens:g} tokens per expert twice; keep one of them")
        seen.add(key)
    return points


def _point(item: Any, place: str) -> _Point:
    if not isinstance(item, Mapping):
        raise InputError(f"{place} must be an object with tokens_per_expert, local_experts and ms")
    local = _number(item.get("local_experts"), f"{place}.local_experts")
    active = _number(item.get("active_experts", local), f"{place}.active_experts")
    if active > local:
        raise InputError(f"{place}.active_experts is {active:g} of {local:g} local_experts")
    return _Point(
        tokens=_number(item.get("tokens_per_expert"), f"{place}.tokens_per_expert"),
        local=local,
        active=active,
        seconds=1e-3 * _number(item.get("ms"), f"{place}.ms"),
    )


def _expert_times(points: Sequence[_Point], label: str, params: int | None) -> ExpertTimes:
    shares = sorted({point.active / point.local for point in points})
    curves = []
    for share in shares:
        here = [point for point in points if point.active / point.local == share]
        curves.append(
            _curve(
                [point.tokens for point in here],
                [point.seconds / point.active for point in here],
                f"{EXPERTS}[{brief(label)}]",
                y_at_0=0.0,
            )
        )
    return ExpertTimes(params_per_expert=params, shares=shares, curves=curves)


def _params(
    values: Mapping[str, Any], labels: Sequence[str], shapes: Mapping[str, ModelShape]
) -> dict[str, int | None]:
    """Weights of one expert of each label: as the file says, as the caller says, or of the preset."""
    given = {label: _sizes(sizes, label) for label, sizes in _mapping(values, SHAPES, optional=True).items()}
    params: dict[str, int | None] = {}
    unknown: list[InputError] = []
    for label in labels:
        try:
            known = given.get(label) or (shapes[label].params_per_expert if label in shapes else None)
            params[label] = known or preset_model(_PRESETS.get(label, label)).params_per_expert
        except InputError as exc:
            params[label] = None
            unknown.append(exc)
    if len(unknown) == len(labels):
        raise InputError(f"{EXPERTS}: {unknown[0]}; or give its sizes in {SHAPES}") from unknown[0]
    for label, size in params.items():
        if size is None:
            _LOG.warning(
                "%s of %r is left out: no preset has that name and %s does not tell its sizes",
                EXPERTS,
                label,
                SHAPES,
            )
    return params


def _sizes(sizes: Any, label: str) -> int:
    """Weights of one expert; keys are named as in our model files, or shorter."""
    place = f"{SHAPES}[{brief(label)}]"
    if not isinstance(sizes, Mapping):
        raise InputError(f"{place} must be an object with hidden, expert_hidden and matrices")
    factors = []
    for short, long, default in (
        ("hidden", "hidden_size", None),
        ("expert_hidden", "expert_hidden_size", None),
        ("matrices", "matrices_per_expert", 3),
    ):
        factors.append(_integer(sizes.get(short, sizes.get(long, default)), f"{place}.{short}"))
    return factors[0] * factors[1] * factors[2]


def _weight_speed(
    read: Mapping[str, Sequence[_Point]], params: Mapping[str, int | None], dtype: str
) -> float | None:
    """Fastest reading of weights: whatever the load, those of the active experts were read in that time."""
    speeds = [
        point.active * size * bits_per_weight(dtype) / 8 / point.seconds
        for label, points in read.items()
        if (size := params[label]) is not None
        for point in points
    ]
    return max(speeds, default=None)


def _tiers(values: Mapping[str, Any], world: int) -> dict[str, PiecewiseLinear]:
    """Curve of each tier, against bytes received from other ranks.

    Inside a node as many ranks take part as ``devices_per_node`` says, across tiers one of each node.
    """
    per_node = _integer(values.get("devices_per_node", world), "devices_per_node")
    ranks = _mapping(values, "tier_ranks", optional=True)
    curves = {}
    for tier, curve in _mapping(values, BY_TIER, optional=True).items():
        usual = per_node if tier == NODE_TIER else max(world // per_node, 2)
        taking_part = _integer(ranks.get(tier, usual), f"tier_ranks[{brief(tier)}]", least=2)
        curves[tier] = _exchange(curve, f"{BY_TIER}[{brief(tier)}]", ranks=taking_part)
    return curves


def _exchange(values: Any, place: str, *, ranks: int) -> PiecewiseLinear:
    pairs = [_pair(item, f"{place}[{index}]") for index, item in enumerate(_items(values, place))]
    sizes = [size for size, _ in pairs]
    if len(set(sizes)) < len(sizes):
        raise InputError(f"{place} gives a size twice; its sizes must ascend from 0 or more")
    # An even all-to-all keeps 1 / ranks of each rank's buffer at home.
    received = [size * _MIB * (ranks - 1) / ranks for size in sizes]
    return _curve(received, [1e-3 * ms for _, ms in pairs], place, y_at_0=None)


def _pair(item: Any, place: str) -> tuple[float, float]:
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise InputError(f"{place} must be [MiB, ms], not {brief(item)}")
    return _number(item[0], f"{place}[0]", zero=True), _number(item[1], f"{place}[1]")


def _machine(values: Mapping[str, Any], *, dtype: str, weights: float | None) -> Machine:
    migration = _mapping(values, "migration_gb_s", optional=True)
    return Machine(
        gpu=str(values.get("gpu", "unknown GPU")),
        dtype=dtype,
        copy_bytes_per_s=_figure(values, "hbm_gb_s", 1e9),
        weights_bytes_per_s=weights,
        launch_s=_figure(values, "launch_ms", 1e-3),
        counts_exchange_s=_figure(values, "counts_exchange_ms", 1e-3),
        row_steps={step: _row_step(values, f"{step}_ms") for step in ROW_STEPS if values.get(f"{step}_ms")},
        migration_bytes_per_s={
            tier: 1e9 * _number(rate, f"migration_gb_s[{brief(tier)}]") for tier, rate in migration.items()
        },
    )


def _figure(values: Mapping[str, Any], key: str, unit: float) -> float | None:
    """One number in our units, None where it was not measured."""
    value = values.get(key)
    return None if value is None else unit * _number(value, key)


def _row_step(values: Mapping[str, Any], key: str) -> dict[int, PiecewiseLinear]:
    """Seconds against rows, for each width of a row."""
    by_width: dict[int, dict[float, float]] = {}
    for index, item in enumerate(_items(values.get(key), key)):
        place = f"{key}[{index}]"
        if not isinstance(item, Mapping):
            raise InputError(f"{place} must be an object with rows, hidden and ms")
        width = _integer(item.get("hidden"), f"{place}.hidden")
        rows = _number(item.get("rows"), f"{place}.rows")
        by_width.setdefault(width, {})[rows] = 1e-3 * _number(item.get("ms"), f"{place}.ms")
    return {
        width: _curve(list(points), list(points.values()), key, y_at_0=None)
        for width, points in by_width.items()
    }


def _curve(x: Sequence[float], y: Sequence[float], place: str, *, y_at_0: float | None) -> PiecewiseLinear:
    try:
        return rising_curve(x, y, y_at_0=y_at_0)
    except InputError as exc:
        raise InputError(f"{place}: {exc}") from exc


def _dtype(value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"dtype is {brief(value)}; it must be the name of a type, such as bfloat16")
    return canonical_dtype(value)


def _mapping(values: Mapping[str, Any], key: str, *, optional: bool = False) -> Mapping[str, Any]:
    value = values.get(key)
    if value is None and optional:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{key} must be an object, not {brief(value)}")
    return {str(name): entry for name, entry in value.items()}


def _items(values: Any, place: str) -> Sequence[Any]:
    if not isinstance(values, list | tuple) or not values:
        raise InputError(f"{place} must be a list of measured points, not {brief(values)}")
    return values


def _number(value: Any, place: str, *, zero: bool = False) -> float:
    number = as_number(value)
    if number is None or number < 0 or (number == 0 and not zero):
        raise InputError(f"{_what(value, place)} be a finite number{', 0 or more' if zero else ' above 0'}")
    if number != 0 and not _LEAST <= number <= _MOST:
        raise InputError(f"{_what(value, place)} lie between {_LEAST:g} and {_MOST:g}; check its unit")
    return number


def _integer(value: Any, place: str, *, least: int | None = 1) -> int:
    number = as_number(value)
    if number is None or number != int(number) or number > _MOST or (least is not None and number < least):
        raise InputError(
            f"{_what(value, place)} be a whole number{'' if least is None else f', {least} or more'}"
        )
    return int(number)


def _what(value: Any, place: str) -> str:
    return f"{place} is missing; it must" if value is None else f"{place} is {brief(value)}; it must"
