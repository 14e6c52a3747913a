"""Between data centres: plain expert parallelism, the best uniform domains, and the program per expert.

Run ``python -m benchmarks.planning.cross_dc``; writes ``benchmarks/results/plan-cross-dc.md``. Each domain of
a trace is a data centre (four consecutive stretches where a trace has one domain). Even windows of each are
fitted, odd ones judge. Then the model up to 1,000 data centres, and the search itself at that size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.environment import RESULTS, data_folder, environment
from placement.planning.cross_dc import (
    CrossTraffic,
    Effort,
    EvenLoad,
    Level,
    RoutedPlan,
    best_uniform,
    contiguous_homes,
    plan_routed,
    scale_curve,
    solve_cross,
    stay_home,
    step_time,
)
from placement.tasks.plan_cross_dc import group_domains, window_counts
from placement.tasks.plan_spec import read_traffic

__all__ = ["main"]

SAMPLES = Path(__file__).parents[2] / "placement" / "samples" / "traces"
GBITS = (10, 40, 100)
GPUS = 8
"""GPUs of a data centre; each has a link of the row's bandwidth."""
TOKENS = 4096
"""Tokens of each GPU per step."""
PRE_EXPERT_S = 5e-3
SEED = 0
SCALE_MOVES = 200
"""Moves of the search over the number of data centres."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A trace, the sizes of one of its experts, and how it is cut into data centres."""

    trace: str
    hidden: int
    inner: int
    stretches: int | None = None


INSTANCES = (
    # The sample model is tiny; its routing is given experts of a usual size.
    Instance(trace="byte16", hidden=2048, inner=4096),
    Instance(trace="gptoss20b_a", hidden=2880, inner=2880, stretches=4),
    Instance(trace="olmoe64", hidden=2048, inner=1024),
)


def _windows(instance: Instance) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
    folder = SAMPLES if instance.trace == "byte16" else data_folder() / "traces"
    file = folder / f"{instance.trace}.npz"
    if not file.exists():
        return None
    read = read_traffic(str(file))
    return window_counts(read, group_domains(read, instance.stretches, source=instance.trace))


def _traffic(
    instance: Instance, fit_LCE: np.ndarray[tuple[int, ...], np.dtype[np.float64]], gbits: int
) -> CrossTraffic:
    layers, centres, experts = fit_LCE.shape
    return CrossTraffic(
        tokens_LCE=fit_LCE * TOKENS * GPUS,
        home_LE=contiguous_homes(num_layers=layers, num_centres=centres, num_experts=experts),
        bandwidth_C=np.full(centres, GPUS * gbits * 1e9 / 8),
        token_bytes=2.0 * instance.hidden,
        expert_bytes=6.0 * instance.hidden * instance.inner,
        pre_expert_s_L=np.full(layers, PRE_EXPERT_S),
    )


def _routed_rows() -> Iterator[tuple[str, RoutedPlan]]:
    for instance in INSTANCES:
        counts_WLCE = _windows(instance)
        if counts_WLCE is None:
            continue
        fit_LCE, held_out = counts_WLCE[0::2].mean(axis=0), counts_WLCE[1::2] * TOKENS * GPUS
        for gbits in GBITS:
            for share in (4, 1):
                copies = fit_LCE.shape[2] // share
                traffic = replace(_traffic(instance, fit_LCE, gbits), layer_copies=copies)
                began_s = time.process_time()
                plan = plan_routed(traffic, held_out_WLCE=held_out, effort=Effort(node_limit=0))
                seconds = time.process_time() - began_s
                row = _row(instance, traffic, plan, gbits, copies, seconds)
                print(row, flush=True)
                yield row, plan


def _row(
    instance: Instance, traffic: CrossTraffic, plan: RoutedPlan, gbits: int, copies: int, seconds: float
) -> str:
    plain, uniform, program, chosen = plan.policies[0], plan.policies[1], plan.policies[2], plan.chosen
    cells = [
        f"{instance.trace} ({traffic.num_centres} DCs)",
        str(gbits),
        str(copies),
        f"{1e3 * plain.fitted_s:.1f}",
        f"{plan.uniform.size}: {1e3 * uniform.fitted_s:.1f}",
        f"{1e3 * program.fitted_s:.1f}",
        f"{1e3 * chosen.fitted_s:.1f}",
        f"{100 * plan.solution.gap:.1f} %",
        *(f"{1e3 * (policy.held_out_s or 0.0):.1f}" for policy in (plain, uniform, program, chosen)),
        f"**{(uniform.held_out_s or 0.0) / (chosen.held_out_s or 1.0):.2f}**",
        f"{seconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _routed_table() -> list[str]:
    rows, plans = zip(*_routed_rows(), strict=True)
    fitted = [1 - plan.policies[2].fitted_s / plan.policies[1].fitted_s for plan in plans]
    held_out = [1 - (plan.policies[2].held_out_s or 0) / (plan.policies[1].held_out_s or 1) for plan in plans]
    return [
        "## Real routing",
        "",
        f"{GPUS} GPUs in each data centre, {TOKENS} tokens each per step, {1e3 * PRE_EXPERT_S:g} ms before",
        "the experts, forward, no compression, local search only (no integer program). Times are ms of all",
        "layers; `copies` is the memory limit per data centre and layer. The program keeps contiguous homes;",
        "`+ homes` chooses them. `held-out gain` is best uniform over program with homes. The gap is to the",
        "bound for those homes.",
        "",
        "| trace | Gb/s per GPU | copies | plain | uniform size: ms | program | + homes | gap "
        "| plain, held out | uniform, held out | program, held out | + homes, held out | held-out gain "
        "| CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"{len(plans)} instances. Program no slower than the best uniform domains: "
        f"{_share(fitted, 0.0)} fitted, {_share(held_out, 0.0)} held out;",
        f"strictly faster: {_share(fitted, 1e-9)} fitted, {_share(held_out, 1e-9)} held out. Time saved with",
        f"contiguous homes: {_range(fitted)} fitted, {_range(held_out)} held out.",
        "",
    ]


def _share(saved: list[float], least: float) -> str:
    count = sum(value >= least for value in saved) if least == 0 else sum(value > least for value in saved)
    return f"{100 * count / len(saved):.0f} %"


def _range(saved: list[float]) -> str:
    low, middle, high = 100 * np.quantile(saved, (0.0, 0.5, 1.0))
    return f"{low:.1f} to {high:.1f} % (median {middle:.1f} %)"


def _scale_tables() -> list[str]:
    lines = [
        "## Up to 1,000 data centres",
        "",
        "The model, even routing, 10 MB of tokens and 0.2 MB of experts per device, 20 ms before the",
        "experts; gain over plain expert parallelism with domains of 10, with the share of",
        "tokens of 10 in 100, and at best.",
        "",
        "| Gb/s | data centres | domains of 10 | share kept | best size | gain of the best |",
        "|---|---|---|---|---|---|",
    ]
    began_s = time.process_time()
    for gbits in (1, *GBITS):
        level = Level(name="data centre", size=100, bandwidth=gbits * 1e9 / 8)
        load = EvenLoad(levels=(level,), data_bytes=10e6, expert_bytes=0.2e6, pre_expert_s=20e-3)
        for point in scale_curve(load, size=10, share=90 / 99, centres=(10, 50, 100, 200, 500, 1000)):
            fixed = "-" if point.fixed_size is None else f"{point.fixed_size:.2f}"
            lines.append(
                f"| {gbits} | {point.centres} | {fixed} | {point.fixed_share:.2f} | {point.best_size} | "
                f"{point.best:.2f} |"
            )
    seconds = time.process_time() - began_s
    return [*lines, "", f"All points together took {seconds:.3f} s.", "", *_search_lines()]


def _search_lines() -> list[str]:
    """Search one layer of synthetic skewed routing at several sizes."""
    lines = [
        "One layer of synthetic routing (every data centre's experts Zipf-distributed in an order of its",
        "own), one expert and 10 MB of tokens per data centre, 1 MB experts, 10 Gb/s, room for 8 copies:",
        "",
        "| data centres | plain, ms | best uniform, ms | program, ms | gap | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for centres in (10, 100, 1000):
        traffic = _synthetic(centres)
        began_s = time.process_time()
        solution = solve_cross(traffic, effort=Effort(starts=1, node_limit=0, most_moves=SCALE_MOVES))
        seconds = time.process_time() - began_s
        lines.append(
            f"| {centres} | {1e3 * step_time(traffic, stay_home(traffic)):.2f} | "
            f"{1e3 * best_uniform(traffic).step_s:.2f} | {1e3 * solution.step_s:.2f} | "
            f"{100 * solution.gap:.1f} % | {seconds:.1f} |"
        )
        print(lines[-1], flush=True)
    return [*lines, ""]


def _synthetic(centres: int) -> CrossTraffic:
    random = np.random.default_rng(SEED)
    popular = 1.0 / np.arange(1, centres + 1)
    tokens = np.array([random.permutation(popular) for _ in range(centres)])
    return CrossTraffic(
        tokens_LCE=tokens[None] / popular.sum() * 2500,
        home_LE=contiguous_homes(num_layers=1, num_centres=centres, num_experts=centres),
        bandwidth_C=np.full(centres, 1.25e9),
        token_bytes=4096.0,
        expert_bytes=1e6,
        pre_expert_s_L=np.array([PRE_EXPERT_S]),
        layer_copies=8,
    )


def main() -> None:
    """Run everything and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    where = environment()
    lines = [
        "# Experts or tokens between data centres",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}; seed {SEED}, one thread. "
        "Made by `python -m benchmarks.planning.cross_dc`.",
        "",
        *_routed_table(),
        *_scale_tables(),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan-cross-dc.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
