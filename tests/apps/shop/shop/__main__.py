"""``python -m shop order 10001`` takes an order; ``python -m shop tidy`` deletes the jobs that are done."""

import asyncio
import sys

from sqlalchemy import delete

from shop.database import SessionLocal, engine
from shop.jobs import Deliver
from shop.models import Delivery, Order
from sqlalchemy_jobs import Job, JobState, enqueue


async def order(number: str) -> None:
    async with SessionLocal.begin() as session:
        new = Order(number=number, email="wim@example.org")
        session.add(Delivery(order=new, job=enqueue(Deliver(number))))


async def tidy() -> None:
    async with SessionLocal.begin() as session:
        await session.execute(delete(Job).where(Job.state == JobState.SUCCEEDED))


async def main(command: str, *arguments: str) -> None:
    await {"order": order, "tidy": tidy}[command](*arguments)
    await engine.dispose()


asyncio.run(main(*sys.argv[1:]))
