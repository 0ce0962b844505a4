"""The tables of version 2: schedules, limits, and what holds for queues and kinds. Run it before the deploy."""

from alembic import op

from sqlalchemy_jobs import migrations

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    migrations.upgrade(op, to=2)


def downgrade() -> None:
    migrations.downgrade(op, to=1)
