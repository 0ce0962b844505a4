"""Version 1: jobs, the runs that did not succeed, and workers.

Frozen: what is here was run on databases that hold jobs. A change is a new version.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql

from sqlalchemy_jobs.migrations.operations import Steps

WHEN = "before"
"""Whether it is run before or after the deploy of the code that needs it."""
ABOUT = "the tables sajobs_job, sajobs_attempt and sajobs_worker"

_MYSQL = ("mysql", "mariadb")
_UUID = sa.Uuid().with_variant(sa.Uuid(native_uuid=False), *_MYSQL)
_TIME = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *_MYSQL)
_TEXT = sa.Text().with_variant(mysql.TEXT(collation="utf8mb4_bin"), *_MYSQL)
_JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def _name(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), *_MYSQL)


def _where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade(op: Steps) -> None:
    op.create_table(
        "sajobs_job",
        sa.Column("id", _UUID, nullable=False),
        sa.Column("kind", _name(100), nullable=False),
        sa.Column("queue", _name(60), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("state", _name(12), nullable=False),
        sa.Column("run_at", _TIME, nullable=False),
        sa.Column("payload", _JSON, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.SmallInteger(), nullable=False),
        sa.Column("worker_id", _UUID),
        sa.Column("unique_key", _name(200)),
        sa.Column("unique_slot", _name(200)),
        sa.Column("unique_states", sa.SmallInteger(), nullable=False),
        sa.Column("limit_key", _name(200)),
        sa.Column("waits_for", sa.SmallInteger(), nullable=False),
        sa.Column("tags", _JSON),
        sa.Column("headers", _JSON),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("scheduled_at", _TIME),
        sa.Column("started_at", _TIME),
        sa.Column("finished_at", _TIME),
        sa.Column("result", _JSON),
        sa.PrimaryKeyConstraint("id", name="sajobs_job_pkey"),
    )
    op.create_index(
        "sajobs_job_ready",
        "sajobs_job",
        ["state", "queue", "priority", "run_at", "id"],
        **_where("limit_key IS NULL AND state IN ('ready', 'blocked')"),
    )
    op.create_index(
        "sajobs_job_limited",
        "sajobs_job",
        ["limit_key", "state", "queue", "priority", "run_at", "id"],
        **_where("limit_key IS NOT NULL AND state IN ('ready', 'running')"),
    )
    op.create_index(
        "sajobs_job_running",
        "sajobs_job",
        ["worker_id"],
        **_where("state = 'running'"),
    )
    op.create_index(
        "sajobs_job_final",
        "sajobs_job",
        ["state", "kind", "finished_at"],
        **_where("state IN ('succeeded', 'failed', 'cancelled')"),
    )
    op.create_index("sajobs_job_unique_slot", "sajobs_job", ["unique_slot"], unique=True)
    op.create_table(
        "sajobs_attempt",
        sa.Column("job_id", _UUID, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker_id", _UUID, nullable=False),
        sa.Column("outcome", _name(12), nullable=False),
        sa.Column("error_type", _name(200)),
        sa.Column("message", _TEXT),
        sa.Column("traceback", _TEXT),
        sa.Column("started_at", _TIME),
        sa.Column("finished_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            [op.qualified("sajobs_job.id")],
            name="sajobs_attempt_job_id_fkey",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", "attempt", "worker_id", name="sajobs_attempt_pkey"),
    )
    op.create_table(
        "sajobs_worker",
        sa.Column("id", _UUID, nullable=False),
        sa.Column("name", _name(200), nullable=False),
        sa.Column("state", _name(12), nullable=False),
        sa.Column("queues", _JSON),
        sa.Column("kinds", _JSON),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("heartbeat_at", _TIME, nullable=False),
        sa.Column("lease_until", _TIME, nullable=False),
        sa.Column("holds_lock", sa.Boolean(), nullable=False),
        sa.Column("server_start", _TIME),
        sa.Column("bell", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="sajobs_worker_pkey"),
    )


def downgrade(op: Steps) -> None:
    op.drop_table("sajobs_worker")
    op.drop_table("sajobs_attempt")
    op.drop_table("sajobs_job")
