"""What ranks do in the tests of migration: move a tiny model's experts and look at what became of them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from parallel_checks import difference, loss_of, mesh, outputs_of, random_placement, tokens_of, whole_model

from placement.errors import ExchangeError, InputError
from placement.plan import EMPTY, Placement
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.migration.link import MigrationError, MigrationLink
from placement.runtime.migration.migrate import migrate
from placement.runtime.migration.migration import Migration
from placement.runtime.migration.moves import RowMove
from placement.runtime.migration.setup import Options
from placement.runtime.migration.staging import Staging
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import ParallelModel, expert_parallel
from placement.runtime.parallel.slots import rows_of_rank

LAYERS = 2


def other_placement(before: Placement, seed: int) -> Placement:
    """Other experts in the same slots, replicas and empty ones among them."""
    rng = np.random.default_rng(seed)
    return before.with_layers(np.stack([other_layer(rng, before) for _ in range(before.num_layers)]))


def other_layer(rng: np.random.Generator, before: Placement) -> np.ndarray:
    device_of_slot_S = before.device_of_slot_S
    slots = rng.permutation(before.num_slots)
    expert_S = np.full(before.num_slots, EMPTY)
    expert_S[slots[: before.num_experts]] = rng.permutation(before.num_experts)
    for slot in slots[before.num_experts :]:
        on_device = set(expert_S[device_of_slot_S == device_of_slot_S[slot]])
        others = sorted(set(range(before.num_experts)) - on_device)
        if others and rng.random() < 0.7:
            expert_S[slot] = rng.choice(others)
    return expert_S


@cache
def shared_link() -> MigrationLink:
    """One link for many migrations."""
    return MigrationLink(mesh(), timeout_s=10.0)


def spread(
    seed: int, *, model_type: str = "olmoe", world: Mesh | None = None, train: bool = False
) -> ParallelModel:
    """A tiny model over the ranks."""
    world = world or mesh()
    placement = random_placement(seed, num_layers=LAYERS, num_devices=world.world_size)
    parallel = expert_parallel(whole_model(model_type), placement, world)
    parallel.model.train(train)
    return parallel


@torch.no_grad()
def outputs(parallel: ParallelModel, rank: int) -> torch.Tensor:
    return outputs_of(parallel.model, tokens_of(rank, 7))


def wrong_rows(parallel: ParallelModel, model_type: str = "olmoe") -> list[str]:
    """Rows of this rank whose bits are not those of their expert in the whole model, or zero if empty."""
    wrong = []
    wholes = moe_layers_of(whole_model(model_type))
    rows_C = rows_of_rank(parallel.placement, parallel.mesh.rank)
    for index, (layer, whole) in enumerate(zip(parallel.layers, wholes, strict=True)):
        expert_C = parallel.placement.physical_to_logical_map_LS[index][rows_C]
        for name, parameter in layer.parameters().items():
            expected_E = getattr(whole.experts, name).detach()
            for row, expert in enumerate(expert_C.tolist()):
                expected = torch.zeros_like(expected_E[0]) if expert == EMPTY else expected_E[expert]
                if not torch.equal(parameter.detach()[row], expected):
                    wrong.append(f"layer {index} {name} row {row} expert {expert}")
    return wrong


def found(
    migration: Migration, parallel: ParallelModel, before: torch.Tensor, model_type: str = "olmoe"
) -> dict[str, Any]:
    """What a test wants to know after a migration."""
    after = migration.plan.schedule.after
    return {
        "status": str(migration.status),
        "failure": migration.failure,
        "overlapped": migration.overlapped,
        "report": migration.report,
        "plan": migration.plan.to_dict(),
        "map_LS": parallel.placement.physical_to_logical_map_LS,
        "states": [one.physical_to_logical_map_LS for one in migration.plan.schedule.states()],
        "wanted": after.physical_to_logical_map_LS,
        "version": parallel.version,
        "wrong_rows": wrong_rows(parallel, model_type),
        "difference": difference(outputs(parallel, parallel.mesh.rank), before),
    }


def compared(parallel: ParallelModel, after: Placement) -> dict[str, bool]:
    """Whether devices, and slots, have the experts of a placement."""
    now = parallel.placement
    maps = (now.physical_to_logical_map_LS, after.physical_to_logical_map_LS)
    return {
        "sets_are_wanted": np.array_equal(now.count_LED, after.count_LED),
        "rows_are_wanted": np.array_equal(*maps),
    }


def until_the_end(migration: Migration, parallel: ParallelModel) -> list[torch.Tensor]:
    """Passes with an `advance` after each; return what they gave."""
    passes = []
    for _ in range(200):
        if migration.done or migration.failed:
            break
        passes.append(outputs(parallel, parallel.mesh.rank))
        migration.advance()
    return passes


def migrate_while_running(
    rank: int, seed: int, how: dict[str, Any], model_type: str = "olmoe"
) -> dict[str, Any]:
    """Passes with an `advance` after each; the outputs of every pass are compared."""
    parallel = spread(seed, model_type=model_type)
    before = outputs(parallel, rank)
    after = other_placement(parallel.placement, seed + 1)
    migration = migrate(parallel, after, options=Options(**how), link=shared_link())
    passes = until_the_end(migration, parallel)
    result = found(migration, parallel, before, model_type) | compared(parallel, after)
    return result | {
        "passes": len(passes),
        "worst": max((difference(one, before) for one in passes), default=0.0),
    }


def migrate_now(rank: int, seed: int, how: dict[str, Any]) -> dict[str, Any]:
    """All rounds at once."""
    parallel = spread(seed)
    before = outputs(parallel, rank)
    after = other_placement(parallel.placement, seed + 1)
    migration = migrate(parallel, after, options=Options(**how), link=shared_link(), version=41)
    migration.run()
    return found(migration, parallel, before) | compared(parallel, after)


def migrate_some_ranks(rank: int) -> list[bool]:
    """Two of three ranks have a mesh of their own, and migrate twice with links of their own."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return []
    parallel = spread(3, world=Mesh.create(group=group, timeout_s=10.0))
    done = []
    for seed in (4, 5):
        after = other_placement(parallel.placement, seed)
        migrate(parallel, after).run()
        done.append(compared(parallel, after)["sets_are_wanted"] and not wrong_rows(parallel))
    return done


def advance_alone(rank: int) -> bool:
    """Rank 0 advances on and on while the others do nothing at all; then all go on together."""
    parallel = spread(6)
    migration = migrate(parallel, other_placement(parallel.placement, 7), link=shared_link())
    if rank == 0:
        for _ in range(20):
            migration.advance()
    dist.barrier()
    rounds = migration.report.rounds
    with suppress(InputError):
        migrate(parallel, parallel.placement, link=shared_link())
        rounds = -1  # two at a time over one link would mix their copies
    until_the_end(migration, parallel)
    return rounds == 0 and migration.done and not wrong_rows(parallel)


def spoil(target: int) -> Any:
    """A fault that flips one bit of what reaches a rank."""

    def fault(moves: Sequence[RowMove], message: torch.Tensor) -> None:
        if moves[-1].target == target:
            message[len(message) // 2] ^= 4

    return fault


def spoil_then_mend(rank: int, seed: int, how: dict[str, Any]) -> list[dict[str, Any]]:
    """Two migrations whose copies to rank 1 are spoilt, and at once a third one that works."""
    parallel = spread(seed)
    before = outputs(parallel, rank)
    after = other_placement(parallel.placement, seed + 1)
    results = []
    for fault in (spoil(1), spoil(1), None):
        migration = migrate(parallel, after, options=Options(**how), link=shared_link(), fault=fault)
        until_the_end(migration, parallel)
        results.append(found(migration, parallel, before))
    return results


def run_out_of_memory(rank: int) -> dict[str, Any]:
    """One rank cannot hold what it is to receive."""
    parallel = spread(6)
    before = outputs(parallel, rank)

    def full(staging: Staging, sizes: Sequence[int]) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    link = MigrationLink(mesh(), timeout_s=2.0)
    with patch.object(Staging, "take", full) if rank == 1 else nullcontext():
        migration = migrate(parallel, other_placement(parallel.placement, 7), link=link)
        until_the_end(migration, parallel)
    return found(migration, parallel, before)


def come_late(rank: int) -> dict[str, Any]:
    """A rank's copies begin after the others' time limit; the link is of no more use, a new one is."""
    parallel = spread(6)
    before = outputs(parallel, rank)
    after = other_placement(parallel.placement, 7)
    link, how = MigrationLink(mesh(), timeout_s=2.0), Options(overlap=False)
    migration = migrate(parallel, after, link=link, options=how)
    start = dist.batch_isend_irecv

    def late(operations: list[dist.P2POp]) -> list[dist.Work]:
        time.sleep(3.0)
        return start(operations)

    with patch.object(dist, "batch_isend_irecv", late if rank == 1 else start):
        migration.advance()
    result = found(migration, parallel, before)
    messages = []
    for again in (link, shared_link()):
        try:
            migrate(parallel, after, link=again, options=how).run()
        except MigrationError as exc:
            messages.append(str(exc))
    return result | {"messages": messages} | compared(parallel, after)


def refuse(rank: int, what: str) -> str:
    """Ask for what cannot be."""
    parallel = spread(5)
    after = other_placement(parallel.placement, 6)
    how: dict[str, Any] = {}
    if what == "slots" and rank == 1:
        after = Placement(
            physical_to_logical_map_LS=np.tile(np.arange(6), (LAYERS, 1)),
            device_of_slot_S=np.zeros(6, dtype=np.int64),
            num_experts=6,
            num_devices=after.num_devices,
        )
    if what == "other":
        after = other_placement(parallel.placement, 6 + rank)
    if what == "options":
        how["staging"] = 1 + rank
    if what == "state":
        parameter = next(iter(parallel.layers[0].parameters().values()))
        optimizer = torch.optim.SGD(parallel.model.parameters(), lr=0.1)
        optimizer.state[parameter]["preconditioner"] = torch.zeros(3, 3)
        migrate(parallel, after, optimizers=[optimizer], link=shared_link())
    migrate(parallel, after, options=Options(**how), link=shared_link())
    return "migrated"


def train(rank: int, seed: int, how: str) -> dict[str, float]:
    """Three steps of Adam with a migration between, against the same without; return the differences."""
    still, moving = _trained(rank, seed, how, moves=False), _trained(rank, seed, how, moves=True)
    result = {"outputs": difference(outputs(moving[0], rank), outputs(still[0], rank))}
    expected, actual = _logical(*still), _logical(*moving)
    keys = [set(one) for one in (*expected, *actual)]
    everything = {key: value for one in expected for key, value in one.items()}
    for one in actual:
        for key, value in one.items():
            result[str(key)] = difference(torch.from_numpy(value), torch.from_numpy(everything[key]))
    assert all(keys)
    moved = not np.array_equal(still[0].placement.count_LED, moving[0].placement.count_LED)
    return result | {"unmoved": 0.0 if moved else 1.0}


def _trained(rank: int, seed: int, how: str, *, moves: bool) -> tuple[ParallelModel, torch.optim.Optimizer]:
    parallel = spread(seed, train=True)
    optimizer = torch.optim.AdamW(parallel.model.parameters(), lr=1e-3)
    after = other_placement(parallel.placement, seed + 1)
    migration = None
    for step in range(4):
        for half in range(2):
            loss_of(outputs_of(parallel.model, tokens_of(rank, 10 * step + half)), step).backward()
            if moves and step == 1 and half == 0 and how == "between micro-batches":
                migrate(parallel, after, optimizers=[optimizer], link=shared_link()).run()
        _average_others(parallel)
        optimizer.step()
        if moves and step == 0 and how == "step by step":
            migration = migrate(parallel, after, optimizers=[optimizer], link=shared_link())
            assert not migration.overlapped
        optimizer.zero_grad()
        if migration is not None:
            migration.advance()
    if migration is not None:
        migration.run()
    return parallel, optimizer


def _average_others(parallel: ParallelModel) -> None:
    experts = set(parallel.expert_parameters())
    for name, parameter in parallel.model.named_parameters():
        if name not in experts and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _logical(parallel: ParallelModel, optimizer: torch.optim.Optimizer) -> list[dict[Any, np.ndarray]]:
    """Weights and moments of every rank's experts, by layer, expert and name."""
    mine = {}
    rows_C = rows_of_rank(parallel.placement, parallel.mesh.rank)
    for index, layer in enumerate(parallel.layers):
        expert_C = parallel.placement.physical_to_logical_map_LS[index][rows_C]
        for name, parameter in layer.parameters().items():
            state = optimizer.state[parameter]
            for key, value in {"weight": parameter, **state}.items():
                for row, expert in enumerate(expert_C.tolist()):
                    if expert != EMPTY and value.ndim:
                        mine[index, expert, name, key] = value.detach()[row].numpy()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def change_weights_meanwhile(rank: int) -> dict[str, Any]:
    """Weights that change while they travel, and nobody said so."""
    parallel = spread(5)
    before = outputs(parallel, rank)
    migration = migrate(parallel, other_placement(parallel.placement, 6), link=shared_link())
    while not migration.failed:
        outputs(parallel, rank)
        with torch.no_grad():
            for parameter in parallel.expert_parameters().values():
                parameter.mul_(1.0)
        migration.advance()
    return found(migration, parallel, before)


def lose_a_rank(rank: int, commit: str, at_round: int) -> dict[str, Any]:
    """A rank dies while it receives; the others are told within the time limit and keep what they have."""
    world = Mesh.create(timeout_s=5.0)
    parallel = spread(6, world=world)
    arrivals = 0

    def die(moves: Sequence[RowMove], message: torch.Tensor) -> None:
        nonlocal arrivals
        arrivals += 1
        if rank == 1 and arrivals > at_round:
            os._exit(1)

    migration = migrate(
        parallel,
        other_placement(parallel.placement, 7),
        options=Options(commit=commit),
        timeout_s=3.0,
        fault=die,
    )
    before = parallel.placement.physical_to_logical_map_LS
    try:
        migration.run()
    except MigrationError as exc:
        message = str(exc)
    return {
        "message": message,
        "status": str(migration.status),
        "map_LS": parallel.placement.physical_to_logical_map_LS,
        "states": [before, *(one.physical_to_logical_map_LS for one in migration.plan.schedule.states())],
        "wrong_rows": wrong_rows(parallel),
    }


def lose_a_rank_while_running(rank: int) -> dict[str, Any]:
    """A rank dies between two steps of an overlapped migration: the next pass says so, nothing hangs."""
    world = Mesh.create(timeout_s=5.0)
    parallel = spread(6, world=world)
    before = parallel.placement.physical_to_logical_map_LS
    migration = migrate(parallel, other_placement(parallel.placement, 7), timeout_s=3.0)
    if rank == 1:
        os._exit(1)
    message = ""
    try:
        outputs(parallel, rank)
    except ExchangeError as exc:
        message = str(exc)
    migration.abandon(message)
    return {
        "message": message,
        "failed": migration.failed,
        "kept": np.array_equal(parallel.placement.physical_to_logical_map_LS, before),
        "wrong_rows": wrong_rows(parallel),
    }


def never_pass(rank: int) -> str:
    """A rank's copies fail and no pass follows in which it could say so: it says so itself."""
    link = MigrationLink(mesh(), timeout_s=0.5)
    parallel = spread(6)
    migration = migrate(parallel, other_placement(parallel.placement, 7), link=link, fault=spoil(1))
    try:
        for _ in range(200):
            migration.advance()
            time.sleep(0.01)
    except MigrationError as exc:
        return str(exc)
    return "waits"
