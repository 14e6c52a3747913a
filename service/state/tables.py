"""The tables.

Times are seconds since the epoch and are only shown or used for retention: what must not depend on a clock
that jumps (leases, order) counts instead.
"""

from __future__ import annotations

import sqlalchemy as sa

__all__ = [
    "METADATA",
    "artifacts",
    "audit",
    "counters",
    "deployment_versions",
    "deployments",
    "events",
    "jobs",
    "load_windows",
    "tokens",
    "workers",
]

METADATA = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

BigNumber = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""A number that SQLite can count up by itself (only its INTEGER can)."""

Json = sa.JSON(none_as_null=True)

artifacts = sa.Table(
    "artifacts",
    METADATA,
    sa.Column("digest", sa.String(71), primary_key=True, comment="sha256:<64 hex> of the bytes as received"),
    sa.Column("kind", sa.String(16), nullable=False, comment="trace, placement"),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("format", sa.String(32), nullable=False),
    sa.Column("summary", Json, nullable=False, comment="what it holds: layers, experts, tokens, ..."),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("created_by", sa.String(64), nullable=False),
    sa.Column("used_at", sa.Double, nullable=False, comment="last named by a request; for retention"),
)

jobs = sa.Table(
    "jobs",
    METADATA,
    sa.Column("number", BigNumber, primary_key=True, autoincrement=True, comment="order of arrival"),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("kind", sa.String(16), nullable=False, comment="solve, evaluation, check"),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False, default=0),
    sa.Column("caller", sa.String(64), nullable=False, comment="id of the token, or 'local'"),
    sa.Column("deployment", sa.String(64), comment="deployment whose refresh this is"),
    sa.Column("spec", Json, nullable=False),
    sa.Column("cpus", sa.Integer, nullable=False, default=1, comment="threads that it may use"),
    sa.Column("trace_digest", sa.ForeignKey("artifacts.digest")),
    sa.Column("start_digest", sa.ForeignKey("artifacts.digest"), comment="placement to start from or score"),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("request_hash", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("ended_at", sa.Double),
    sa.Column("attempt", sa.Integer, nullable=False, default=0, comment="times claimed; fences late writers"),
    sa.Column("lost", sa.Integer, nullable=False, default=0, comment="times that its worker was lost"),
    sa.Column("worker", sa.String(64), comment="who holds the lease"),
    sa.Column("beat", sa.BigInteger, nullable=False, default=0, comment="counts up while the worker lives"),
    sa.Column("stop_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("event_seq", sa.Integer, nullable=False, default=0, comment="number of its last event"),
    sa.Column("incumbent", Json, comment="objective, lower_bound, gap, solver, elapsed_s"),
    sa.Column("incumbent_digest", sa.ForeignKey("artifacts.digest")),
    sa.Column("result", Json),
    sa.Column("placement_digest", sa.ForeignKey("artifacts.digest")),
    sa.Column("error", Json, comment="code and message"),
    sa.UniqueConstraint("caller", "kind", "idempotency_key", name="uq_jobs_idempotency"),
    sa.Index("ix_jobs_queue", "status", "priority", "caller", "number", "cpus", "kind"),
    sa.Index("ix_jobs_status", "status", "number"),
    sa.Index("ix_jobs_deployment", "deployment", "number"),
)

events = sa.Table(
    "events",
    METADATA,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False, comment="1, 2, ... without gaps"),
    sa.Column("kind", sa.String(16), nullable=False, comment="progress, incumbent, done"),
    sa.Column("data", Json, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
)

workers = sa.Table(
    "workers",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("boot_id", sa.String(64), nullable=False, comment="so that a dead process is known at once"),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("pid_started", sa.Double, nullable=False, comment="start of the process: pids come again"),
    sa.Column("cpus", sa.Integer, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False, default=0),
    sa.Column("seen_at", sa.Double, nullable=False),
)

deployments = sa.Table(
    "deployments",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("spec", Json, nullable=False, comment="topology, model, options, policy as given"),
    sa.Column("revision", sa.BigInteger, nullable=False, comment="counts every change of spec and placement"),
    sa.Column("version", sa.Integer, comment="current version of the placement; none before the first"),
    sa.Column("drift", Json, comment="what recent windows say"),
    sa.Column("refresh", Json, comment="state of the automatic refresh"),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
)

deployment_versions = sa.Table(
    "deployment_versions",
    METADATA,
    sa.Column("deployment", sa.ForeignKey("deployments.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False, comment="1, 2, ... without gaps"),
    sa.Column("placement_digest", sa.ForeignKey("artifacts.digest"), nullable=False),
    sa.Column("job_id", sa.String(40), comment="solve that found it"),
    sa.Column("cause", sa.String(16), nullable=False, comment="manual, automatic, rollback"),
    sa.Column("by", sa.String(64), nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("of_version", sa.Integer, comment="for a rollback: the version it returns to"),
    sa.Column("predicted", Json, comment="objective, balance and gain when it was promoted"),
    sa.Column("observed", Json, comment="the same, on the windows since"),
    sa.Column("promoted_at", sa.Double, nullable=False),
)

load_windows = sa.Table(
    "load_windows",
    METADATA,
    sa.Column("number", BigNumber, primary_key=True, autoincrement=True),
    sa.Column("deployment", sa.ForeignKey("deployments.name", ondelete="CASCADE"), nullable=False),
    sa.Column("window", sa.BigInteger, nullable=False, comment="the caller's number of the window (step)"),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("version", sa.Integer, comment="placement that was running"),
    sa.Column("tokens", sa.Double, nullable=False),
    sa.Column("load", sa.LargeBinary, nullable=False, comment="zlib of int64 [layers, experts]"),
    sa.Column("received_at", sa.Double, nullable=False),
    sa.UniqueConstraint("deployment", "window", "rank", name="uq_load_windows_part"),
)

tokens = sa.Table(
    "tokens",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False, unique=True, comment="SHA-256 of 256 random bits"),
    sa.Column("scopes", Json, nullable=False),
    sa.Column("limits", Json, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("revoked_at", sa.Double),
    sa.Column("previous_hash", sa.String(64), comment="of the secret before the last rotation"),
    sa.Column("previous_until", sa.Double, comment="how long that one is still taken"),
)

audit = sa.Table(
    "audit",
    METADATA,
    sa.Column("number", BigNumber, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("who", sa.String(64), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("target", sa.String(255), nullable=False),
    sa.Column("request_id", sa.String(64)),
    sa.Column("detail", Json),
)

counters = sa.Table(
    "counters",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("labels", sa.String(255), primary_key=True, comment="a=b,c=d in order of name"),
    sa.Column("value", sa.Double, nullable=False),
)
