import os
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

import sqlalchemy_jobs

engine = create_async_engine(os.environ["SHOP_DATABASE_URL"])
SessionLocal = async_sessionmaker(engine)

if engine.dialect.name == "sqlite":
    sqlalchemy_jobs.sqlite.configure(engine)

    @event.listens_for(engine.sync_engine, "connect")
    def obey_foreign_keys(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()
