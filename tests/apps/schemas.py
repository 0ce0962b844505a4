"""The application of one schema or tenant: like `effects`, but for where its tables are.

`SAJOBS_TEST_SCHEMA` puts the library's tables into a schema, `SAJOBS_TEST_TENANT` all tables; `SAJOBS_TEST_COLOUR` is
"async" or else sync.
"""

import os
from dataclasses import dataclass
from typing import Any

from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqlalchemy_jobs
from sqlalchemy_jobs import JobApp, current_run, job

if schema := os.environ.get("SAJOBS_TEST_SCHEMA"):
    sqlalchemy_jobs.use_schema(schema)

from tests.domain import Effect

url = make_url(os.environ["SAJOBS_TEST_URL"])
tenant = os.environ.get("SAJOBS_TEST_TENANT")
options: dict[str, Any] = (
    {"execution_options": {"schema_translate_map": {None: tenant}}} if tenant else {}
)
engine = create_engine(url, **options)
is_async = os.environ.get("SAJOBS_TEST_COLOUR") == "async"

jobs: JobApp[Any, Any]
if is_async:
    drivername = {"mysql": "mysql+aiomysql"}.get(engine.dialect.name, url.drivername)
    async_engine = create_async_engine(url.set(drivername=drivername), **options)
    jobs = JobApp(async_sessionmaker(async_engine))
else:
    jobs = JobApp(sessionmaker(engine))


@job("note")
@dataclass(frozen=True)
class Note:
    """Insert one effect."""

    text: str


def note(session: Session, payload: Note) -> None:
    session.add(Effect(job_id=current_run().job_id.hex, note=payload.text))


async def note_async(session: AsyncSession, payload: Note) -> None:
    session.add(Effect(job_id=current_run().job_id.hex, note=payload.text))


jobs.handler(Note)(note_async if is_async else note)
