"""What a terminal shows of a plan."""

from __future__ import annotations

from typing import Any

import pytest

from placement.cli.planning import tell, text_table


class _Answer:
    def to_dict(self) -> dict[str, Any]:
        return {"plan": "test"}


def test_names_with_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts and cells come out letter by letter, in order."""
    table = text_table(("name", "[n]"), [("[red]model[/red]", "1"), ("[/]", "20")], title="Plans", marked=0)
    tell(
        _Answer(), json=False, output=None, html=None, page=pytest.fail, text=lambda: ["[bold]best[/]", table]
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "[bold]best[/]",
        "Plans",
        "name              [n]",
        "[red]model[/red]    1",
        "[/]                20",
    ]
