"""The tables of the application: what its handlers and its enqueuing transactions leave behind."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import URL, Engine, ForeignKey, String, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_jobs import Job, current_run, sqlite
from sqlalchemy_jobs.columns import server_now, utc_datetime

ASYNC_DRIVERS = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+aiomysql"}


class Base(DeclarativeBase):
    pass


class Effect(Base):
    """What a run did, committed with its end; or with a part of it, where ``transaction="manual"``."""

    __tablename__ = "effect"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid.uuid4().hex)
    job_id: Mapped[str] = mapped_column(String(32), index=True)
    attempt: Mapped[int]
    worker_id: Mapped[str] = mapped_column(String(32))
    at: Mapped[datetime] = mapped_column(utc_datetime(), default=server_now())
    last: Mapped[bool]
    """Whether the run was to end the job; a snoozed one is not, nor is a part."""
    intent_id: Mapped[str | None] = mapped_column(String(32))
    """The transaction that the payload came from, where the payload says it."""


class Intent(Base):
    """A transaction that enqueued, committed with its jobs."""

    __tablename__ = "intent"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)


class Reference(Base):
    """A row of the application that refers to a job."""

    __tablename__ = "reference"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid.uuid4().hex)
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey(Job.id, ondelete="SET NULL"))


def effect(last: bool = True, intent_id: str | None = None) -> Effect:
    """Return an Effect of the current run."""
    claim = current_run().claim
    return Effect(
        job_id=claim.job_id.hex,
        attempt=claim.attempt,
        worker_id=claim.worker_id.hex,
        last=last,
        intent_id=intent_id,
    )


def make_engine(url: URL, **options: Any) -> Engine:
    engine = create_engine(url, **options)
    _configure(engine, engine)
    return engine


def make_async_engine(url: URL, **options: Any) -> AsyncEngine:
    driver = ASYNC_DRIVERS.get(url.get_backend_name(), url.drivername)
    engine = create_async_engine(url.set(drivername=driver), **options)
    _configure(engine, engine.sync_engine)
    return engine


def _configure(engine: Engine | AsyncEngine, sync: Engine) -> None:
    if sync.dialect.name == "sqlite":
        sqlite.configure(engine)
        event.listen(sync, "connect", _enforce_foreign_keys)


def _enforce_foreign_keys(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
