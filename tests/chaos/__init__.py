"""Chaos: workers and enqueuing transactions under random faults, and an audit of what became of every job.

    python -m tests.chaos --database postgresql --seconds 60 --seed 1

It starts a server of its own (PostgreSQL from the wheel, MariaDB if `mariadbd` is installed, an SQLite file), several
worker processes that reach it through a TCP proxy, and a stream of transactions that enqueue, of which some roll back. Meanwhile
it kills workers, stops and continues them, ends server connections, cuts and delays connections, and restarts the
server. Then it lets everything settle, audits, prints one table and exits non-zero on any violation.

    app.py       what the workers run: handlers that write what they did, in the database and in a log beside it
    load.py      the transactions that enqueue
    servers.py   the servers, and how they are restarted
    faults.py    what is done to workers, connections and servers
    audit.py     what must be true at the end
"""
