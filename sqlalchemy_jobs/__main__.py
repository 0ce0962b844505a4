"""``python -m sqlalchemy_jobs`` is ``sajobs``."""

from sqlalchemy_jobs.cli import main

if __name__ == "__main__":
    main(prog_name="sajobs")
