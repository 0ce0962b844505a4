"""The shop's engine and sessions. ``python -m shop.database create`` makes its tables, ``drop`` removes them."""

from __future__ import annotations

import os
import sys
from typing import Any

from sqlalchemy import create_engine, event, inspect
from sqlalchemy.orm import sessionmaker

import sqlalchemy_jobs

from .models import Base, Product

engine = create_engine(os.environ.get("SHOP_DATABASE_URL", "sqlite:///shop.sqlite"))
SessionLocal = sessionmaker(engine)

if engine.dialect.name == "sqlite":
    sqlalchemy_jobs.sqlite.configure(engine)

    @event.listens_for(engine, "connect")
    def check_foreign_keys(connection: Any, record: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")  # SQLite ignores them otherwise


CATALOGUE = ("cake stand", "espresso cup", "kettle", "milk jug", "sieve", "tea cosy", "teapot")
STOCK = 1000
BOTH = (Base.metadata, sqlalchemy_jobs.metadata)


def create() -> None:
    """Make the shop's tables and those of the jobs, in a database that has none of them."""
    ours = {table for metadata in BOTH for table in metadata.tables}
    if there := sorted(ours & set(inspect(engine).get_table_names())):
        print(
            f"{engine.url!r} has the tables {', '.join(there)} already, and they may be in use: give "
            "the shop a new, empty database (or drop them, if an earlier demo left them behind)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    for metadata in BOTH:
        metadata.create_all(engine)
    with SessionLocal.begin() as session:
        session.add_all(Product(name=name, stock=STOCK) for name in CATALOGUE)


def drop() -> None:
    for metadata in BOTH:
        metadata.drop_all(engine)


if __name__ == "__main__":
    {"create": create, "drop": drop}[sys.argv[1]]()
