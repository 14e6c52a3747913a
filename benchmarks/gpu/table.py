"""Writes ``benchmarks/results/gpu.md``, and a line of ``gpu.jsonl``, from the output folders of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import Change, emulated_tails, exchange_ms, grouped, median_of, paired
from benchmarks.gpu.folder import read_prepared
from benchmarks.gpu.policies import CONTIGUOUS, EPLB
from benchmarks.gpu.recorder import table as recorder_table
from benchmarks.gpu.replay import AGAIN
from benchmarks.gpu.run import RESULTS_FILE
from benchmarks.gpu.targets import Target, targets
from placement.calibration import Calibration, DataSheetCalibration, read_calibration
from placement.errors import InputError
from placement.tasks.calibration_check import check_calibration

__all__ = ["write_table"]

Row = dict[str, Any]

CASE = ("layer", "window")
TRANSPORTS = ("nvlink", "shm")
REPLAYS = {
    "replay-prefill": "NVLink, 16,384 tokens a rank (each window's 4,096 four times)",
    "replay-nvlink": "NVLink, 4,096 tokens a rank",
    "replay-shm": "slow stand-in (NCCL_P2P_DISABLE=1), 4,096 tokens a rank",
}
"""Parts that replay layers, and what a heading says of them."""
LINKS = {"nvlink": "NVLink", "shm": "slow stand-in (NCCL_P2P_DISABLE=1)"}
ERROR_MEDIAN, ERROR_P95 = 0.05, 0.12


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runs:
    """Results by part, the latest good ones, and the folder that each came from."""

    parts: dict[str, Row] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    machines: dict[str, Row] = field(default_factory=dict)

    def result(self, name: str) -> Row:
        """Return a part's result, empty where there is none."""
        found: Row = self.parts.get(name, {}).get("result") or {}
        return found


def _read(folders: Sequence[Path]) -> _Runs:
    runs = _Runs()
    for folder in folders:
        file = folder / RESULTS_FILE
        if not file.exists():
            raise InputError(f"{file} is missing; name output folders of `python -m benchmarks.gpu run`")
        results = json.loads(file.read_text(encoding="utf-8"))
        for name, part in results["parts"].items():
            if part["status"] == "ok" or name not in runs.parts or not runs.result(name):
                runs.parts[name], runs.folders[name] = part, folder
                runs.machines[name] = results["machine"]
    return runs


def write_table(folders: Sequence[Path], *, prepared: Path, file: Path) -> str:
    """Write the table of some runs.

    Parameters
    ----------
    folders
        Output folders of runs; of a part that several hold, the last good one counts.
    prepared
        What `prepare` wrote.
    file
        Where the table goes.

    Returns
    -------
    str
        The table.
    """
    runs = _read(folders)
    sections = [
        _head(runs),
        _targets(runs),
        _smoke(runs),
        *(_layers(runs, part, what) for part, what in REPLAYS.items()),
        _training(runs),
        _whole(runs),
        _emulated(runs, prepared),
        _predicted(runs),
        _recorder(runs),
        _migration(runs),
        _instances(runs),
        _failures(runs),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    _keep(runs, file.with_suffix(".jsonl"))
    return text


def _keep(runs: _Runs, file: Path) -> None:
    """Add a line to the table that is kept over time."""
    line = {
        "machine": next(iter(runs.machines.values())),
        "targets": [asdict(one) for one in _all_targets(runs)],
        "status": {name: part["status"] for name, part in runs.parts.items()},
    }
    with file.open("a", encoding="utf-8") as kept:
        kept.write(json.dumps(line) + "\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _head(runs: _Runs) -> str:
    machine = next(iter(runs.machines.values()))
    commits = sorted({one["commit"] for one in runs.machines.values()})
    gpus = machine["gpus"]
    what = f"{len(gpus)} x {gpus[0]}" if gpus else "CPU"
    about = (
        f"Commit {', '.join(commits)}; {what}, driver {machine['driver'] or '-'}, CUDA {machine['cuda']}, "
        f"NCCL {machine['nccl'] or '-'}; {machine['cpu']}; Python {machine['python']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, triton {machine['triton']}. "
        "Seed 0. Made by `python -m benchmarks.gpu prepare`, `run` and `table`."
    )
    return f"# Placements on GPUs\n\n{about}"


def _all_targets(runs: _Runs) -> list[Target]:
    scores = {transport: score for transport in TRANSPORTS if (score := _score(runs, transport))}
    return targets({name: runs.result(name) for name in runs.parts}, scores)


def _targets(runs: _Runs) -> str:
    marks = {True: "met", False: "**missed**", None: ""}
    rows = [[one.what, one.wanted, one.measured, marks[one.is_met]] for one in _all_targets(runs)]
    if not rows:
        return ""
    met = sum(row[3] == "met" for row in rows)
    told = f"{met} met, {len(rows) - met} missed. Below 0 is faster. Layers: total time over all cases."
    return "\n".join(["## Wanted", "", told, "", _table(("what", "wanted", "measured", ""), rows)])


def _smoke(runs: _Runs) -> str:
    checks = runs.result("smoke").get("checks", [])
    if not checks:
        return ""
    failed = [check for check in checks if not check["passed"]]
    worst = max((check["error"] for check in checks if check["limit"] == 1e-5), default=float("nan"))
    lines = [
        "## Correct first",
        "",
        f"{len(checks) - len(failed)} of {len(checks)} checks passed: outputs and gradients of small models "
        f"over two ranks against the model in one piece (float32, limit 1e-5, worst {worst:.1e}), row "
        "copies and grouped products against float64.",
    ]
    lines += [
        f"- FAILED {check['check']}: {check['error']:.2e}, limit {check['limit']:.0e}" for check in failed
    ]
    return "\n".join(lines)


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _spread(change: Change | None) -> str:
    if change is None:
        return "-"
    return f"{_percent(change.median)} ({_percent(change.low)} to {_percent(change.high)})"


def _baseline(policy: str) -> str:
    """EPLB with as many slots."""
    return f"{EPLB}+" if "+" in policy else EPLB


def _policies(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["policy"] for row in rows))


def _layers(runs: _Runs, part: str, what: str) -> str:
    cases = runs.result(part).get("cases", [])
    if not cases:
        return ""
    rows = []
    for (instance, exchange), group in grouped(cases, ("instance", "exchange")).items():
        rows += [_layer_row(instance, exchange, group, policy) for policy in _policies(group)]
    return "\n".join(
        [
            f"## Whole MoE layers, 2 ranks, {what}",
            "",
            "Forward pass of one layer on the slowest rank; medians over layers and held-out windows, "
            "changes case by case with quartiles. `again` is contiguous once more: "
            "noise. EPLB has as many slots as the policy that it is held against.",
            "",
            _table(
                (
                    "instance",
                    "exchange",
                    "policy",
                    "layer ms",
                    "against contiguous",
                    "of the total time",
                    "worst case",
                    "against EPLB",
                    "of the total time",
                ),
                rows,
            ),
        ]
    )


def _layer_row(instance: str, exchange: str, group: list[Row], policy: str) -> list[str]:
    against = paired(group, policy, CONTIGUOUS, value="layer_ms", keys=CASE)
    baseline = _baseline(policy)
    eplb = (
        None
        if policy in (CONTIGUOUS, AGAIN, baseline)
        else paired(group, policy, baseline, value="layer_ms", keys=CASE)
    )
    first = [instance, exchange, policy, f"{median_of(group, policy, 'layer_ms'):.3f}"]
    if policy == CONTIGUOUS or against is None:
        return [*first, f"{against.cases if against else 0} cases", "", "", "", ""]
    return [
        *first,
        _spread(against),
        _percent(against.of_means),
        _percent(against.worst),
        _spread(eplb),
        "-" if eplb is None else _percent(eplb.of_means),
    ]


def _training(runs: _Runs) -> str:
    cases = runs.result("training-nvlink").get("cases", [])
    rows = []
    for (instance, exchange), group in grouped(cases, ("instance", "exchange")).items():
        for policy in _policies(group):
            against = paired(group, policy, CONTIGUOUS, value="training_ms", keys=CASE)
            ms = f"{median_of(group, policy, 'training_ms'):.3f}"
            rows.append([instance, exchange, policy, ms, _spread(against)])
    if not rows:
        return ""
    head = ("instance", "exchange", "policy", "forward and backward ms", "against contiguous")
    return "\n".join(["## Training, one MoE layer, 2 ranks, NVLink", "", _table(head, rows)])


def _whole(runs: _Runs) -> str:
    rows = []
    for (instance, training), group in grouped(
        runs.result("whole-nvlink").get("steps", []), ("instance", "training")
    ).items():
        for policy in _policies(group):
            against = paired(group, policy, CONTIGUOUS, value="step_ms", keys=("window",))
            what = "training step" if training else "forward"
            ms = f"{median_of(group, policy, 'step_ms'):.2f}"
            rows.append([instance, what, policy, ms, _spread(against)])
    if not rows:
        return ""
    return "\n".join(
        [
            "## Whole models of few layers, 2 ranks, NVLink",
            "",
            "Attention included, random weights, the trace's routing forced. A training step ends with "
            "AdamW; the dense part's gradients are not exchanged.",
            "",
            _table(("instance", "what", "policy", "ms", "against contiguous"), rows),
        ]
    )


def _emulated(runs: _Runs, prepared: Path) -> str:
    cases = runs.result("emulate").get("cases", [])
    if not cases:
        return ""
    calibration = _curves(runs)
    rows = []
    for (instance, batch), group in grouped(cases, ("instance", "batch")).items():
        ready = read_prepared(prepared, instance)
        link_ms = {
            policy: exchange_ms(ready, group, policy, batch, calibration) for policy in _policies(group)
        }
        rows += [[instance, batch, *_tail_row(group, policy, link_ms)] for policy in link_ms]
    return "\n".join(
        [
            "## Emulated ranks: the tail of the experts' time",
            "",
            "Emulated: each rank's share is run in turn on one GPU, with real kernels on the tokens that "
            "held-out windows give it. The tail is the slowest rank's time, averaged over layers and "
            "windows. The exchange (dispatch and combine, one copy of a token for each rank) is predicted "
            "from the measured all-to-all curve for the rank that receives most, all ranks in one NVLink "
            "domain.",
            "",
            _table(
                (
                    "instance",
                    "batch",
                    "policy",
                    "tail ms",
                    "mean rank ms",
                    "against contiguous",
                    "against EPLB",
                    "predicted exchange ms",
                    "both, against EPLB",
                ),
                rows,
            ),
        ]
    )


def _tail_row(group: list[Row], policy: str, link_ms: dict[str, float]) -> list[str]:
    tail_ms, mean_ms = emulated_tails(group, policy)
    contiguous_ms, _ = emulated_tails(group, CONTIGUOUS)
    baseline = _baseline(policy)
    eplb_ms, _ = emulated_tails(group, baseline)
    return [
        policy,
        f"{tail_ms:.3f}",
        f"{mean_ms:.3f}",
        _percent(tail_ms / contiguous_ms - 1),
        _percent(tail_ms / eplb_ms - 1),
        f"{link_ms[policy]:.3f}",
        _percent((tail_ms + link_ms[policy]) / (eplb_ms + link_ms[baseline]) - 1),
    ]


def _curves(runs: _Runs) -> Calibration:
    if "calibrate-nvlink" not in runs.folders:
        return DataSheetCalibration()
    file = runs.folders["calibrate-nvlink"] / "calibration_nvlink.json"
    return read_calibration(file) if file.exists() else DataSheetCalibration()


def _score(runs: _Runs, transport: str) -> Row:
    """Return how well the layers of a transport are predicted; empty where something is missing."""
    layers = runs.folders.get(f"replay-{transport}", Path()) / f"layers_{transport}.csv"
    curves = runs.folders.get(f"calibrate-{transport}", Path()) / f"calibration_{transport}.json"
    return check_calibration(layers, curves) if layers.is_file() and curves.is_file() else {}


def _predicted(runs: _Runs) -> str:
    rows = []
    for transport in TRANSPORTS:
        if not (score := _score(runs, transport)):
            continue
        rows.append([LINKS[transport], "all", "", *_errors(score)])
        rows += [
            ["", one["shape"], "dedup" if one["dedup"] else "pairs", *_errors(one)] for one in score["groups"]
        ]
    if not rows:
        return ""
    head = ("link", "shape", "exchange", "layers", "median error", "p95 error", "median bias")
    told = (
        "Whole layers on the slowest rank; nothing is fitted to them, the curves were measured apart. "
        f"Wanted: median {100 * ERROR_MEDIAN:.0f} %, p95 {100 * ERROR_P95:.0f} % at most."
    )
    return "\n".join(["## Predicted against measured layer time", "", told, "", _table(head, rows)])


def _errors(score: Row) -> list[str]:
    return [
        str(score["layers"]),
        f"{100 * score['median_error']:.1f} %",
        f"{100 * score['p95_error']:.1f} %",
        _percent(score["median_bias"]),
    ]


def _flat(rows: Sequence[Row]) -> str:
    """Return rows of any keys as a table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return _table(keys, [[_cell(row.get(key, "")) for key in keys] for row in rows])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(one)}" for key, one in value.items())
    return str(value)


def _recorder(runs: _Runs) -> str:
    result = runs.result("recorder")
    if not result.get("rows"):
        return ""
    failed = [check for check in result.get("checks", []) if not check["passed"]]
    told = (
        f"{len(result.get('checks', [])) - len(failed)} of {len(result.get('checks', []))} checks passed: "
        "what is recorded is what was routed. Step times with a recorder against none, in turn; `again` is "
        "noise."
    )
    return "\n".join(["## Recorder", "", told, "", recorder_table(result["rows"])])


def _migration(runs: _Runs) -> str:
    rows = runs.result("migration").get("migrations", [])
    return "\n".join(["## Migration", "", _flat(rows)]) if rows else ""


def _instances(runs: _Runs) -> str:
    known: dict[str, Row] = {}
    for name in runs.parts:
        known |= runs.result(name).get("instances", {})
    rows = []
    for name, entry in known.items():
        one = entry["instance"]
        shape = one["shape"]
        sizes = (
            f"{shape['num_experts']} experts, top-{shape['top_k']}, {shape['hidden_size']} x "
            f"{shape['expert_hidden_size']}"
        )
        balances = ", ".join(f"{key} {value['balance']:.3f}" for key, value in entry["policies"].items())
        cut = f"{one['num_ranks']} ranks, windows of {one['window_tokens']}, {one['spare_slots']} spare slots"
        rows.append([name, one["note"], sizes, cut, balances])
    if not rows:
        return ""
    head = ("instance", "traffic", "shape", "cut", "held-out balance (fullest / mean load)")
    told = (
        "Fitted on even windows of the trace, measured on odd ones. A window's tokens lie on the ranks in "
        "order. An emulated batch larger than the window is the window repeated, a smaller one every n-th "
        "of its tokens. `/lp`: tokens split over replicas by the linear programme on the loads of the "
        "window before."
    )
    return "\n".join(["## Instances", "", told, "", _table(head, rows)])


def _failures(runs: _Runs) -> str:
    failed = [(name, part) for name, part in runs.parts.items() if part["status"] != "ok"]
    lines = [
        f"- {name}: {part['status']}; {(part['tail'].strip().splitlines() or [''])[-1][:200]}"
        for name, part in failed
    ]
    return "\n".join(["## Failed or not run", "", *(lines or ["Nothing."])])
