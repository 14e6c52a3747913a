"""What is compiled after an installation."""

from __future__ import annotations

import pytest

from placement.errors import InputError
from placement.solvers.compile import PARTS, compile_kernels


def test_parts_are_named() -> None:
    """A part that does not exist is refused with those that do."""
    with pytest.raises(InputError, match=f"no part 'serach' to compile; name one of {', '.join(PARTS)}"):
        compile_kernels(["serach"])


def test_a_part_alone_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name means all parts, one means it alone."""
    run: list[str] = []
    for part in PARTS:
        monkeypatch.setitem(PARTS, part, lambda part=part: run.append(part))
    compile_kernels(["solvers"])
    compile_kernels()
    assert run == ["solvers", "search", "solvers"]
