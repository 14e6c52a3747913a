"""Totals that every process of the service adds to, in the transaction of what they count."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.state.tables import counters

__all__ = ["Amounts", "add_counters", "label_text", "labels_of", "read_counters"]

Amounts = Mapping[tuple[str, str], float]
"""``{(name, labels): amount}``, labels as of `label_text`."""


def label_text(**labels: str) -> str:
    """Return labels as the table holds them: ``a=b,c=d`` in order of name."""
    return ",".join(f"{name}={labels[name]}" for name in sorted(labels))


def labels_of(text: str) -> dict[str, str]:
    """Return the labels of `label_text`."""
    return dict(part.split("=", 1) for part in text.split(",")) if text else {}


def add_counters(connection: sa.Connection, amounts: Amounts) -> None:
    """Add to counters, which start at zero, within a transaction."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    # In order of name, so that two transactions never wait for each other.
    rows = [
        {"name": name, "labels": labels, "value": amount}
        for (name, labels), amount in sorted(amounts.items())
        if amount
    ]
    if not rows:
        return
    statement = insert(counters)
    added = statement.on_conflict_do_update(
        index_elements=["name", "labels"],
        set_={"value": counters.c.value + statement.excluded.value},
    )
    connection.execute(added, rows)


def read_counters(connection: sa.Connection) -> dict[tuple[str, str], float]:
    """Return every total."""
    return {(row.name, row.labels): row.value for row in connection.execute(sa.select(counters))}
