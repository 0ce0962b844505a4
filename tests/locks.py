"""Transactions that wait for one another, seen from outside."""

import time

from sqlalchemy import text

from tests.databases import Database

_WAITING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND wait_event_type = 'Lock'",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx JOIN information_schema.processlist p "
    "ON p.id = trx_mysql_thread_id WHERE trx_state = 'LOCK WAIT' AND p.db = DATABASE()",
}


def until_somebody_waits(database: Database, timeout: float = 20) -> None:
    """Return when a transaction waits for a row that another one holds."""
    end = time.monotonic() + timeout
    engine = database.engine(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        while not connection.scalar(text(_WAITING[database.name])):
            assert time.monotonic() < end, "nobody waits"
            time.sleep(0.15)  # InnoDB shows the same picture again to who asks more often


def without_old_rows(database: Database) -> None:
    """Rebuild the table of jobs: InnoDB locks the gaps of keys that were deleted and are not purged yet."""
    if database.name == "mysql":
        with database.engine().begin() as connection:
            connection.execute(text("ALTER TABLE sajobs_job FORCE"))
