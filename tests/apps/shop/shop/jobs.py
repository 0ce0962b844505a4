from dataclasses import dataclass

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from shop.database import SessionLocal
from shop.models import Delivery
from sqlalchemy_jobs import JobApp, current_run, job

jobs = JobApp(SessionLocal)


@job("deliver")
@dataclass(frozen=True)
class Deliver:
    number: str


@jobs.handler(Deliver)
async def deliver(session: AsyncSession, payload: Deliver) -> None:
    mine = Delivery.job_id == current_run().job_id
    await session.execute(update(Delivery).where(mine).values(sent=True))
