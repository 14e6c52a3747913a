"""Is it right before it is fast: recorded tokens and counted loads against ids read back as they come.

On the CPU it checks the same without pinned memory, streams and CUDA graphs.

Shape letters: L MoE layers, E experts, P places, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from placement.errors import PlacementError
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.tiny import tiny_model
from traces.record import LoadCounter, MemorySink, Recorder
from traces.record.pinned import PinnedRing
from traces.record.transfer import HostTransfer, transfer_from

__all__ = ["checks"]

Row = dict[str, Any]

EXPERTS, PASSES = 6, 12
ROWS, PLACES = 4, 32
HIDDEN = 64
RING_BYTES = 4096
"""Room of a few passes, so that the ring goes round."""


def checks(device: torch.device, *, compiled: bool) -> list[Row]:
    """Run the checks, those without a compiler or those with one, which take a minute on a GPU.

    Rows say what was checked, whether it passed, and why not.
    """
    cuda = device.type == "cuda"
    if compiled:
        modes: dict[str, dict[str, Any]] = {"compiled": {"backend": "aot_eager"}}
        modes |= {"reduce-overhead": {"mode": "reduce-overhead"}} if cuda else {}
        return [_agreement(f"tokens and loads, {name}", device, how) for name, how in modes.items()]
    found = [
        _checked("ids", lambda: _ids_are_those_read_back(device)),
        _agreement("tokens and loads, eager", device, {}),
    ]
    return found + ([_checked("loads of a replayed graph", lambda: _replays_count(device))] if cuda else [])


def _agreement(name: str, device: torch.device, options: dict[str, Any]) -> Row:
    torch.compiler.reset()
    found = _checked(name, lambda: _all_agree(device, options))
    torch.compiler.reset()
    return found


def _checked(name: str, check: Callable[[], bool]) -> Row:
    try:
        return {"check": name, "passed": check(), "why": ""}
    except (RuntimeError, PlacementError) as exc:
        return {"check": name, "passed": False, "why": " ".join(str(exc).split())[:300]}


def _model(device: torch.device) -> Any:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "head_dim": HIDDEN // 2}
    model: Any = tiny_model("olmoe", num_experts=EXPERTS, **sizes)
    # Grouped products of other types wait for the device, which no graph can capture.
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def _batch(seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(ROWS, PLACES, dtype=torch.int64)
    mask[0, : seed % PLACES] = 0
    ids = torch.randint(0, 32, (ROWS, PLACES), generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _load_of(ids_PLK: Any) -> Any:
    return np.stack([np.bincount(ids.ravel(), minlength=EXPERTS) for ids in ids_PLK.swapaxes(0, 1)])


def _ids_are_those_read_back(device: torch.device) -> bool:
    """Recorded tokens are what a hook of its own reads from each router, padding left out."""
    model, sink = _model(device), MemorySink(num_experts=EXPERTS)
    seen: list[torch.Tensor] = []
    for layer in moe_layers_of(model):
        layer.router.register_forward_hook(lambda router, args, output: seen.append(output[2].cpu()))
    expected = []
    with Recorder(model, sink), torch.no_grad():
        for seed in range(PASSES):
            batch = _batch(seed, device)
            model(**batch)
            kept_P = batch["attention_mask"].cpu().flatten().bool()
            expected.append(torch.stack(seen, dim=1)[kept_P].numpy())
            seen.clear()
    return bool(np.array_equal(sink.trace().experts_TLK, np.concatenate(expected)))


def _all_agree(device: torch.device, options: dict[str, Any]) -> bool:
    """In one run: a small pinned ring, a recorder that waits for every pass, and a window for each pass."""
    model = _model(device)
    runs: Any = torch.compile(model, **options) if options else model
    waiting, ringed = MemorySink(num_experts=EXPERTS), MemorySink(num_experts=EXPERTS)
    ring = PinnedRing(transfer_from(device), capacity_bytes=RING_BYTES)
    plain = PinnedRing(HostTransfer())
    with (
        LoadCounter(runs) as counter,
        Recorder(runs, ringed, ring=ring, flush_tokens=ROWS * PLACES),
        Recorder(runs, waiting, ring=plain),
        torch.no_grad(),
    ):
        for seed in range(PASSES):
            runs(**_batch(seed, device))
            counter.step()
    expected, windows = waiting.trace(), counter.windows()
    ends = np.cumsum([window.tokens for window in windows])
    parts = np.split(expected.experts_TLK, ends[:-1])
    return ringed.trace().digest == expected.digest and all(
        np.array_equal(window.load_LE, _load_of(part)) for window, part in zip(windows, parts, strict=True)
    )


def _replays_count(device: torch.device) -> bool:
    """Neither the capture nor the paused warm-up counts; every replay does, with the inputs that it finds."""
    model, static = _model(device), _batch(0, device)
    seen: list[torch.Tensor] = []
    with LoadCounter(model) as counter, torch.no_grad():
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with counter.paused(), torch.cuda.stream(side):
            model(**static)
        torch.cuda.current_stream().wait_stream(side)
        for layer in moe_layers_of(model):
            layer.router.register_forward_hook(lambda router, args, output: seen.append(output[2]))
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(**static)
        expected = []
        for seed in range(PASSES):
            for name, value in _batch(seed, device).items():
                static[name].copy_(value)
            graph.replay()
            counter.step()
            # The graph's own tensors, which hold what this replay selected.
            kept_P = static["attention_mask"].cpu().flatten().bool()
            expected.append(_load_of(torch.stack([ids.cpu() for ids in seen], dim=1)[kept_P].numpy()))
    found = [window.load_LE for window in counter.windows()]
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
