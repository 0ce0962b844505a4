"""Run every benchmark, one after the other: `python -m benchmarks --write`; the options are those of each.

Not recovery.py, which kills workers for minutes and is told a database of its own.
"""

import subprocess
import sys

PROGRAMS = (
    "limit",
    "drain",
    "handlers",
    "adding",
    "bulk",
    "latency",
    "ticks",
    "backlog",
    "limits",
    "cores",
    "idle",
    "memory",
    "servers",
)


def main() -> None:
    failed = [
        program
        for program in PROGRAMS
        if subprocess.run([sys.executable, "-m", f"benchmarks.{program}", *sys.argv[1:]]).returncode
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
