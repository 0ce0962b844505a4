"""The application of the test of pauses: each handler notes in a file of the folder when it began, and takes a while.

`SAJOBS_TEST_URL` names the database, `SAJOBS_TEST_FOLDER` the folder of the file.
"""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import JobApp, Limit, job, sqlite

_ASYNC = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+aiomysql"}
TAKES = 0.005
"""Seconds of a handler: short enough to be claimed ahead."""

url = make_url(os.environ["SAJOBS_TEST_URL"])
engine = create_engine(url)
async_engine = create_async_engine(
    url.set(drivername=_ASYNC.get(engine.dialect.name, url.drivername))
)
if engine.dialect.name == "sqlite":
    sqlite.configure(engine)
    sqlite.configure(async_engine)

jobs = JobApp(sessionmaker(engine), async_sessionmaker(async_engine))


@job("plain")
@dataclass(frozen=True)
class Plain:
    pass


@job("limited", limit=Limit(concurrency=1, key="key"))
@dataclass(frozen=True)
class Limited:
    key: int


@job("batched")
@dataclass(frozen=True)
class Batched:
    pass


@job("awaited")
@dataclass(frozen=True)
class Awaited:
    pass


@jobs.handler(Plain)
def plain(session: Session, payload: Plain) -> None:
    began("plain")
    time.sleep(TAKES)


@jobs.handler(Limited)
def limited(session: Session, payload: Limited) -> None:
    began("limited")
    time.sleep(TAKES)


@jobs.handler(Batched, batch=10)
def batched(session: Session, payloads: list[Batched]) -> None:
    began("batched")
    time.sleep(TAKES)


@jobs.handler(Awaited)
async def awaited(session: AsyncSession, payload: Awaited) -> None:
    began("awaited")
    await asyncio.sleep(TAKES)


def began(kind: str) -> None:
    os.write(_diary, f"{os.getpid()} {kind} {time.time()}\n".encode())


_diary = os.open(
    Path(os.environ["SAJOBS_TEST_FOLDER"]) / "began", os.O_CREAT | os.O_APPEND | os.O_WRONLY
)
