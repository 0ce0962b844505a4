"""The tables of version 1: jobs, the runs that did not succeed, and workers. Run it before the deploy."""

from alembic import op

from sqlalchemy_jobs import migrations

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    migrations.upgrade(op, to=1)


def downgrade() -> None:
    migrations.downgrade(op, to=0)
