"""Runs the revisions on the database of SAJOBS_DATABASE_URL, or on a connection that a program hands over."""

import os

import sqlalchemy as sa
from alembic import context

import sqlalchemy_jobs

# In an application: [sqlalchemy_jobs.metadata, Base.metadata]. Autogenerate and `alembic check` compare with it.
target_metadata = [sqlalchemy_jobs.metadata]


def run(connection: sa.Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=target_metadata,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_offline(url: str) -> None:
    context.configure(url=url, target_metadata=target_metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
elif context.is_offline_mode():
    run_offline(os.environ["SAJOBS_DATABASE_URL"])
else:
    engine = sa.create_engine(os.environ["SAJOBS_DATABASE_URL"], poolclass=sa.NullPool)
    with engine.connect() as connection:
        run(connection)
