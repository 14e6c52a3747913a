"""What recording adds to a step: load windows, sampled and full token capture, against no recorder at all.

``python -m benchmarks.gpu.recorder --out FILE-OR-FOLDER`` measures on a CUDA device (``--tiny``: anywhere, in
miniature). Models have real shapes and random weights; OLMoE has all of its layers, but where it is compiled.
Every variant has a copy of the model of its own, which shares all weights, so that hooks and compilations are
those of a run; blocks of steps of all variants take turns, and a figure is the median over rounds of the
ratio to the round's own ``off``. ``again`` is a second copy without a recorder: what it differs from ``off``
is noise. ``drain_ms`` is what a step of token capture leaves to write after the last step of a block; where
it is far from 0, the writing thread was slower than the model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.instances import Shape
from benchmarks.gpu.machine import machine
from benchmarks.gpu.recorder_check import checks
from benchmarks.gpu.shapes import whole_model
from benchmarks.gpu.timing import summary, synchronize
from placement.errors import PlacementError
from traces.record import LoadCounter, Recorder, recorder_for

__all__ = ["CASES", "TINY_CASES", "VARIANTS", "Case", "main", "measure", "table"]

Row = dict[str, Any]

VARIANTS = ("off", "again", "loads", "loads-each-step", "sampled", "tokens")
WINDOW_STEPS = 16
"""Steps of a window; ``loads-each-step`` has a window a step, the most there can be."""
SAMPLED_STEPS = 8
"""Sampled capture records one step in so many."""
BLOCK_S = 0.15
WARM_UP = 3
FILE = "recorder.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One workload.

    Parameters
    ----------
    shape
        Sizes of the MoE layers.
    layers
        Decoder layers.
    rows, places
        Rows of a batch, and tokens of each.
    mode
        ``eager``, ``compiled`` or ``graph`` (a CUDA graph of the whole pass, replayed).
    train
        Whether a step has a backward pass.
    backend
        Of `torch.compile`.
    """

    shape: Shape
    layers: int
    rows: int
    places: int
    mode: str = "eager"
    train: bool = False
    backend: str = "inductor"

    @property
    def name(self) -> str:
        """What tables call it."""
        work = "train" if self.train else "decode" if self.places == 1 else "prefill"
        return f"{self.shape.name} {work} {self.rows}x{self.places} {self.mode}"


def _shape(name: str, model_type: str, experts: int, inner: int, *, hidden: int = 2048) -> Shape:
    top_k = min(8, experts // 4)
    return Shape(
        name=name,
        model_type=model_type,
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        expert_hidden_size=inner,
    )


_OLMOE = _shape("olmoe", "olmoe", 64, 1024)
_QWEN3 = _shape("qwen3-30b-a3b", "qwen3_moe", 128, 768)
_TINY = _shape("tiny", "olmoe", 8, 16, hidden=32)

CASES = (
    Case(shape=_OLMOE, layers=16, rows=4, places=2048),
    Case(shape=_OLMOE, layers=16, rows=64, places=1, mode="graph"),
    Case(shape=_OLMOE, layers=16, rows=64, places=1),
    Case(shape=_OLMOE, layers=16, rows=2, places=2048, train=True),
    Case(shape=_QWEN3, layers=8, rows=4, places=2048),
    Case(shape=_OLMOE, layers=2, rows=4, places=2048, mode="compiled"),
)
TINY_CASES = (
    Case(shape=_TINY, layers=2, rows=2, places=16),
    Case(shape=_TINY, layers=2, rows=2, places=16, train=True),
    Case(shape=_TINY, layers=2, rows=4, places=1, mode="graph"),
    Case(shape=_TINY, layers=1, rows=2, places=16, mode="compiled", backend="aot_eager"),
)


def measure(
    case: Case,
    *,
    device: torch.device,
    rounds: int = 8,
    block_s: float = BLOCK_S,
    variants: Sequence[str] = VARIANTS,
) -> list[Row]:
    """Time a case; a row for each variant, or one that says why there is none.

    Parameters
    ----------
    rounds
        Times that every variant is timed, in turn.
    block_s
        Seconds of each timing, about.
    variants
        Some of `VARIANTS`, ``off`` among them.
    """
    if case.mode == "graph" and device.type != "cuda":
        return [{"case": case.name, "status": "skipped", "why": "CUDA graphs need a CUDA device"}]
    if case.mode == "graph":  # replays run no Python that could capture tokens
        variants = [name for name in variants if name not in ("sampled", "tokens")]
    # Copies of a model share compiled code, with hooks or without, unless hooks are guarded.
    guarded = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=64)
    gc.collect()  # models hold on to themselves in circles, and the last case's may be large
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = whole_model(case.shape, case.layers, device=device, dtype=dtype).train(case.train)
    with guarded, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = [stack.enter_context(_running(name, case, model, folder / name)) for name in variants]
        step_ms, drain_ms = _timed(runs, device, rounds=rounds, block_s=block_s)
    off_R = step_ms[:, list(variants).index("off")]
    return [
        {
            "case": case.name,
            "variant": name,
            "status": "ok",
            "written": "data set" if find_spec("pyarrow") else "raw file",
            "tokens": case.rows * case.places,
            "step_ms": summary(step_ms[:, at]),
            "overhead": summary(step_ms[:, at] / off_R - 1),
            "drain_ms": float(np.median(drain_ms[:, at])),
        }
        for at, name in enumerate(variants)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A variant at work: one step, and the end of what a block left to do."""

    step: Callable[[], None]
    drain: Callable[[], object]


@contextmanager
def _running(name: str, case: Case, model: Any, folder: Path) -> Iterator[_Running]:
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    own = copy.deepcopy(model, shared)
    runs: Any = torch.compile(own, backend=case.backend) if case.mode == "compiled" else own
    ended: Callable[[], object] = _nothing
    drain: Callable[[], object] = _nothing
    with ExitStack() as stack:
        if name in ("loads", "loads-each-step"):
            steps = WINDOW_STEPS if name == "loads" else 1
            counter = stack.enter_context(
                LoadCounter(runs, window_steps=steps, on_window=lambda window: None)
            )
            ended, drain = counter.step, lambda: counter.windows(wait=True)
        elif name in ("sampled", "tokens"):
            sampling: dict[str, Any] = {"every_steps": SAMPLED_STEPS} if name == "sampled" else {}
            recorder = _recorder(runs, folder, name, sampling)
            stack.callback(recorder.close)
            ended, drain = recorder.step, recorder.flush
        forward = _forward(case, runs)

        def step() -> None:
            forward()
            ended()

        yield _Running(step=step, drain=drain)


def _recorder(model: Any, folder: Path, name: str, sampling: dict[str, Any]) -> Recorder:
    if find_spec("pyarrow") is not None:
        return recorder_for(model, folder, model_name=name, on_error="raise", **sampling)
    return Recorder(model, _RawSink(folder.with_suffix(".raw")), on_error="raise", **sampling)


class _RawSink:
    """Writes ids as they come, where nothing is installed that writes data sets."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def append(self, experts_TLK: np.ndarray, **where: Any) -> None:
        """Write tokens."""
        self._file.write(np.ascontiguousarray(experts_TLK).tobytes())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _nothing() -> None:
    pass


def _forward(case: Case, model: Any) -> Callable[[], None]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1024, (case.rows, case.places), generator=generator).to(device)

    def run() -> None:
        with torch.set_grad_enabled(case.train):
            logits = model(input_ids=ids, use_cache=False).logits
            if case.train:
                logits.float().square().mean().backward()
                for parameter in model.parameters():
                    parameter.grad = None

    if case.mode != "graph":
        return run
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def _timed(runs: Sequence[_Running], device: torch.device, *, rounds: int, block_s: float) -> tuple[Any, Any]:
    """Milliseconds of a step, and of what it left to drain, ``[rounds, variants]``."""
    for run in runs:
        _block(run, device, WARM_UP)
    first_s, _ = _block(runs[0], device, WARM_UP)
    steps = max(1, round(block_s / first_s))
    step_s, drain_s = np.zeros((rounds, len(runs))), np.zeros((rounds, len(runs)))
    for number in range(rounds):
        for turn in range(len(runs)):
            at = (number + turn) % len(runs)
            step_s[number, at], drain_s[number, at] = _block(runs[at], device, steps)
    return 1e3 * step_s, 1e3 * drain_s


def _block(run: _Running, device: torch.device, steps: int) -> tuple[float, float]:
    synchronize(device)
    began_s = time.perf_counter()
    for _ in range(steps):
        run.step()
    synchronize(device)
    ended_s = time.perf_counter()
    run.drain()
    return (ended_s - began_s) / steps, (time.perf_counter() - ended_s) / steps


def table(rows: Sequence[Row]) -> str:
    """Return the rows as one Markdown table."""
    lines = [
        "| case | variant | step ms | overhead | p10 to p90 | drain ms |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['case']} | {row['status']}: {row['why']} | | | | |")
            continue
        over = row["overhead"]
        lines.append(
            f"| {row['case']} | {row['variant']} | {row['step_ms']['median']:.3f} | {over['median']:+.2%} | "
            f"{over['p10']:+.2%} to {over['p90']:+.2%} | {row['drain_ms']:.3f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Check and measure, print one table, and write everything as JSON after each case."""
    began_s = time.monotonic()
    arguments = _parser().parse_args(argv)
    given: Path = arguments.out
    file = given if given.suffix == ".json" else given / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if arguments.tiny and not torch.cuda.is_available() else "cuda")
    cases = TINY_CASES if arguments.tiny else CASES
    found: dict[str, Any] = {
        "machine": machine(),
        "cases": [asdict(case) for case in cases],
        "checks": [],
        "rows": [],
    }
    # Compilers last: they take their time, and the figures do not hang on them.
    for compiled in (False, True):
        if arguments.budget > time.monotonic() - began_s:
            found["checks"] += checks(device, compiled=compiled)
        for case in cases:
            if (case.mode == "compiled") == compiled:
                left_s = arguments.budget + began_s - time.monotonic()
                found["rows"] += _row_of(case, device, arguments, left_s=left_s)
                _write(file, found)
    for check in found["checks"]:
        print(f"{check['check']}: {'passed' if check['passed'] else 'FAILED'} {check['why']}".rstrip())
    print(table(found["rows"]))


def _row_of(case: Case, device: torch.device, arguments: argparse.Namespace, *, left_s: float) -> list[Row]:
    """Rows of a case; one that fails is told and costs no other its figures."""
    if left_s <= 0:
        return [{"case": case.name, "status": "skipped", "why": "no time left"}]
    try:
        return measure(case, device=device, rounds=arguments.rounds, block_s=arguments.block)
    except (RuntimeError, PlacementError) as exc:
        return [{"case": case.name, "status": "failed", "why": " ".join(str(exc).split())[:300]}]


def _write(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.recorder", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help=f"JSON file, or a folder for {FILE}")
    parser.add_argument("--tiny", action="store_true", help="in miniature, also on the CPU")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--block", type=float, default=BLOCK_S, help="seconds of each timing")
    parser.add_argument("--budget", type=float, default=95.0, help="seconds after which no case begins")
    return parser


if __name__ == "__main__":
    main()
