"""The model whose experts are spread over ranks: its placement changes by live migration."""

from __future__ import annotations

from typing import Any

import torch

from placement.errors import InputError
from placement.plan import Placement
from placement.runtime.migration.link import MigrationLink
from placement.runtime.migration.migrate import migrate
from placement.runtime.migration.migration import Migration
from placement.runtime.migration.report import MigrationStatus
from placement.runtime.parallel.model import ParallelModel

__all__ = ["Migrating", "SpreadModel"]


class Migrating:
    """A migration under way."""

    def __init__(self, migration: Migration) -> None:
        self.migration = migration

    @property
    def done(self) -> bool:
        """Whether the new placement runs."""
        return self.migration.status is MigrationStatus.DONE

    @property
    def failed(self) -> bool:
        """Whether it was given up."""
        return self.migration.status is MigrationStatus.FAILED

    @property
    def failure(self) -> str:
        """Why it was given up."""
        return self.migration.failure

    def advance(self) -> None:
        """Do what can be done between two steps.

        Raises
        ------
        MigrationError
            If a rank is lost.
        """
        self.migration.advance()


class SpreadModel:
    """An expert-parallel model.

    Parameters
    ----------
    parallel
        What runs.
    optimizer
        What trains it, if anything does: its state moves along.
    link
        Groups for migrations, closed by whoever made them. By default they are made here, by all ranks: later
        a step would have to wait for them, and memory might be short.
    options
        Further options of `placement.runtime.migration.migrate.migrate`.
    """

    def __init__(
        self,
        parallel: ParallelModel,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        link: MigrationLink | None = None,
        **options: Any,
    ) -> None:
        self.parallel = parallel
        self._link = link or MigrationLink(parallel.mesh)
        self._owns_link = link is None
        self._optimizers = () if optimizer is None else (optimizer,)
        self._options = options
        self._change: Migrating | None = None

    @property
    def placement(self) -> Placement:
        """What runs."""
        return self.parallel.placement

    def check(self, placement: Placement) -> None:
        """Check that a placement can take the place of the one that runs.

        Raises
        ------
        InputError
            If layers, experts or the slots of any device differ.
        """
        self.parallel.check_slots(placement)

    def start(self, placement: Placement, *, version: int | None) -> Migrating:
        """Begin to move experts.

        Raises
        ------
        InputError
            If they cannot be moved, or a rank was lost in an earlier migration.
        MigrationError
            If a rank does not answer.
        """
        if self._link.broken:
            raise InputError(f"nothing is moved any more since a migration broke off: {self._link.broken}")
        migration = migrate(
            self.parallel,
            placement,
            optimizers=self._optimizers,
            link=self._link,
            version=version,
            **self._options,
        )
        self._change = Migrating(migration)
        return self._change

    def close(self) -> None:
        """Give up what is under way, and the groups."""
        if self._change is not None:
            self._change.migration.abandon("the loop has ended")
        if self._owns_link and not self._link.broken:
            self._link.close()
