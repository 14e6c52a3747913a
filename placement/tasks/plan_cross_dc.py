"""From a plan file and a trace to a plan between data centres.

Shape letters: T tokens, L MoE layers, K top-k, C data centres, E experts, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement._fields import Fields, brief
from placement._suggest import did_you_mean
from placement.errors import InputError

if TYPE_CHECKING:
    from placement.model import ModelShape
    from placement.planning.cross_dc import CrossDcPlan, CrossTraffic, Effort, EvenLoad, Level, RoutedPlan
    from placement.tasks.plan_spec import PlanSpec, PlanTraffic

__all__ = ["DataCentres", "group_domains", "plan_cross_dc_from", "window_counts"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

GB, GIB, GBIT = 1e9, 2.0**30, 1e9 / 8

LEAST_WINDOWS = 16
"""Windows that each data centre's tokens are cut into by default: eight to fit and eight to judge."""

_KEYS = (
    "levels",
    "topology",
    "model",
    "weight_dtype",
    "token_dtype",
    "tokens_per_gpu",
    "pre_expert_ms",
    "pre_expert",
    "compression",
    "training",
    "replica_gib",
    "replica_total_gib",
    "trace",
    "data_centres",
    "homes",
    "window_tokens",
    "nodes",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DataCentres:
    """Which tokens of a trace come from which data centre.

    Parameters
    ----------
    names
        Names of the data centres.
    centre_T
        Data centre of each token, ``[tokens]``; -1 for tokens that belong to none.
    """

    names: tuple[str, ...]
    centre_T: IntArray


def plan_cross_dc_from(spec: PlanSpec, *, trace: str | None = None) -> CrossDcPlan:
    """Plan what a file describes, for its own trace or another.

    Parameters
    ----------
    spec
        The file; `examples/plans/cross-dc.yaml` explains its keys.
    trace
        Routing instead of the file's own; a trace is not needed.

    Raises
    ------
    InputError
        If the file or the trace is wrong, or they do not fit each other.
    """
    from placement.planning.cross_dc import EvenLoad, break_even_tokens, plan_cross_dc

    given = spec.fields(known=_KEYS, required=("model", "tokens_per_gpu"))
    model = spec.model(given.raw("model"))
    levels = _levels(spec, given)
    per_centre = int(np.prod([level.size for level in levels[1:]], dtype=np.int64))
    replica_gib = given.number("replica_gib", zero=True)
    token_bytes = model.token_bytes(given.text("token_dtype") or "bf16")
    expert_bytes = model.bytes_per_expert(given.text("weight_dtype"))
    tokens = given.number("tokens_per_gpu") or 0.0
    pre_expert_s_L = _pre_expert_s_L(spec, given, model, tokens)
    load = EvenLoad(
        levels=levels,
        data_bytes=tokens * model.top_k * token_bytes,
        expert_bytes=expert_bytes * model.num_experts / (per_centre * levels[0].size),
        pre_expert_s=float(pre_expert_s_L.mean()),
        compression=given.number("compression") or 1.0,
        training=_flag(given, "training"),
        replica_bytes=None if replica_gib is None else replica_gib * GIB / per_centre,
    )
    routed: RoutedPlan | None = None
    names: tuple[str, ...] = ()
    source = trace or (spec.found(given.text("trace") or "") if "trace" in given else None)
    if source is not None:
        routed, names = _routed(given, load, model, source, pre_expert_s_L, token_bytes, expert_bytes)
    return plan_cross_dc(
        load,
        break_even_tokens=break_even_tokens(
            expert_bytes=expert_bytes, token_bytes=token_bytes, compression=load.compression
        ),
        routed=routed,
        centre_names=names,
    )


def _flag(given: Fields, key: str) -> bool:
    value = given.raw(key)
    if value not in (None, True, False) or (isinstance(value, int) and not isinstance(value, bool)):
        raise given.wrong(key, "true or false")
    return bool(value)


def _levels(spec: PlanSpec, given: Fields) -> tuple[Level, ...]:
    from placement.planning.cross_dc import levels_of

    if ("levels" in given) == ("topology" in given):
        raise InputError(f"{spec.source}: give either levels or topology")
    if "topology" in given:
        return levels_of(spec.topology(given.raw("topology")))
    levels = tuple(_level(value, index, spec.source) for index, value in enumerate(given.items("levels")))
    if levels[0].size < 2:
        raise InputError(f"{spec.source}: levels[0].size is 1; between data centres there are at least 2")
    return levels


def _level(value: object, index: int, source: str) -> Level:
    from placement.planning.cross_dc import Level

    known = ("name", "size", "bandwidth_gbits", "bandwidth_gbps", "latency_us")
    place = f"levels[{index}]"
    entry = Fields(value, source=source, place=place, known=known, required=("name", "size"))
    units = {"bandwidth_gbits": GBIT, "bandwidth_gbps": GB}
    given = [(entry.number(key, zero=True) or 0.0) * unit for key, unit in units.items() if key in entry]
    if len(given) != 1:
        raise InputError(
            f"{source}: {place} must give bandwidth_gbits (Gb/s) or bandwidth_gbps (GB/s) per device"
        )
    try:
        return Level(
            name=entry.text("name") or "",
            size=entry.integer("size") or 1,
            bandwidth=given[0],
            latency_s=(entry.number("latency_us", zero=True) or 0.0) * 1e-6,
        )
    except InputError as exc:
        raise InputError(f"{source}: {place}: {exc}") from exc


def _pre_expert_s_L(spec: PlanSpec, given: Fields, model: ModelShape, tokens: float) -> FloatArray:
    """Return the time before each layer's experts: given, or from FLOPs and a device's speed."""
    if ("pre_expert_ms" in given) == ("pre_expert" in given):
        raise InputError(f"{spec.source}: give either pre_expert_ms or pre_expert")
    if "pre_expert" in given:
        return _computed_s_L(spec, given.raw("pre_expert"), model, tokens)
    if not isinstance(given.raw("pre_expert_ms"), list):
        return np.full(model.num_layers, (given.number("pre_expert_ms", zero=True) or 0.0) * 1e-3)
    values = given.items("pre_expert_ms")
    if len(values) != model.num_layers or not all(
        isinstance(ms, int | float) and not isinstance(ms, bool) and 0 <= ms < 1e9 for ms in values
    ):
        raise given.wrong(
            "pre_expert_ms", f"a number, or one of 0 or more for each of {model.num_layers} layers"
        )
    return np.array(values, dtype=np.float64) * 1e-3


def _computed_s_L(spec: PlanSpec, value: object, model: ModelShape, tokens: float) -> FloatArray:
    """Return ``(m + 1) attention + m dense`` with m dense layers before each MoE layer, as the paper does."""
    from placement.devices import device_kind

    known = ("device", "sequence_length", "transformer")
    fields = Fields(value, source=spec.source, place="pre_expert", known=known, required=known)
    shape = spec.transformer(fields.raw("transformer"), key="pre_expert.transformer", model=model)
    flops = device_kind(fields.text("device") or "").achieved_flops
    length = fields.integer("sequence_length") or 1
    attention_s = shape.attention_flops(tokens=tokens, sequence_length=length) / flops
    dense_s = tokens * 2.0 * 3 * model.hidden_size * shape.dense_hidden_size / flops
    ids = np.array(model.moe_layer_ids or range(model.num_layers))
    dense_L = np.diff(ids, prepend=-1) - 1
    return np.asarray((dense_L + 1) * attention_s + dense_L * dense_s, dtype=np.float64)


def group_domains(traffic: PlanTraffic, wanted: object, *, source: str) -> DataCentres:
    """Return which tokens come from which data centre.

    Parameters
    ----------
    traffic
        The trace.
    wanted
        None: each domain of the trace is one. A number: consecutive stretches of the trace. A mapping of
        names to lists of domains.
    source
        Start of every message.

    Raises
    ------
    InputError
        If the trace has too few domains, or the mapping names unknown domains or one twice.
    """
    if wanted is None:
        if len(traffic.domain_names) < 2:
            raise InputError(
                f"{source}: the trace knows {len(traffic.domain_names)} domains; set data_centres to a "
                "number to cut it into that many stretches"
            )
        return DataCentres(names=traffic.domain_names, centre_T=traffic.domain_T)
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return _stretches(traffic, wanted, source)
    if not isinstance(wanted, dict) or len(wanted) < 2:
        raise InputError(
            f"{source}: data_centres must be a number of 2 or more, or a mapping, not {brief(wanted)}"
        )
    # The last entry is for tokens of no known domain, which are numbered -1.
    centre_of_domain = np.full(len(traffic.domain_names) + 1, -1)
    for centre, (name, domains) in enumerate(wanted.items()):
        if not isinstance(domains, list) or not domains:
            raise InputError(f"{source}: data_centres.{name} must be a list of the trace's domains")
        for domain in domains:
            centre_of_domain[_domain(traffic, domain, name, centre_of_domain, source)] = centre
    return DataCentres(names=tuple(map(str, wanted)), centre_T=centre_of_domain[traffic.domain_T])


def _domain(traffic: PlanTraffic, domain: object, name: str, taken: IntArray, source: str) -> int:
    if domain not in traffic.domain_names:
        hint = did_you_mean(str(domain), traffic.domain_names)
        raise InputError(f"{source}: data_centres.{name}: the trace has no domain {brief(domain)}; {hint}")
    index = traffic.domain_names.index(str(domain))
    if taken[index] >= 0:
        raise InputError(f"{source}: data_centres.{name}: domain {domain!r} is given twice")
    return index


def _stretches(traffic: PlanTraffic, count: int, source: str) -> DataCentres:
    tokens = len(traffic.experts_TLK)
    if not 2 <= count <= tokens:
        raise InputError(
            f"{source}: data_centres is {count}; it must lie within 2..{tokens}, the trace's tokens"
        )
    names = tuple(f"stretch {index}" for index in range(count))
    return DataCentres(names=names, centre_T=np.arange(tokens, dtype=np.int64) * count // tokens)


def window_counts(
    traffic: PlanTraffic, centres: DataCentres, *, window_tokens: int | None = None
) -> FloatArray:
    """Return how many tokens of each window ask for each expert, ``[windows, layers, centres, experts]``.

    Window w joins each data centre's w-th tokens; every data centre has as many windows as the one with the
    fewest tokens, and what is left over is not counted.

    Raises
    ------
    InputError
        If a data centre has too few tokens for two windows.
    """
    count = len(centres.names)
    position_T = [np.nonzero(centres.centre_T == centre)[0] for centre in range(count)]
    fewest = min(len(position) for position in position_T)
    window = max(1, fewest // LEAST_WINDOWS) if window_tokens is None else window_tokens
    windows = fewest // window
    if windows < 2:
        short = centres.names[int(np.argmin([len(position) for position in position_T]))]
        raise InputError(
            f"data centre {short!r} has {fewest} tokens, {windows} windows of {window}; one to fit and one "
            "to judge are needed: lower window_tokens or join domains"
        )
    layers, experts = traffic.experts_TLK.shape[1], traffic.num_experts
    counts_WLCE = np.zeros((windows, layers, count, experts))
    for centre, position in enumerate(position_T):
        cut = traffic.experts_TLK[position[: windows * window]].reshape(windows, window, layers, -1)
        for w in range(windows):
            for layer in range(layers):
                counts_WLCE[w, layer, centre] = np.bincount(cut[w, :, layer].ravel(), minlength=experts)
    return counts_WLCE / window


def _check_fit(
    traffic: PlanTraffic, model: ModelShape, centres: DataCentres, level: Level, trace: str
) -> None:
    about = traffic.origin
    found = {"layers": about.num_layers, "experts": about.num_experts, "top-k": about.top_k}
    wanted = {"layers": model.num_layers, "experts": model.num_experts, "top-k": model.top_k}
    for name, value in found.items():
        if value != wanted[name]:
            raise InputError(f"{trace}: {name} is {value}, model {model.name!r} has {wanted[name]}")
    if len(centres.names) != level.size:
        raise InputError(
            f"{trace}: the traffic comes from {len(centres.names)} data centres, level {level.name!r} has "
            f"{level.size}; set its size, or group domains with data_centres"
        )


def _routed(
    given: Fields,
    load: EvenLoad,
    model: ModelShape,
    trace: str,
    pre_expert_s_L: FloatArray,
    token_bytes: int,
    expert_bytes: int,
) -> tuple[RoutedPlan, tuple[str, ...]]:
    from placement.planning.cross_dc import CrossTraffic, contiguous_homes, plan_routed
    from placement.tasks.plan_spec import read_traffic

    read = read_traffic(trace)
    centres = group_domains(read, given.raw("data_centres"), source=given.source)
    outer = load.levels[0]
    _check_fit(read, model, centres, outer, trace)
    counts_WLCE = window_counts(read, centres, window_tokens=given.integer("window_tokens"))
    per_centre = load.num_devices // outer.size
    step_tokens = (given.number("tokens_per_gpu") or 0.0) * per_centre
    fit, held_out = counts_WLCE[0::2] * step_tokens, counts_WLCE[1::2] * step_tokens
    traffic = CrossTraffic(
        tokens_LCE=fit.mean(axis=0),
        home_LE=contiguous_homes(
            num_layers=model.num_layers, num_centres=outer.size, num_experts=model.num_experts
        ),
        bandwidth_C=np.full(outer.size, outer.bandwidth * per_centre),
        token_bytes=float(token_bytes),
        expert_bytes=float(expert_bytes),
        pre_expert_s_L=pre_expert_s_L,
        compression=load.compression,
        latency_s=outer.latency_s,
        training=load.training,
        layer_copies=_copies(given, "replica_gib", expert_bytes),
        total_copies=_copies(given, "replica_total_gib", expert_bytes),
    )
    plan = plan_routed(traffic, held_out_WLCE=held_out, own_homes=_own_homes(given), effort=_effort(given))
    return _with_distinct(plan, read, centres, step_tokens), centres.names


def _copies(given: Fields, key: str, expert_bytes: int) -> int | None:
    gib = given.number(key, zero=True)
    return None if gib is None else int(gib * GIB // expert_bytes)


def _own_homes(given: Fields) -> bool:
    value = given.text("homes") or "chosen"
    if value not in ("chosen", "contiguous"):
        raise given.wrong("homes", "chosen or contiguous")
    return value == "chosen"


def _effort(given: Fields) -> Effort:
    from placement.planning.cross_dc import Effort

    nodes = given.integer("nodes", minimum=0)
    return Effort() if nodes is None else Effort(node_limit=nodes)


MOST_DISTINCT_TOKENS = 50_000
"""Tokens that are looked at one by one for the figure without duplicates; more tell no more."""


def _with_distinct(
    plan: RoutedPlan, read: PlanTraffic, centres: DataCentres, step_tokens: float
) -> RoutedPlan:
    """Add what every policy takes where a token travels once per data centre."""
    from placement.planning.cross_dc import distinct_use, time_LC

    known = np.nonzero(centres.centre_T >= 0)[0]
    known = known[:: -(-known.size // MOST_DISTINCT_TOKENS)]
    centre_T = centres.centre_T[known]
    scale_C = step_tokens / np.maximum(np.bincount(centre_T, minlength=len(centres.names)), 1)

    def seconds(traffic: CrossTraffic, index: int) -> float:
        use = distinct_use(
            traffic,
            plan.policies[index].decision,
            experts_TLK=read.experts_TLK[known],
            centre_T=centre_T,
            scale_C=scale_C,
        )
        return float(time_LC(traffic, use).max(axis=1).sum())

    policies = tuple(
        replace(policy, distinct_s=seconds(policy.traffic, index))
        for index, policy in enumerate(plan.policies)
    )
    return replace(plan, policies=policies)
