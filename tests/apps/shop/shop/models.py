import uuid

from sqlalchemy import ForeignKey, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sqlalchemy_jobs import Job


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Order(Base):
    __tablename__ = "shop_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[str] = mapped_column(String(20), unique=True)
    email: Mapped[str] = mapped_column(String(200), index=True)


class Delivery(Base):
    __tablename__ = "shop_delivery"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))
    # UNIQUE brings the index by which the delivery is found when its job is deleted.
    job_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey(Job.id, ondelete="SET NULL"), unique=True
    )
    sent: Mapped[bool] = mapped_column(default=False)

    order: Mapped[Order] = relationship()
    # With it the session inserts the job before the row that refers to it.
    job: Mapped[Job | None] = relationship()
