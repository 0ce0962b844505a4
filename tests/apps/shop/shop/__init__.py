"""An application as users have one: asynchronous, with an Alembic environment of its own."""
