"""What the shop keeps. It knows nothing of jobs."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "shop_product"
    __table_args__ = (CheckConstraint("stock >= 0", name="shop_product_in_stock"),)

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    stock: Mapped[int]


class Order(Base):
    __tablename__ = "shop_order"
    __table_args__ = (CheckConstraint("quantity > 0", name="shop_order_quantity_positive"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    customer: Mapped[str] = mapped_column(String(80))
    email: Mapped[str] = mapped_column(String(80))
    product: Mapped[str] = mapped_column(ForeignKey(Product.name, name="shop_order_product"))
    quantity: Mapped[int]
    price_cents: Mapped[int]
    receipt_sent_at: Mapped[datetime | None]
    receipts_marked: Mapped[int] = mapped_column(default=0)
    """How many times receipt_sent_at was set, for the audit: more than 1 would be a broken promise."""
