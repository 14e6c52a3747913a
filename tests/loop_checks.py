"""What ranks and tests of the loop have in common: models, placements, sources that do as they are told."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from placement.plan import Placement
from placement.runtime.loop.channel import Channel, broadcaster
from placement.runtime.tiny import tiny_model

LAYERS, EXPERTS, DEVICES = 2, 4, 2
STEPS = 8


def shifted(shift: int, *, num_devices: int = DEVICES, num_experts: int = EXPERTS) -> Placement:
    """Return a placement, another one for every shift."""
    return Placement(
        physical_to_logical_map_LS=np.tile(np.roll(np.arange(num_experts), shift), (LAYERS, 1)),
        device_of_slot_S=np.repeat(np.arange(num_devices), num_experts // num_devices),
        num_experts=num_experts,
        num_devices=num_devices,
    )


def model_of(model_type: str = "olmoe") -> Any:
    """Return a tiny model, the same each time."""
    return tiny_model(model_type, num_layers=LAYERS, num_experts=EXPERTS, vocab_size=16)


def tokens(seed: int = 0, *, rows: int = 2, places: int = 8) -> torch.Tensor:
    """Return tokens."""
    return torch.randint(0, 16, (rows, places), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Found:
    """A placement that somebody promoted."""

    placement: Placement
    version: int | None


@dataclass(kw_only=True)
class FakeSource:
    """Gives what was put into it, and keeps what was posted."""

    coming: deque[Found] = field(default_factory=deque)
    posted: list[tuple[int, list[list[int]], float | None, int | None]] = field(default_factory=list)
    polls: int = 0
    closed: bool = False

    def promote(self, placement: Placement, version: int | None) -> None:
        """Have a placement found by the next poll."""
        self.coming.append(Found(placement=placement, version=version))

    def poll(self) -> Found | None:
        """Return the next one."""
        self.polls += 1
        return self.coming.popleft() if self.coming else None

    def post(self, window: int, load_LE: Any, tokens: float | None, *, version: int | None) -> None:
        """Keep a window."""
        self.posted.append((window, np.asarray(load_LE).tolist(), tokens, version))

    def close(self) -> None:
        """Note the end."""
        self.closed = True


@dataclass(frozen=True, kw_only=True)
class FakeWindow:
    """A window."""

    window: int
    load_LE: np.ndarray[Any, np.dtype[np.int64]]
    tokens: int


@dataclass(kw_only=True)
class FakeCounter:
    """One window every two steps, and what is left at the end."""

    steps: int = 0
    ready: list[FakeWindow] = field(default_factory=list)
    closed: bool = False

    def step(self) -> None:
        """Count a step."""
        self.steps += 1
        if self.steps % 2 == 0:
            self._finish()

    def windows(self) -> list[FakeWindow]:
        """Return what is finished."""
        taken, self.ready = self.ready, []
        return taken

    def close(self) -> None:
        """Finish the last one."""
        self.closed = True
        if self.steps % 2:
            self._finish()

    def _finish(self) -> None:
        number = (self.steps - 1) // 2
        load_LE = np.full((LAYERS, EXPERTS), number)
        self.ready.append(FakeWindow(window=number, load_LE=load_LE, tokens=self.steps))


@dataclass(kw_only=True)
class FakeChange:
    """Takes some steps, and then succeeds or not."""

    steps: int
    fails: bool
    target: FakeTarget
    placement: Placement

    @property
    def done(self) -> bool:
        """Whether it has succeeded."""
        return self.steps <= 0 and not self.fails

    @property
    def failed(self) -> bool:
        """Whether it was given up."""
        return self.steps <= 0 and self.fails

    @property
    def failure(self) -> str:
        """Why it was given up."""
        return "a copy was spoilt"

    def advance(self) -> None:
        """Go on."""
        self.steps -= 1
        if self.done:
            self.target.placement = self.placement


@dataclass(kw_only=True)
class FakeTarget:
    """A model of which there is nothing but the placement."""

    placement: Placement = field(default_factory=lambda: shifted(0))
    takes_steps: int = 2
    fails: bool = False
    started: list[int | None] = field(default_factory=list)

    def check(self, placement: Placement) -> None:
        """Refuse other numbers of experts."""
        from placement.errors import InputError

        if placement.num_experts != self.placement.num_experts:
            raise InputError(f"{placement.num_experts} experts do not fit")

    def start(self, placement: Placement, *, version: int | None) -> FakeChange:
        """Begin."""
        self.started.append(version)
        return FakeChange(steps=self.takes_steps, fails=self.fails, target=self, placement=placement)

    def close(self) -> None:
        """Do nothing."""


# What ranks do


def hear(rank: int, messages: list[bytes], beats: int) -> list[tuple[int, bytes]]:
    """Return what came through a channel, and at which beat."""
    channel = Channel(timeout_s=15.0)
    waiting = deque(messages)
    found = []
    for beat in range(beats):
        message = channel.beat(lambda: waiting.popleft() if waiting else None)
        if message is not None:
            found.append((beat, message))
    channel.close()
    return found


def lose_rank_zero(rank: int) -> str:
    """Return what a rank says that waits for one that does not come."""
    from placement.errors import BackendError

    channel = Channel(timeout_s=1.0)
    if rank == 0:
        return "away"
    channel.beat(lambda: None)
    try:
        channel.beat(lambda: None)
    except BackendError as exc:
        return str(exc)
    return "there"


def share(rank: int, number: int) -> tuple[int, bytes]:
    """Return rank 0's number and bytes."""
    channel = Channel(timeout_s=15.0)
    found = channel.share(number + rank)
    payload = broadcaster()(b"bytes of rank 0" if rank == 0 else None)
    channel.close()
    return found, payload


def loop_with_fakes(rank: int, steps: int, every_steps: int) -> tuple[list[int | None], list[int], int]:
    """Return the version after each step, numbers of posted windows, and how often the source was asked."""
    from placement.runtime.loop.loop import PlacementLoop

    source, versions = FakeSource(), []
    loop = PlacementLoop(
        FakeTarget(),
        source,
        every_steps=every_steps,
        counter=FakeCounter(),
        version=1,
        timeout_s=15.0,
        first_window=100 if rank == 0 else 7,
    )
    with loop:
        for step in range(steps):
            if rank == 0 and step == 3:
                source.promote(shifted(1), 2)
            loop.step()
            versions.append(loop.version)
    dist.barrier()
    return versions, [window for window, *_ in source.posted], source.polls


def dataset() -> list[dict[str, torch.Tensor]]:
    """Return what trainers train on."""
    return [{"input_ids": row, "labels": row} for row in tokens(1, rows=16)]


def arguments(folder: str, **given: Any) -> Any:
    """Return a trainer's arguments: a few steps, clipped, on the CPU."""
    from transformers import TrainingArguments

    plain: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(plain | given))


def history_of(trainer: Any) -> list[dict[str, float]]:
    """Return loss and norm of each step."""
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    return [{key: float(row[key]) for key in ("loss", "grad_norm")} for row in rows]


def train_spread(rank: int, folder: str, shifts: dict[int, int]) -> dict[str, Any]:
    """Train on two ranks with the callback; promote placements before some steps."""
    import os

    from transformers import Trainer

    from placement.runtime.loop.trainer import PlacementCallback
    from placement.runtime.parallel.mesh import Mesh
    from placement.runtime.parallel.model import expert_parallel
    from traces.record import LoadCounter

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    model = model_of()
    parallel = expert_parallel(model, shifted(0), Mesh.create(timeout_s=15.0))
    source = _Scheduled(shifts=shifts)
    callback = PlacementCallback(
        parallel, source, every_steps=1, counter=LoadCounter(model), version=1, timeout_s=15.0
    )
    args = arguments(folder, per_device_train_batch_size=1, ddp_backend="gloo")
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), callbacks=[callback])
    trainer.train()
    return {
        "history": history_of(trainer),
        "wrapped": type(trainer.model_wrapped).__name__,
        "versions": [version for *_, version in source.posted],
        "windows": [window - source.posted[0][0] for window, *_ in source.posted],
        "pairs": sum(sum(load[0]) for _, load, *_ in source.posted),
        "where": parallel.placement.count_LED.tolist(),
        "max_grad_norm": args.max_grad_norm,
        "closed": source.closed,
    }


@dataclass(kw_only=True)
class _Scheduled(FakeSource):
    """Promotes another placement at some of its polls."""

    shifts: dict[int, int]

    def poll(self) -> Found | None:
        """Return what is due."""
        self.polls += 1
        shift = self.shifts.get(self.polls)
        return None if shift is None else Found(placement=shifted(shift), version=self.polls + 1)


def serve_spread(rank: int, steps: int, shifts: dict[int, int], spoil: int = 0) -> dict[str, Any]:
    """Serve on two ranks while placements change; the first experts that rank 1 receives may be spoilt."""
    from placement.runtime.loop.loop import PlacementLoop
    from placement.runtime.loop.spread import SpreadModel
    from placement.runtime.parallel.mesh import Mesh
    from placement.runtime.parallel.model import expert_parallel

    left = [spoil if rank == 1 else 0]

    def fault(move: Any, parts: Any) -> None:
        if left[0]:
            left[0] -= 1
            parts[0].view(-1).view(torch.uint8)[0] ^= 1

    whole, model = model_of(), model_of()
    parallel = expert_parallel(model, shifted(0), Mesh.create(timeout_s=15.0))
    model.requires_grad_(False)
    versions, worst = [], 0.0
    target = SpreadModel(parallel, fault=fault)
    with (
        PlacementLoop(target, _Scheduled(shifts=shifts), every_steps=1, version=1, timeout_s=15.0) as loop,
        torch.inference_mode(),
    ):
        for step in range(steps):
            batch = tokens(10 * step + rank)
            off = (model(batch)[0] - whole(batch)[0]).abs().max()
            worst = max(worst, float(off))
            loop.step()
            versions.append((loop.version, parallel.version))
    where = parallel.placement.count_LED.tolist()
    return {"versions": versions, "worst": worst, "where": where, "left": left[0]}


def run_with_service(rank: int, url: str, folder: str) -> dict[str, Any]:
    """Serve on two ranks with a service, until a file says that it is enough; tell in files how it goes."""
    from pathlib import Path

    from placement.model import ModelShape
    from placement.runtime.loop.loop import PlacementLoop
    from placement.runtime.parallel.mesh import Mesh
    from placement.runtime.parallel.model import expert_parallel
    from service.client import Fallback, PlacementClient
    from traces.record import LoadCounter

    shape = ModelShape(
        name="tiny", num_layers=LAYERS, num_experts=EXPERTS, top_k=2, hidden_size=16, expert_hidden_size=8
    )
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MOE_PLACEMENT_DEPLOYMENT": "chat",
        "MOE_PLACEMENT_URL": url,
        "MOE_PLACEMENT_CACHE_DIR": f"{folder}/cache",
        "MOE_PLACEMENT_TIMEOUT": "5",
    }
    client = PlacementClient.from_env(environment, fallback=Fallback.of("h100:1x2", shape), poll_s=1.0)
    fetched = client.fetch(broadcast=broadcaster())
    whole, model = model_of(), model_of()
    parallel = expert_parallel(model, fetched.placement, Mesh.create(timeout_s=15.0))
    model.requires_grad_(False)
    versions, worst = [], 0.0
    with (
        PlacementLoop(
            parallel,
            client,
            every_steps=2,
            counter=LoadCounter(model, window_steps=3),
            version=fetched.version,
            timeout_s=15.0,
        ) as loop,
        torch.inference_mode(),
    ):
        going = torch.ones(1)
        while going:
            batch = tokens(10 * len(versions) + rank)
            worst = max(worst, float((model(batch)[0] - whole(batch)[0]).abs().max()))
            loop.step()
            versions.append(loop.version)
            going[0] = not Path(folder, "enough").exists()
            dist.broadcast(going, src=0)
            if rank == 0:
                Path(folder, "progress").write_text(f"{len(versions)} {loop.version or 0}")
    return {"versions": versions, "worst": worst, "source": fetched.source, "posted": client.posted}
