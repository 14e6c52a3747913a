"""Expert-parallel training under torchrun with the placement of a deployment, which may change as it runs.

Rank 0 asks the service and broadcasts; every rank loads the experts of its device alone, trains on texts of
its own, and posts how many tokens its routers sent to each expert. When the service has promoted another
placement, experts and their optimizer state move while training goes on, and all ranks change over after the
same step. When the service is away, training starts and goes on without it.

What is not given here comes from MOE_PLACEMENT_* variables, as SLURM, Kubernetes or Ray hand them on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from placement.runtime.loop.channel import broadcaster
from placement.runtime.loop.loop import PlacementLoop
from placement.runtime.parallel.data_parallel import wrap_ddp
from placement.runtime.parallel.loading import load_expert_parallel
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.samples import resolve_model, sample_texts
from service.client import Fallback, PlacementClient
from traces.record import LoadCounter

CONTEXT = 64
BATCH = 2
GROUP_S = 120.0
"""Seconds after which a rank that does not answer counts as lost."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deployment", help="MOE_PLACEMENT_DEPLOYMENT")
    parser.add_argument("--url", help="the service; MOE_PLACEMENT_URL, else this machine")
    parser.add_argument("--cache", help="folder for the last good placement; MOE_PLACEMENT_CACHE_DIR")
    parser.add_argument("--timeout", type=float, help="seconds until the service counts as down")
    parser.add_argument("--topology", help="what the placement is for; default: h100:1x and the ranks")
    parser.add_argument("--model", default="byte16", help="checkpoint folder, or a bundled sample")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--window", type=int, default=1, help="steps of a load window")
    parser.add_argument("--every", type=int, default=1, help="steps between looks for a newer placement")
    return parser.parse_args(arguments)


def client_of(options: argparse.Namespace, checkpoint: str) -> PlacementClient:
    """Return the job's client: what was given here goes before the environment."""
    given = {
        "deployment": options.deployment,
        "url": options.url,
        "cache_dir": options.cache,
        "timeout_s": options.timeout,
    }
    topology = options.topology or f"h100:1x{dist.get_world_size()}"
    named = {key: value for key, value in given.items() if value is not None}
    return PlacementClient.from_env(fallback=Fallback.of(topology, checkpoint), **named)


def batches(rank: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield batches of bytes of the sample texts, others on every rank."""
    text = b"".join(path.read_bytes()[:20_000] for path in sample_texts())
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(rank)
    while True:
        starts = torch.randint(0, len(tokens) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([tokens[start : start + CONTEXT] for start in starts]).to(device)


def train(options: argparse.Namespace, mesh: Mesh) -> None:
    """Train; every rank does the same."""
    checkpoint = resolve_model(options.model)
    client = client_of(options, str(checkpoint))
    fetched = client.fetch(broadcast=broadcaster())
    say(mesh, f"running with the placement of the {fetched.source}, version {fetched.version}")
    parallel = load_expert_parallel(checkpoint, fetched.placement, mesh, dtype=torch.float32)
    model: Any = wrap_ddp(parallel).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    counter = LoadCounter(parallel.model, window_steps=options.window, on_error="stop-recording")
    data = batches(mesh.rank, mesh.device)
    with PlacementLoop(
        parallel,
        client,
        every_steps=options.every,
        counter=counter,
        optimizer=optimizer,
        version=fetched.version,
    ) as loop:
        for step in range(options.steps):
            tokens = next(data)
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            parallel.clip_grad_norm_(1.0)
            optimizer.step()
            say(mesh, f"step {step} loss {float(loss.detach()):.3f} version {loop.version}")
            loop.step()


def say(mesh: Mesh, line: str) -> None:
    """Print a line, once."""
    if mesh.rank == 0:
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train."""
    options = parse(arguments)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timedelta(seconds=GROUP_S))
    train(options, Mesh.create(timeout_s=GROUP_S))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
