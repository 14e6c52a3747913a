"""Training under torchrun with the placement of a deployment.

Rank 0 asks the service and broadcasts; every rank applies the placement, trains, and posts how many tokens
its routers sent to each expert. When the service has promoted another placement, all ranks change over
together.

Every rank holds all experts here. Gradients of replicas would have to be summed, so that a deployment for
training has no spare slots.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from placement.errors import ServiceError
from placement.runtime.checkpoint import load_checkpoint
from placement.runtime.hook import apply_placement
from placement.runtime.samples import resolve_model, sample_texts
from service.client import Client, Fallback, Fetched, fetch_on_rank_zero
from traces.record import Recorder

CONTEXT = 64
BATCH = 2


def broadcast(value: Any) -> Any:
    """Return on every rank what rank 0 has."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class LoadCounter:
    """Counts the token-expert pairs of a step, in logical experts; a recorder's sink.

    Parameters
    ----------
    shape
        Layers and experts.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int]) -> None:
        self._load_LE = np.zeros(shape, dtype=np.int64)
        self._recorder = Recorder(model, self, on_error="stop-recording")

    def append(self, experts_TLK: np.ndarray, **where: Any) -> None:
        """Count tokens."""
        for layer, load_E in enumerate(self._load_LE):
            load_E += np.bincount(experts_TLK[:, layer].ravel(), minlength=load_E.size)

    def step(self) -> np.ndarray:
        """Return what was counted since the last step."""
        self._recorder.flush()
        counted, self._load_LE = self._load_LE, np.zeros_like(self._load_LE)
        return counted

    def stop(self) -> None:
        """Take the hooks off."""
        self._recorder.close()

    def close(self) -> None:
        """Do nothing: there is no file."""


def batches(rank: int) -> Any:
    """Yield batches of bytes of the sample texts, others on every rank."""
    text = b"".join(path.read_bytes()[:20_000] for path in sample_texts())
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(rank)
    while True:
        starts = torch.randint(0, len(tokens) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([tokens[start : start + CONTEXT] for start in starts])


def train_step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """Take one step with the mean gradient of all ranks."""
    optimizer.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    optimizer.step()
    return float(loss.detach())


def post(
    client: Client, deployment: str, window: int, load_LE: np.ndarray, version: int | None
) -> int | None:
    """Tell the service what this rank counted; return the version to run. A failure stops nothing."""
    try:
        part = {"window": window, "load": load_LE}
        return client.post_windows(deployment, [part], rank=dist.get_rank(), version=version).version
    except ServiceError as exc:
        sys.stderr.write(f"rank {dist.get_rank()}: window {window} was not posted: {exc}\n")
        return version


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deployment", required=True)
    parser.add_argument("--url", help="the service; MOE_PLACEMENT_URL, else this machine")
    parser.add_argument("--topology", default="h100:1x4", help="what the placement is for")
    parser.add_argument("--cache", help="folder for the last good placement")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds until the service counts as down"
    )
    parser.add_argument("--strict", action="store_true", help="do not start without the service")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train."""
    options = parse(arguments)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    checkpoint = resolve_model("byte16")
    fallback = Fallback.of(options.topology, str(checkpoint))

    def fetch() -> Fetched:
        return fetch_on_rank_zero(
            options.deployment,
            broadcast=broadcast,
            url=options.url,
            cache_dir=options.cache,
            fallback=fallback,
            strict=options.strict,
            timeout_s=options.timeout,
        )

    model = load_checkpoint(checkpoint).float().train()
    fetched = fetch()
    # Numbers of windows must not come again when the job is started anew.
    first_window = broadcast(int(time.time() * 1000))
    with ExitStack() as ending, Client(options.url, deadline_s=5.0, timeout_s=5.0) as client:
        counter = LoadCounter(model, (fallback.model.num_layers, fallback.model.num_experts))
        ending.callback(counter.stop)
        applied = apply_placement(model, fetched.placement)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if rank == 0:
            print(
                f"running with the placement of the {fetched.source}, version {fetched.version}", flush=True
            )
        data = batches(rank)
        for step in range(options.steps):
            loss = train_step(model, optimizer, next(data))
            wanted = post(client, options.deployment, first_window + step, counter.step(), fetched.version)
            if rank == 0:
                print(f"step {step} loss {loss:.3f}", flush=True)
            # Rank 0 decides for all, so that no rank runs with another placement than the others.
            if broadcast(wanted) not in (None, fetched.version):
                applied.detach()
                fetched = fetch()
                applied = apply_placement(model, fetched.placement)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
                if rank == 0:
                    print(f"changed over to version {fetched.version}", flush=True)
        applied.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
