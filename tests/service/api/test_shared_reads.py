"""Reads that are shared: as true as one's own, whoever else hangs up or fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from service.api.shared_reads import SharedReads
from service.errors import UnavailableError


class Register:
    """A value that changes, read slowly, with a count of the reads."""

    def __init__(self) -> None:
        self.value = 0
        self.num_reads = 0
        self.go = threading.Event()

    def read(self) -> int:
        """Read, then wait until told to go on."""
        self.num_reads += 1
        value = self.value
        assert self.go.wait(10)
        return value


def run(scene: Callable[[SharedReads[int], Register], Awaitable[None]]) -> Register:
    register = Register()
    asyncio.run(scene(SharedReads(), register))  # type: ignore[arg-type]
    return register


def test_nobody_is_told_what_was_read_before_he_asked() -> None:
    """A read that runs when the value changes answers those who came before; all who came later share one."""

    async def scene(shared: SharedReads[int], register: Register) -> None:
        early = asyncio.create_task(shared.get("key", register.read))
        while register.num_reads == 0:
            await asyncio.sleep(0)
        register.value = 1
        late = [asyncio.create_task(shared.get("key", register.read)) for _ in range(50)]
        await asyncio.sleep(0)
        register.go.set()
        assert await early == 0
        assert await asyncio.gather(*late) == [1] * 50

    assert run(scene).num_reads == 2


def test_who_hangs_up_takes_nothing_from_others() -> None:
    """The read goes on for the others."""

    async def scene(shared: SharedReads[int], register: Register) -> None:
        first, second = (asyncio.create_task(shared.get("key", register.read)) for _ in range(2))
        while register.num_reads == 0:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        register.go.set()
        assert await second == 0

    assert run(scene).num_reads == 1


def test_keys_do_not_wait_for_each_other() -> None:
    """A read of one key that hangs holds up no other."""

    async def scene(shared: SharedReads[int], register: Register) -> None:
        hanging = asyncio.create_task(shared.get("one", register.read))
        assert await shared.get("other", lambda: 7) == 7
        register.go.set()
        assert await hanging == 0

    run(scene)


def test_a_failure_reaches_all_and_is_not_kept() -> None:
    """Everyone who shared the read is told; the next read tries again."""

    def fail() -> int:
        raise UnavailableError("away")

    async def scene(shared: SharedReads[int], register: Register) -> None:
        found = await asyncio.gather(*(shared.get("key", fail) for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in found] == [UnavailableError] * 3
        with pytest.raises(UnavailableError, match="away"):
            await shared.get("key", fail)
        assert await shared.get("key", lambda: 3) == 3

    run(scene)
