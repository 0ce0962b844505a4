"""the customer's address"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("shop_order", sa.Column("email", sa.String(length=200), nullable=False))
    op.create_index(op.f("ix_shop_order_email"), "shop_order", ["email"])


def downgrade() -> None:
    op.drop_index(op.f("ix_shop_order_email"), table_name="shop_order")
    op.drop_column("shop_order", "email")
