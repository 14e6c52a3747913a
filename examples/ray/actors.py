"""A group of Ray actors with the placement of a deployment.

The driver fetches once; every actor gets the same bytes through the object store, applies them to its model,
and posts how many tokens its routers sent to each expert.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import ray

from placement.runtime.samples import resolve_model
from service.client import Fallback, Fetched, fetch_placement


@ray.remote
class Worker:
    """One process of the group, with a model of its own."""

    def __init__(self, rank: int, placement: bytes) -> None:
        import torch

        from placement.runtime.checkpoint import load_checkpoint
        from placement.runtime.hook import apply_placement

        torch.set_num_threads(1)
        self._rank = rank
        self._fetched = Fetched.decode(placement)
        self._model: Any = load_checkpoint(resolve_model("byte16")).eval()
        self._applied = apply_placement(self._model, self._fetched.placement)

    def run(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Read texts; return the token-expert pairs of logical experts, ``[layers][experts]``."""
        import numpy as np
        import torch

        from traces.record import MemorySink, Recorder

        num_experts = self._fetched.placement.num_experts
        sink = MemorySink(num_experts=num_experts)
        with Recorder(self._model, sink), torch.inference_mode():
            for text in texts:
                self._model(torch.tensor([list(text)]))
        layers = np.moveaxis(sink.trace().experts_TLK, 1, 0)
        return [np.bincount(layer.ravel(), minlength=num_experts).tolist() for layer in layers]

    def post(self, deployment: str, url: str | None, window: int, load: list[list[int]]) -> int | None:
        """Post what was counted; return the version that should run."""
        from service.client import Client

        with Client(url, deadline_s=5.0, timeout_s=5.0) as client:
            part = {"window": window, "load": load}
            taken = client.post_windows(deployment, [part], rank=self._rank, version=self._fetched.version)
        return taken.version


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch, start the actors, let them work, post."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deployment", required=True)
    parser.add_argument("--url", help="the service; MOE_PLACEMENT_URL, else this machine")
    parser.add_argument("--topology", default="h100:1x4", help="what the placement is for")
    parser.add_argument("--cache", help="folder for the last good placement")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)

    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    fetched = fetch_placement(
        options.deployment,
        url=options.url,
        cache_dir=options.cache,
        fallback=Fallback.of(options.topology, str(resolve_model("byte16"))),
    )
    print(f"running with the placement of the {fetched.source}, version {fetched.version}", flush=True)
    shared = ray.put(fetched.encode())
    workers = [Worker.remote(rank, shared) for rank in range(options.workers)]  # type: ignore[attr-defined]
    loads = ray.get([worker.run.remote([b"the same text for every worker"]) for worker in workers])
    if fetched.source == "service":
        window = int(time.time() * 1000)
        posts = [
            worker.post.remote(options.deployment, options.url, window, load)
            for worker, load in zip(workers, loads, strict=True)
        ]
        print(f"posted; version {ray.get(posts)[0]} should run", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
