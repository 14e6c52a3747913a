"""Expert-parallel training by transformers' Trainer with the placement of a deployment, under torchrun.

One callback is all there is to it: it posts load windows, learns of newer placements, moves experts with
their optimizer state, and clips gradients by their norm over all ranks. Everything about the service comes
from MOE_PLACEMENT_* variables; when it is away, training starts and goes on without it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

from placement.runtime.loop.channel import broadcaster
from placement.runtime.loop.trainer import PlacementCallback
from placement.runtime.parallel.loading import load_expert_parallel
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.samples import resolve_model, sample_texts
from service.client import Fallback, PlacementClient
from traces.record import LoadCounter

CONTEXT = 64
GROUP_S = 120.0
"""Seconds after which a rank that does not answer counts as lost."""


class Progress(TrainerCallback):
    """Prints a line for each step.

    Parameters
    ----------
    placement
        The callback that knows which version runs.
    """

    def __init__(self, placement: PlacementCallback) -> None:
        self._placement = placement

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Print loss and version."""
        loop = self._placement.loop
        if state.is_world_process_zero and loop is not None and "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']:.3f} version {loop.version}", flush=True)


def texts() -> list[dict[str, torch.Tensor]]:
    """Return pieces of the sample texts."""
    text = b"".join(path.read_bytes()[:20_000] for path in sample_texts())
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return [{"input_ids": piece, "labels": piece} for piece in tokens.split(CONTEXT) if len(piece) == CONTEXT]


def arguments_of(options: argparse.Namespace) -> TrainingArguments:
    """Return the Trainer's own arguments."""
    return TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",  # it would hold the experts of rank 0 alone: save_expert_parallel writes all
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )


def train(options: argparse.Namespace, mesh: Mesh) -> None:
    """Train; every rank does the same."""
    checkpoint = resolve_model(options.model)
    fallback = Fallback.of(f"h100:1x{mesh.world_size}", str(checkpoint))
    client = PlacementClient.from_env(fallback=fallback)
    fetched = client.fetch(broadcast=broadcaster())
    if mesh.rank == 0:
        print(f"running with the placement of the {fetched.source}, version {fetched.version}", flush=True)
    parallel = load_expert_parallel(checkpoint, fetched.placement, mesh, dtype=torch.float32)
    counter = LoadCounter(parallel.model, on_error="stop-recording")
    callback = PlacementCallback(
        parallel, client, every_steps=options.every, counter=counter, version=fetched.version
    )
    Trainer(
        model=parallel.model,
        args=arguments_of(options),
        train_dataset=texts(),
        callbacks=[callback, Progress(callback)],
    ).train()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="byte16", help="checkpoint folder, or a bundled sample")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=1, help="steps between looks for a newer placement")
    parser.add_argument("--output", default="trained", help="folder for what the Trainer writes")
    options = parser.parse_args(arguments)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timedelta(seconds=GROUP_S))
    train(options, Mesh.create(timeout_s=GROUP_S))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
