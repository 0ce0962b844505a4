"""A Flask application as users have it: Flask-SQLAlchemy for the session, Flask-Migrate for the tables."""

import os
import uuid
from dataclasses import dataclass

from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import ForeignKey, MetaData, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

import sqlalchemy_jobs
from sqlalchemy_jobs import Job, JobApp, current_run, enqueue, job


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


db = SQLAlchemy(model_class=Base)


class Order(db.Model):
    __tablename__ = "shop_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    delivered: Mapped[bool] = mapped_column(default=False)
    # What version 2 of the application adds.
    job_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey(Job.id, ondelete="SET NULL"), index=True
    )
    job: Mapped[Job | None] = relationship()


app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["SHOP_DATABASE_URL"]
db.init_app(app)
Migrate(app, db)

with app.app_context():
    if db.engine.dialect.name == "sqlite":
        sqlalchemy_jobs.sqlite.configure(db.engine)

jobs = JobApp(db.session, context=app.app_context)


@job("deliver")
@dataclass(frozen=True)
class Deliver:
    pass


@jobs.handler(Deliver)
def deliver(session: Session, payload: Deliver) -> None:
    mine = Order.job_id == current_run().job_id
    session.execute(update(Order).where(mine).values(delivered=True))


@app.cli.command()
def order() -> None:
    """Take an order."""
    db.session.add(Order(job=enqueue(Deliver())))
    db.session.commit()
