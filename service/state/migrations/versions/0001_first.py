"""The tables of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""A number that SQLite can count up by itself (only its INTEGER can)."""


def upgrade() -> None:
    """Make every table in an empty database."""
    op.create_table(
        "artifacts",
        sa.Column(
            "digest", sa.String(length=71), nullable=False, comment="sha256:<64 hex> of the bytes as received"
        ),
        sa.Column("kind", sa.String(length=16), nullable=False, comment="trace, placement"),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("format", sa.String(length=32), nullable=False),
        sa.Column(
            "summary", sa.JSON(), nullable=False, comment="what it holds: layers, experts, tokens, ..."
        ),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(length=64), nullable=False),
        sa.Column("used_at", sa.Double(), nullable=False, comment="last named by a request; for retention"),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_artifacts")),
    )
    op.create_table(
        "audit",
        sa.Column("number", NUMBER, autoincrement=True, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("who", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=255), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit")),
    )
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("labels", sa.String(length=255), nullable=False, comment="a=b,c=d in order of name"),
        sa.Column("value", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", "labels", name=op.f("pk_counters")),
    )
    op.create_table(
        "deployments",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False, comment="topology, model, options, policy as given"),
        sa.Column(
            "revision", sa.BigInteger(), nullable=False, comment="counts every change of spec and placement"
        ),
        sa.Column(
            "version",
            sa.Integer(),
            nullable=True,
            comment="current version of the placement; none before the first",
        ),
        sa.Column("drift", sa.JSON(), nullable=True, comment="what recent windows say"),
        sa.Column("refresh", sa.JSON(), nullable=True, comment="state of the automatic refresh"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_deployments")),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False, comment="SHA-256 of 256 random bits"),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.Column(
            "previous_hash",
            sa.String(length=64),
            nullable=True,
            comment="of the secret before the last rotation",
        ),
        sa.Column("previous_until", sa.Double(), nullable=True, comment="how long that one is still taken"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("hash", name=op.f("uq_tokens_hash")),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column(
            "boot_id", sa.String(length=64), nullable=False, comment="so that a dead process is known at once"
        ),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column(
            "pid_started", sa.Double(), nullable=False, comment="start of the process: pids come again"
        ),
        sa.Column("cpus", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("beat", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_table(
        "deployment_versions",
        sa.Column("deployment", sa.String(length=64), nullable=False),
        sa.Column(
            "version", sa.Integer(), autoincrement=False, nullable=False, comment="1, 2, ... without gaps"
        ),
        sa.Column("placement_digest", sa.String(length=71), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=True, comment="solve that found it"),
        sa.Column("cause", sa.String(length=16), nullable=False, comment="manual, automatic, rollback"),
        sa.Column("by", sa.String(length=64), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column(
            "of_version", sa.Integer(), nullable=True, comment="for a rollback: the version it returns to"
        ),
        sa.Column(
            "predicted", sa.JSON(), nullable=True, comment="objective, balance and gain when it was promoted"
        ),
        sa.Column("observed", sa.JSON(), nullable=True, comment="the same, on the windows since"),
        sa.Column("promoted_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["deployment"],
            ["deployments.name"],
            name=op.f("fk_deployment_versions_deployment_deployments"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["placement_digest"],
            ["artifacts.digest"],
            name=op.f("fk_deployment_versions_placement_digest_artifacts"),
        ),
        sa.PrimaryKeyConstraint("deployment", "version", name=op.f("pk_deployment_versions")),
    )
    op.create_table(
        "jobs",
        sa.Column("number", NUMBER, autoincrement=True, nullable=False, comment="order of arrival"),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False, comment="solve, evaluation, check"),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("caller", sa.String(length=64), nullable=False, comment="id of the token, or 'local'"),
        sa.Column(
            "deployment", sa.String(length=64), nullable=True, comment="deployment whose refresh this is"
        ),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("cpus", sa.Integer(), nullable=False, comment="threads that it may use"),
        sa.Column("trace_digest", sa.String(length=71), nullable=True),
        sa.Column(
            "start_digest", sa.String(length=71), nullable=True, comment="placement to start from or score"
        ),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("request_hash", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="times claimed; fences late writers"),
        sa.Column("lost", sa.Integer(), nullable=False, comment="times that its worker was lost"),
        sa.Column("worker", sa.String(length=64), nullable=True, comment="who holds the lease"),
        sa.Column("beat", sa.BigInteger(), nullable=False, comment="counts up while the worker lives"),
        sa.Column("stop_requested", sa.Boolean(), nullable=False),
        sa.Column("event_seq", sa.Integer(), nullable=False, comment="number of its last event"),
        sa.Column(
            "incumbent", sa.JSON(), nullable=True, comment="objective, lower_bound, gap, solver, elapsed_s"
        ),
        sa.Column("incumbent_digest", sa.String(length=71), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("placement_digest", sa.String(length=71), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True, comment="code and message"),
        sa.ForeignKeyConstraint(
            ["incumbent_digest"], ["artifacts.digest"], name=op.f("fk_jobs_incumbent_digest_artifacts")
        ),
        sa.ForeignKeyConstraint(
            ["placement_digest"], ["artifacts.digest"], name=op.f("fk_jobs_placement_digest_artifacts")
        ),
        sa.ForeignKeyConstraint(
            ["start_digest"], ["artifacts.digest"], name=op.f("fk_jobs_start_digest_artifacts")
        ),
        sa.ForeignKeyConstraint(
            ["trace_digest"], ["artifacts.digest"], name=op.f("fk_jobs_trace_digest_artifacts")
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_jobs")),
        sa.UniqueConstraint("caller", "kind", "idempotency_key", name="uq_jobs_idempotency"),
        sa.UniqueConstraint("id", name=op.f("uq_jobs_id")),
    )
    op.create_index("ix_jobs_deployment", "jobs", ["deployment", "number"], unique=False)
    op.create_index(
        "ix_jobs_queue", "jobs", ["status", "priority", "caller", "number", "cpus", "kind"], unique=False
    )
    op.create_index("ix_jobs_status", "jobs", ["status", "number"], unique=False)
    op.create_table(
        "load_windows",
        sa.Column("number", NUMBER, autoincrement=True, nullable=False),
        sa.Column("deployment", sa.String(length=64), nullable=False),
        sa.Column(
            "window", sa.BigInteger(), nullable=False, comment="the caller's number of the window (step)"
        ),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True, comment="placement that was running"),
        sa.Column("tokens", sa.Double(), nullable=False),
        sa.Column("load", sa.LargeBinary(), nullable=False, comment="zlib of int64 [layers, experts]"),
        sa.Column("received_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["deployment"],
            ["deployments.name"],
            name=op.f("fk_load_windows_deployment_deployments"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_load_windows")),
        sa.UniqueConstraint("deployment", "window", "rank", name="uq_load_windows_part"),
    )
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False, comment="1, 2, ... without gaps"),
        sa.Column("kind", sa.String(length=16), nullable=False, comment="progress, incumbent, done"),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_events_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_events")),
    )
