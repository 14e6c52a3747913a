"""How time and quality change with experts, devices, layers and windows, one at a time.

Run ``python -m benchmarks.scaling``; writes ``benchmarks/results/scaling.md``, ``scaling.svg`` and appends to
``scaling.jsonl``. Seeded synthetic traces, linear step cost (1 per pair, 4 per distinct token), around 4
layers of 64 experts, top-8, on 8 devices, 16 fitted windows of 2048 tokens. Quality is on as many windows
that were not fitted.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from benchmarks.environment import RESULTS, environment
from placement import CostModel, LinearCalibration, lower_bound, make_problem, optimize, parse_topology
from traces.statistics import build_profile
from traces.synthesize import synthesize

__all__ = ["main"]

SEED = 0
WINDOW = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Size of an instance; `windows` are the fitted ones."""

    experts: int = 64
    devices: int = 8
    layers: int = 4
    windows: int = 16


SWEEPS: dict[str, tuple[int, ...]] = {
    "experts": (16, 64, 128, 256, 384),
    "devices": (2, 8, 16, 32, 64),
    "layers": (1, 4, 16, 61),
    "windows": (4, 16, 64),
}


def measure(size: Size) -> dict[str, Any]:
    """Solve one instance by default, and time its bound alone."""
    trace = synthesize(
        num_tokens=2 * size.windows * WINDOW,
        num_layers=size.layers,
        num_experts=size.experts,
        top_k=8,
        seed=SEED,
    )
    even, odd = build_profile(trace, window_tokens=WINDOW).split_alternate()
    topology = parse_topology(f"h100:1x{size.devices}")
    problem = make_problem(even, topology, calibration=LinearCalibration(pair_cost=1.0, token_cost=4.0))
    began_s = time.process_time()
    bound = lower_bound(CostModel(problem))
    bound_s = time.process_time() - began_s
    began_s = time.process_time()
    solution = optimize(problem, seed=SEED)
    solve_s = time.process_time() - began_s
    held = CostModel(problem.with_profile(odd))
    greedy = held.objective(optimize(problem, solver="greedy", work_s=0.1).placement)
    return {
        **asdict(size),
        "solve_s": solve_s,
        "bound_s": bound_s,
        "gap": max(0.0, 1 - bound.value / solution.objective),
        "ratio_to_greedy": held.objective(solution.placement) / greedy,
    }


def _table(rows: list[dict[str, Any]], where: dict[str, str]) -> str:
    lines = [
        "# Scaling",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numba {where['numba']}; "
        f"seed {SEED}, one thread, default effort. Made by `python -m benchmarks.scaling`.",
        "",
        "CPU seconds of a default solve (baselines, bound, search) and of its bound alone; held-out cost as",
        "a ratio to greedy's; certified gap on the fitted windows.",
        "",
        "![CPU seconds](scaling.svg)",
        "",
        "| experts | devices | layers | windows | solve s | bound s | held out / greedy | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['experts']} | {row['devices']} | {row['layers']} | {row['windows']} | {row['solve_s']:.1f} "
        f"| {row['bound_s']:.1f} | {row['ratio_to_greedy']:.4f} | {row['gap']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


PANEL, HEIGHT, MARGIN = 220, 190, 46
COLORS = {"solve_s": "#d1603d", "bound_s": "#56789a"}
NAMES = {"solve_s": "whole solve", "bound_s": "bound alone"}


def picture(points: dict[str, list[dict[str, Any]]]) -> str:
    """Return an SVG with one panel an axis: CPU seconds against size, both logarithmic."""
    top = max(row["solve_s"] for rows in points.values() for row in rows)
    panels = [_panel(name, rows, left, top) for left, (name, rows) in enumerate(points.items())]
    legend = "".join(
        f'<rect x="{60 + 150 * i}" y="10" width="12" height="12" fill="{COLORS[key]}"/>'
        f'<text x="{78 + 150 * i}" y="20">{NAMES[key]}, CPU s</text>'
        for i, key in enumerate(COLORS)
    )
    width, height = PANEL * len(points) + MARGIN, HEIGHT + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="#333" role="img" '
        f'aria-label="CPU seconds against size"><rect width="{width}" height="{height}" fill="#ffffff"/>'
        f"{legend}{''.join(panels)}</svg>\n"
    )


def _panel(name: str, rows: list[dict[str, Any]], column: int, top: float) -> str:
    left = MARGIN + column * PANEL
    first, last = (math.log(rows[i][name]) for i in (0, -1))
    low, high = math.log(0.01), math.log(top * 1.3)

    def at(row: dict[str, Any], key: str) -> tuple[float, float]:
        x = left + (math.log(row[name]) - first) / (last - first) * (PANEL - 60)
        y = MARGIN + HEIGHT * (1 - (math.log(max(row[key], 0.01)) - low) / (high - low))
        return x, y

    parts = [f'<text x="{left}" y="{HEIGHT + MARGIN + 34}" font-weight="600">{escape(name)}</text>']
    labelled = -math.inf
    for row in rows:
        x = at(row, "solve_s")[0]
        if x - labelled > 26:  # a label's width
            parts.append(f'<text x="{x:.0f}" y="{HEIGHT + MARGIN + 16}">{row[name]}</text>')
            labelled = x
    for value in (0.1, 1.0, 10.0, 100.0):
        if value < top * 1.3:
            y = MARGIN + HEIGHT * (1 - (math.log(value) - low) / (high - low))
            parts.append(
                f'<line x1="{left}" x2="{left + PANEL - 40}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>'
            )
            if column == 0:
                parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{value:g}</text>')
    for key, color in COLORS.items():
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(row, key) for row in rows))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
            for x, y in (at(row, key) for row in rows)
        ]
    return "".join(parts)


def main() -> None:
    """Measure every sweep, write the table and the picture."""
    where, measured = environment(), {}
    points: dict[str, list[dict[str, Any]]] = {}
    for name, values in SWEEPS.items():
        for value in values:
            size = replace(Size(), **{name: value})
            if size not in measured:
                measured[size] = measure(size)
                print(measured[size], flush=True)
            points.setdefault(name, []).append(measured[size])
    RESULTS.mkdir(exist_ok=True)
    rows = list(measured.values())
    (RESULTS / "scaling.md").write_text(_table(rows, where), encoding="utf-8")
    (RESULTS / "scaling.svg").write_text(picture(points), encoding="utf-8")
    with (RESULTS / "scaling.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps({**where, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
