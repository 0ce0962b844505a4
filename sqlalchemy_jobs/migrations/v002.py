"""Version 2: schedules, limits, and what holds for queues and kinds at run time.

Frozen: what is here was run on databases that hold jobs. A change is a new version.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql

from sqlalchemy_jobs.migrations.operations import Steps

WHEN = "before"
"""Whether it is run before or after the deploy of the code that needs it."""
ABOUT = "the tables sajobs_queue, sajobs_kind, sajobs_limit and sajobs_schedule, and the index sajobs_job_ordered"

_MYSQL = ("mysql", "mariadb")
_TIME = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *_MYSQL)
_TEXT = sa.Text().with_variant(mysql.TEXT(collation="utf8mb4_bin"), *_MYSQL)
_JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def _name(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), *_MYSQL)


def _where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade(op: Steps) -> None:
    op.create_index(
        "sajobs_job_ordered",
        "sajobs_job",
        ["limit_key", "state", "id"],
        **_where("limit_key > '' AND state IN ('ready', 'running')"),
    )
    op.create_table(
        "sajobs_queue",
        sa.Column("name", _name(60), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("concurrency", sa.Integer()),
        sa.Column("rate", _name(40)),
        sa.Column("strategy", _name(12), nullable=False),
        sa.Column("ageing", sa.Double()),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="sajobs_queue_pkey"),
    )
    op.create_table(
        "sajobs_kind",
        sa.Column("name", _name(100), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="sajobs_kind_pkey"),
    )
    op.create_table(
        "sajobs_limit",
        sa.Column("limit_key", _name(200), nullable=False),
        sa.Column("used", _JSON),
        sa.Column("next_at", _TIME),
        sa.Column("used_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("limit_key", name="sajobs_limit_pkey"),
    )
    op.create_table(
        "sajobs_schedule",
        sa.Column("name", _name(200), nullable=False),
        sa.Column("cron", _name(200), nullable=False),
        sa.Column("timezone", _name(64), nullable=False),
        sa.Column("kind", _name(100), nullable=False),
        sa.Column("payload", _JSON),
        sa.Column("options", _JSON),
        sa.Column("catch_up", _name(12), nullable=False),
        sa.Column("catch_up_window", sa.Double()),
        sa.Column("run_on_start", sa.Boolean(), nullable=False),
        sa.Column("in_code", sa.Boolean(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("error", _TEXT),
        sa.Column("next_tick", _TIME),
        sa.Column("last_tick", _TIME),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="sajobs_schedule_pkey"),
    )
    op.create_index("sajobs_schedule_next", "sajobs_schedule", ["paused", "next_tick"])


def downgrade(op: Steps) -> None:
    op.drop_table("sajobs_schedule")
    op.drop_table("sajobs_limit")
    op.drop_table("sajobs_kind")
    op.drop_table("sajobs_queue")
    op.drop_index("sajobs_job_ordered", "sajobs_job")
