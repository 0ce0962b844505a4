"""The worker process: everything between a claim and the end of its run."""

from sqlalchemy_jobs.worker.settings import Options, Settings
from sqlalchemy_jobs.worker.worker import Worker

__all__ = ["Options", "Settings", "Worker"]
