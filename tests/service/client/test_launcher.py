"""A job gets its placement whatever state the service is in, and never one that is none."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.errors import InputError, ServiceError
from placement.io import dump_json, placement_to_dict
from placement.model import ModelShape
from placement.plan import Placement
from placement.topology import parse_topology
from service.client import Fallback, Fetched, fetch_on_rank_zero, fetch_placement
from service.client.cache import Kept, PlacementCache
from tests.service.client.scripted_server import ScriptedServer, answer, drop, json_answer, problem, stall
from tests.service.server import free_port

MODEL = ModelShape(name="tiny", num_layers=2, num_experts=4, top_k=2, hidden_size=8, expert_hidden_size=8)
JOB = Fallback.of("h100:1x2", MODEL)


def placement_of(num_experts: int = 4, num_devices: int = 2) -> Placement:
    """Return a placement that is not the contiguous one."""
    return Placement(
        physical_to_logical_map_LS=np.tile(np.arange(num_experts)[::-1], (2, 1)),
        device_of_slot_S=np.repeat(np.arange(num_devices), num_experts // num_devices),
        num_experts=num_experts,
        num_devices=num_devices,
    )


def file_of(placement: Placement) -> bytes:
    """Return a placement's file."""
    return dump_json(placement_to_dict(placement)).encode()


GOOD = file_of(placement_of())


def serving(content: bytes = GOOD, *, version: int = 3, etag: str = '"sha256:aa"') -> Any:
    """Return a step that hands out a placement."""
    return answer(200, content, content_type="application/json", etag=etag, x_placement_version=str(version))


def nowhere() -> str:
    """Return the URL of a service that is down."""
    return f"http://127.0.0.1:{free_port()}"


def maps(placement: Placement) -> list[list[int]]:
    """Return the experts of the slots."""
    found: list[list[int]] = placement.physical_to_logical_map_LS.tolist()
    return found


def test_the_service_goes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it answers is used, kept, and nothing is said."""
    with ScriptedServer(serving()) as server:
        found = fetch_placement("chat", url=server.url, cache_dir=tmp_path, fallback=JOB)
    assert (found.source, found.version, found.etag, found.said) == ("service", 3, '"sha256:aa"', ())
    assert found.content == GOOD
    assert maps(found.placement) == [[3, 2, 1, 0]] * 2
    assert (tmp_path / "chat.placement").exists()
    assert capsys.readouterr().err == ""


def test_what_is_kept_is_not_sent_again(tmp_path: Path) -> None:
    """The next start asks whether it still is the one, and takes it from disk if so."""
    unchanged = answer(304, etag='"sha256:aa"', x_placement_version="3")
    with ScriptedServer(serving(), unchanged) as server:
        fetch_placement("chat", url=server.url, cache_dir=tmp_path)
        again = fetch_placement("chat", url=server.url, cache_dir=tmp_path)
    assert server.requests[1].headers["if-none-match"] == '"sha256:aa"'
    assert (again.source, again.version, again.content) == ("service", 3, GOOD)


@pytest.mark.parametrize(
    "failing",
    [
        drop(),
        stall(),
        problem(503, "unavailable"),
        problem(404, "not-found", "chat has no placement yet"),
        problem(401, "unauthorized"),
        answer(200, b"<html>"),
        answer(200, b"{}"),
        serving(GOOD[: len(GOOD) // 2]),
        serving(file_of(placement_of(num_experts=8))),
        serving(file_of(placement_of(num_devices=4))),
        answer(200, GOOD, x_placement_id="sha256:" + "0" * 64),
    ],
)
def test_then_the_last_good_one(tmp_path: Path, failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is wrong with the service, the job runs with what was good, and says so."""
    with ScriptedServer(serving(), failing) as server:
        fetch_placement("chat", url=server.url, cache_dir=tmp_path, fallback=JOB)
        found = fetch_placement("chat", url=server.url, cache_dir=tmp_path, fallback=JOB, timeout_s=0.3)
    assert (found.source, found.version, found.content) == ("cache", 3, GOOD)
    error = capsys.readouterr().err
    assert "WARNING: no placement of chat from the service" in error
    assert "last good placement, version 3" in error
    assert len(found.said) == 2
    assert (tmp_path / "chat.placement").read_bytes().endswith(GOOD)


def test_then_experts_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing kept, experts lie in order, as the engine would lay them."""
    found = fetch_placement("chat", url=nowhere(), cache_dir=tmp_path, fallback=JOB, timeout_s=0.3)
    assert (found.source, found.version) == ("contiguous", None)
    assert maps(found.placement) == [[0, 1, 2, 3]] * 2
    assert found.placement.device_of_slot_S.tolist() == [0, 0, 1, 1]
    assert json.loads(found.content)["provenance"]["solver"] == "contiguous"
    assert "experts in order" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_then_nothing(tmp_path: Path) -> None:
    """Who does not say what the job is gets an error of the network."""
    with pytest.raises(ServiceError, match="no topology and model") as raised:
        fetch_placement("chat", url=nowhere(), cache_dir=tmp_path, timeout_s=0.3)
    assert raised.value.exit_code == 5


@pytest.mark.parametrize("failing", [drop(), problem(404, "not-found"), answer(200, b"{}")])
def test_strict_takes_nothing_else(tmp_path: Path, failing: Any) -> None:
    """With strict only the service's own answer will do."""
    with ScriptedServer(serving(), failing) as server:
        fetch_placement("chat", url=server.url, cache_dir=tmp_path, fallback=JOB)
        with pytest.raises(ServiceError) as raised:
            fetch_placement(
                "chat", url=server.url, cache_dir=tmp_path, fallback=JOB, strict=True, timeout_s=0.3
            )
    assert raised.value.exit_code == 5


def test_a_wrong_token_file_is_said_and_passed_over(tmp_path: Path) -> None:
    """A job must start though its secret was mounted wrongly."""
    token = tmp_path / "token"
    token.write_text("mp_a_secret")
    token.chmod(0o644)
    found = fetch_placement("chat", url=nowhere(), token_file=token, fallback=JOB, timeout_s=0.3)
    assert found.source == "contiguous"
    assert "chmod" in found.said[0]
    assert "mp_a_secret" not in "".join(found.said)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """The placement of the service is used all the same."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with ScriptedServer(serving()) as server:
        found = fetch_placement("chat", url=server.url, cache_dir=blocked / "cache")
    assert found.source == "service"
    assert "could not be kept" in found.said[-1]


def test_waiting_for_a_first_placement(tmp_path: Path) -> None:
    """A job that is started together with its first solve may wait for it."""
    none_yet = problem(404, "not-found", "no placement yet")
    with ScriptedServer(
        none_yet, none_yet, json_answer({"name": "chat", "version": None}), serving()
    ) as server:
        assert fetch_placement("chat", url=server.url, wait_s=20).source == "service"


@pytest.mark.parametrize("name", ["../chat", "", "a/b", ".x", "a b", "x" * 300])
def test_names_of_deployments_are_names(tmp_path: Path, name: str) -> None:
    """No name leads out of the folder."""
    with pytest.raises((InputError, ServiceError)):
        fetch_placement(name, url=nowhere(), cache_dir=tmp_path, strict=True, timeout_s=0.3)


@pytest.mark.parametrize(
    ("topology", "experts", "expected"),
    [
        ("h100:1x4", 8, [0, 0, 1, 1, 2, 2, 3, 3]),
        ("h100:1x3", 4, [0, 0, 1, 1, 2, 2]),
        ("a40:1x1+v100:1x1", 4, [0, 0, 1, 1]),
    ],
)
def test_experts_in_order_for_any_cluster(topology: str, experts: int, expected: list[int]) -> None:
    """Where experts do not divide evenly some slots stay empty."""
    model = ModelShape(
        name="m", num_layers=3, num_experts=experts, top_k=1, hidden_size=8, expert_hidden_size=8
    )
    found = Fallback.of(topology, model).contiguous()
    assert found.device_of_slot_S.tolist() == expected
    assert found.num_layers == 3
    assert [expert for expert in maps(found)[0] if expert >= 0] == list(range(experts))


def test_a_topology_with_slots_of_its_own_is_kept_to() -> None:
    """Experts lie in order within the slots that each device has."""
    topology = {
        "nodes": [{"kind": "h100", "devices": 1, "slots": 3}, {"kind": "h100", "devices": 1, "slots": 1}]
    }
    found = Fallback.of(topology, MODEL).contiguous()
    assert found.device_of_slot_S.tolist() == [0, 0, 0, 1]
    assert maps(found) == [[0, 1, 2, 3]] * 2


def damaged() -> st.SearchStrategy[bytes]:
    """Return strategies of what may be in a cache file."""
    good = Kept(label="chat", content=GOOD, version=3, etag='"x"').encode().encode()
    documents = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=7),
        max_leaves=30,
    )
    signed = documents.map(
        lambda found: Kept(label="chat", content=json.dumps(found).encode()).encode().encode()
    )
    flipped = st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)).map(
        lambda at: good[: at[0]] + bytes([at[1]]) + good[at[0] + 1 :]
    )
    cut = st.integers(0, len(good)).map(lambda end: good[:end])
    tables = st.lists(st.lists(st.integers(-2, 5), min_size=1, max_size=5), min_size=1, max_size=3)
    near = st.fixed_dictionaries(
        {
            "physical_to_logical_map": tables | documents,
            "device_of_slot": st.lists(st.integers(-1, 2), max_size=5) | documents,
        },
        optional=dict.fromkeys(KEYS, documents),
    ).map(lambda found: Kept(label="chat", content=json.dumps(found).encode()).encode().encode())
    return st.one_of(st.binary(max_size=300), signed, flipped, cut, near, st.just(good))


KEYS = ["format", "model", "num_layers", "num_experts", "num_devices", "moe_layer_ids", "sha256", "label"]


@given(content=damaged())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_on_disk_are_taken_for_a_placement_that_they_are_not(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is in the file, the job gets a placement that is valid and fits it."""
    (tmp_path / "chat.placement").write_bytes(content)
    url = "http://127.0.0.1:9"
    found = fetch_placement("chat", url=url, cache_dir=tmp_path, fallback=JOB, timeout_s=0.02)
    found.placement.check()
    JOB.check(found.placement)
    assert found.source in ("cache", "contiguous")
    if found.source == "cache":
        assert content.endswith(found.content)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe or a folder in the place of the file is passed over."""
    os.mkfifo(tmp_path / "chat.placement")
    (tmp_path / "other.placement").mkdir()
    for name in ("chat", "other"):
        assert (
            fetch_placement(name, url=nowhere(), cache_dir=tmp_path, fallback=JOB, timeout_s=0.2).source
            == "contiguous"
        )


def test_the_files_of_others_are_not_taken(tmp_path: Path) -> None:
    """A file that was copied from another deployment is passed over."""
    cache = PlacementCache(tmp_path)
    cache.write("chat", Kept(label="chat", content=GOOD))
    (tmp_path / "chat.placement").rename(tmp_path / "code.placement")
    found = fetch_placement("code", url=nowhere(), cache_dir=tmp_path, fallback=JOB, timeout_s=0.2)
    assert found.source == "contiguous"
    assert "belongs to 'chat'" in found.said[0]


def test_files_are_written_whole(tmp_path: Path) -> None:
    """Many writers and readers at once never see half a file."""
    contents = [file_of(placement_of()) + b" " * size for size in (0, 100_000, 3)]
    cache = PlacementCache(tmp_path)
    cache.write("chat", Kept(label="chat", content=contents[0]))
    failures: list[BaseException] = []

    def write(content: bytes) -> None:
        for _ in range(20):
            cache.write("chat", Kept(label="chat", content=content))

    def read() -> None:
        for _ in range(60):
            try:
                kept = cache.read("chat")
                assert kept is not None
                assert kept.content in contents
            except (InputError, AssertionError) as exc:
                failures.append(exc)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["chat.placement"]


# Ranks


def of_rank(rank: int, size: int = 3, **more: str) -> dict[str, str]:
    """Return a launcher's environment."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), **more}


def on_ranks(size: int, work: Callable[[int], Fetched]) -> list[Fetched | Exception]:
    """Run one thread for each rank."""
    results: list[Fetched | Exception] = [RuntimeError()] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except (ServiceError, InputError) as exc:
            results[rank] = exc

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_one_rank_asks_and_all_get_it_by_file(tmp_path: Path) -> None:
    """Three ranks, one request, one placement."""
    run = {"TORCHELASTIC_RUN_ID": "job/7 ü", "TORCHELASTIC_RESTART_COUNT": "2"}
    with ScriptedServer(serving()) as server:
        found = on_ranks(
            3,
            lambda rank: fetch_on_rank_zero(
                "chat", shared_dir=tmp_path, environment=of_rank(rank, **run), url=server.url
            ),
        )
    assert len(server.requests) == 1
    assert [(one.content, one.source, one.version) for one in found] == [(GOOD, "service", 3)] * 3  # type: ignore[union-attr]


@pytest.mark.parametrize("by_file", [True, False])
def test_all_ranks_learn_that_there_is_none(tmp_path: Path, by_file: bool) -> None:
    """Where rank 0 fails no other rank waits or runs with something else."""
    barrier, box = threading.Barrier(3), [b""]

    def broadcast(payload: bytes | None) -> bytes:
        if payload is not None:
            box[0] = payload
        barrier.wait(10)
        return box[0]

    way: dict[str, Any] = {"shared_dir": tmp_path} if by_file else {"broadcast": broadcast}
    found = on_ranks(
        3,
        lambda rank: fetch_on_rank_zero(
            "chat",
            environment=of_rank(rank, SLURM_JOB_ID="12"),
            url=nowhere(),
            strict=True,
            timeout_s=0.3,
            **way,
        ),
    )
    assert [type(one) for one in found] == [ServiceError] * 3
    assert {one.exit_code for one in found} == {5}  # type: ignore[union-attr]


def test_a_broadcast_needs_no_file() -> None:
    """What rank 0 fell back on is what the others run, said and all."""
    barrier, box = threading.Barrier(2), [b""]

    def broadcast(payload: bytes | None) -> bytes:
        if payload is not None:
            box[0] = payload
        barrier.wait(10)
        return box[0]

    found = on_ranks(
        2,
        lambda rank: fetch_on_rank_zero(
            "chat",
            broadcast=broadcast,
            environment=of_rank(rank, 2),
            url=nowhere(),
            fallback=JOB,
            timeout_s=0.3,
        ),
    )
    assert [one.source for one in found] == ["contiguous"] * 2  # type: ignore[union-attr]
    assert found[0].said == found[1].said  # type: ignore[union-attr]
    assert maps(found[1].placement) == [[0, 1, 2, 3]] * 2  # type: ignore[union-attr]


def test_a_start_does_not_take_what_another_left(tmp_path: Path) -> None:
    """After a restart ranks wait for the new rank 0, not for the file of the old one."""
    old = of_rank(0, SLURM_JOB_ID="12")
    new = of_rank(1, SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1")
    with ScriptedServer(serving()) as server:
        fetch_on_rank_zero("chat", shared_dir=tmp_path, environment=old, url=server.url)
        with pytest.raises(ServiceError, match="rank 0 left no placement"):
            fetch_on_rank_zero(
                "chat", shared_dir=tmp_path, environment=new, url=server.url, timeout_s=0.1, grace_s=0.2
            )


@pytest.mark.parametrize("environment", [of_rank(0), of_rank(1, TORCHELASTIC_RUN_ID="none")])
def test_ranks_need_a_way_to_share(tmp_path: Path, environment: dict[str, str]) -> None:
    """Without broadcast and without a run id nothing is guessed."""
    with pytest.raises(InputError, match="run id"):
        fetch_on_rank_zero("chat", shared_dir=tmp_path, environment=environment, url=nowhere())
    with pytest.raises(InputError, match="broadcast= or shared_dir="):
        fetch_on_rank_zero("chat", environment=environment, url=nowhere())


def test_a_lone_process_just_fetches() -> None:
    """Without a launcher there is one rank."""
    with ScriptedServer(serving()) as server:
        assert fetch_on_rank_zero("chat", environment={}, url=server.url).source == "service"


def test_the_fallback_reads_names() -> None:
    """Topology and model are named as on the command line."""
    found = Fallback.of(parse_topology("h100:2x8"), "deepseek-v3")
    assert found.contiguous().num_devices == 16
    with pytest.raises(InputError):
        Fallback.of("h100:2x8", "no-such-model")
