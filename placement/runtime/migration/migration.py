"""A live change of placement: rounds of copies, each switched over by all ranks at the same step.

Weights that stay as they are (serving, evaluation) travel while the model runs. A rank that has its share of
a round, verified, says so with its next exchanges of tokens (`Control`); once all have said it, all see it
after the same pass, and the next `advance` switches over: no barrier, and no rank ever runs with another
placement than the others.

Weights that a step changes (training) would be stale on arrival. There each `advance` carries out one round
between two steps: copies, checks and switch, with the ranks waiting for each other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from placement.errors import InputError
from placement.runtime.migration.checksum import RowChecksum
from placement.runtime.migration.link import MigrationError, MigrationLink
from placement.runtime.migration.plan import MigrationPlan
from placement.runtime.migration.report import MigrationReport, MigrationStatus
from placement.runtime.migration.rows import LayerRows
from placement.runtime.migration.schedule import Round
from placement.runtime.migration.setup import Options, agree_on_rows
from placement.runtime.migration.staging import Staging
from placement.runtime.migration.switch import switch_over
from placement.runtime.migration.transfer import Fault, RoundTransfer, Traffic
from placement.runtime.parallel.control import FAILED
from placement.runtime.parallel.model import ParallelModel

__all__ = ["Migration"]

_log = logging.getLogger(__name__)


class Migration:
    """A change of placement under way; `migrate` makes and begins it.

    Parameters
    ----------
    plan
        What it copies, and in which rounds.
    status
        Where it stands.
    failure
        Why it failed; empty if it did not.
    overlapped
        Whether copies travel while the model runs: wanted, and the weights do not change meanwhile.
    """

    def __init__(
        self,
        parallel: ParallelModel,
        plan: MigrationPlan,
        link: MigrationLink,
        options: Options,
        *,
        optimizers: Sequence[Optimizer] = (),
        overlapped: bool,
        overlapped_rows: Mapping[int, LayerRows],
        owns_link: bool,
        version: int | None = None,
        fault: Fault | None = None,
    ) -> None:
        self.plan, self.overlapped = plan, overlapped
        self.status = MigrationStatus.RUNNING
        self.failure = ""
        self._parallel, self._link, self._owns_link = parallel, link, owns_link
        self._optimizers, self._options, self._version, self._fault = optimizers, options, version, fault
        self._rows = overlapped_rows
        self._traffic, self._staging = Traffic(), Staging(parallel.mesh.device)
        self._checksum = RowChecksum(parallel.mesh.device)
        self._start_s = self._end_s = time.monotonic()
        self._rounds, self._extra_bytes = 0, 0
        self._transfer: RoundTransfer | None = None
        self._is_under_way = False
        self._row_version = 0
        self._problem, self._problem_s, self._is_ready = "", 0.0, False
        self._first_word = parallel.control.mine
        link.is_busy = True
        # A failure that was agreed on before stays visible until the next pass.
        self._is_stale = parallel.control.agreed == FAILED

    @property
    def report(self) -> MigrationReport:
        """How it goes, or went, as seen by this rank."""
        now_s = time.monotonic() if self.status is MigrationStatus.RUNNING else self._end_s
        return MigrationReport(
            status=self.status,
            failure=self.failure,
            rounds=self._rounds,
            rounds_planned=self.plan.num_rounds,
            moves=sum(len(one.moves) for one in self.plan.schedule.rounds[: self._rounds]),
            sent_bytes=self._traffic.sent_bytes,
            received_bytes=self._traffic.received_bytes,
            transfer_s=self._traffic.seconds,
            gb_per_s=self._traffic.gb_per_s,
            wall_s=now_s - self._start_s,
            checks=self._traffic.checks,
            extra_bytes=self._extra_bytes,
        )

    @property
    def done(self) -> bool:
        """Whether the new placement runs, on all ranks from the same step on."""
        return self.status is MigrationStatus.DONE

    @property
    def failed(self) -> bool:
        """Whether it was given up; the placement of the last switch runs on."""
        return self.status is MigrationStatus.FAILED

    def advance(self) -> MigrationStatus:
        """Do what can be done between two steps; all ranks call it between the same two.

        Where copies travel while the model runs, nothing is waited for. Else one round is carried out.

        Returns
        -------
        MigrationStatus
            The same on all ranks. After ``failed`` the model runs on with the placement of the last switch;
            `failure` says why.

        Raises
        ------
        MigrationError
            If the ranks cannot agree any more: one of them is lost.
        """
        if self.status is MigrationStatus.RUNNING:
            if not self.overlapped:
                self._round_now()
            elif not self._follow():
                self._look()
                self._say()
        return self.status

    def run(self) -> MigrationReport:
        """Carry out all that is left now; ranks wait for each other.

        Raises
        ------
        MigrationError
            If it failed; the placement of the last switch is whole.
        """
        while self.status is MigrationStatus.RUNNING:
            self._round_now()
        if self.status is MigrationStatus.FAILED:
            raise MigrationError(self.failure)
        return self.report

    def abandon(self, reason: str) -> None:
        """Give up without asking the others, after a pass has failed because a rank is lost.

        The placement of the last switch stays as it is; the link cannot be used any more.
        """
        if self.status is MigrationStatus.RUNNING:
            self._give_up(reason)

    def begin(self) -> None:
        """Start the next round's copies where they travel while the model runs; end if none is left."""
        if self._rounds == self.plan.num_rounds:
            version = self._parallel.version + 1 if self._version is None else self._version
            self._parallel.use(self.plan.schedule.after, version=version)
            self._end(MigrationStatus.DONE)
        elif self.overlapped:
            try:
                self._start_round()
            except MigrationError as exc:
                self._note(exc)

    @property
    def _round(self) -> Round:
        return self.plan.schedule.rounds[self._rounds]

    def _start_round(self) -> None:
        if not self.overlapped:
            layers = sorted(self._round.expert_LS)
            self._rows = agree_on_rows(self._parallel, self._link, layers, optimizers=self._optimizers)
        self._is_under_way = True
        self._transfer = RoundTransfer(
            self._link,
            self._rows,
            self._round.moves,
            self._staging,
            self._checksum,
            self._traffic,
            chunk_bytes=self._options.chunk_bytes,
            fault=self._fault,
        )
        self._row_version = self._version_of_rows()

    def _switch(self) -> None:
        """Carry the round out; from here on nothing can fail but this process."""
        assert self._transfer is not None
        switch_over(self._parallel, self._round, self._rows, self._transfer, self._staging)
        self._extra_bytes = max(self._extra_bytes, self._staging.num_bytes)
        self._transfer, self._is_ready, self._is_under_way = None, False, False
        self._rounds += 1
        self.begin()

    def _follow(self) -> bool:
        """Do what all ranks have agreed on in the last pass; return whether that was anything."""
        agreed = self._parallel.control.agreed
        if agreed == FAILED:
            if not self._is_stale:
                self._settle(has_failed=True)
            return not self._is_stale
        self._is_stale = False
        if agreed <= self._first_word + self._rounds:
            return False
        if self._version_of_rows() != self._row_version:
            self._give_up(_CHANGED)
            raise MigrationError(_CHANGED)
        self._switch()
        return True

    def _look(self) -> None:
        """See how this rank's copies stand; nothing is waited for."""
        if self._problem:
            if time.monotonic() > self._problem_s + self._link.timeout_s:
                self._give_up(self._problem)
                raise MigrationError(f"{self._problem}; the other ranks did not answer")
            return
        assert self._transfer is not None
        try:
            self._is_ready = self._transfer.poll()
            if self._version_of_rows() != self._row_version:
                raise MigrationError(_CHANGED)
        except MigrationError as exc:
            self._note(exc)

    def _say(self) -> None:
        """Tell the others with the next pass how this rank stands.

        Words never fall but for a failure, so that an old one is not taken for a new one. A failure waits
        until an earlier one cannot be seen any more.
        """
        word = self._first_word + self._rounds + int(self._is_ready)
        running = self.status is MigrationStatus.RUNNING
        self._parallel.control.mine = FAILED if running and self._problem and not self._is_stale else word

    def _note(self, exc: Exception) -> None:
        self._problem, self._problem_s, self._is_ready = str(exc), time.monotonic(), False

    def _round_now(self) -> None:
        """Carry out one round, with the ranks waiting for each other."""
        try:
            if not self._problem:
                if self._transfer is None:
                    self._start_round()
                assert self._transfer is not None
                self._transfer.wait()
        except (InputError, MigrationError) as exc:
            self._note(exc)
        if self._settle():
            self._switch()

    def _settle(self, *, has_failed: bool = False) -> bool:
        """Ask all ranks what went wrong, if anything; then end on all of them. Return whether nothing did."""
        is_through = not self._is_under_way or (self._transfer is not None and self._transfer.complete)
        try:
            votes = self._link.vote(int(bool(self._problem)), int(is_through))
            has_problem = any(problem for problem, _ in votes)
            problems = self._link.gather(self._problem) if has_problem else []
        except MigrationError as exc:
            reason = f"{self._problem or exc}; the placement of the last switch is whole"
            self._give_up(reason)
            raise MigrationError(reason) from exc
        failure = next((problem for problem in problems if problem), "")
        if not (failure or has_failed):
            return True
        failure = failure or "a rank gave up"
        if not all(through for _, through in votes):
            self._give_up(failure)
        else:
            self._end(MigrationStatus.FAILED, failure)
        return False

    def _give_up(self, reason: str) -> None:
        """End without the others; copies may be under way."""
        self._link.give_up(reason, self._transfer)
        self._end(MigrationStatus.FAILED, reason)

    def _end(self, status: MigrationStatus, failure: str = "") -> None:
        if failure:
            _log.warning("migration failed after %d rounds: %s", self._rounds, failure)
        self.status, self.failure = status, failure
        self._end_s = time.monotonic()
        self._transfer, self._is_ready = None, False
        self._staging.free()
        self._link.is_busy = False
        self._say()
        if self._owns_link and not self._link.broken:
            self._link.close()

    def _version_of_rows(self) -> int:
        """Grows with every change in place of a tensor that moves along, where torch keeps count."""
        return sum(self._rows[layer].version for layer in self._round.expert_LS)


_CHANGED = (
    "the experts' weights changed while they were copied: pass the optimizers to migrate, or leave the "
    "weights alone until it is done"
)
