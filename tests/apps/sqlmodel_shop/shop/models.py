import uuid

from sqlalchemy import Column, ForeignKey
from sqlmodel import Field, SQLModel

from sqlalchemy_jobs import Job


class Delivery(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    address: str
    job_id: uuid.UUID | None = Field(
        sa_column=Column(ForeignKey(Job.id, ondelete="SET NULL"), unique=True)
    )
