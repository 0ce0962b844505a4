"""The tables of the application whose jobs are tested."""

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "order_"

    id: Mapped[int] = mapped_column(primary_key=True)
    paid: Mapped[bool] = mapped_column(default=False)


class Effect(Base):
    """What a handler did: one row for each time it did it, so that "exactly once" can be counted."""

    __tablename__ = "effect"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int | None] = mapped_column(ForeignKey("order_.id"))
    # The job's id as 32 hexadecimal digits. No foreign key: an effect outlives its job.
    job_id: Mapped[str | None] = mapped_column(String(32), index=True)
    note: Mapped[str] = mapped_column(String(200), default="")
