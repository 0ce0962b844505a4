"""The application: ``python -m shop.app orders.csv`` takes the orders of a file, each in a transaction."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from sqlalchemy import update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqlalchemy_jobs import enqueue

from .database import SessionLocal
from .models import Order, Product
from .payloads import SendReceipt


def take(session: Session, row: dict[str, str]) -> None:
    number, quantity, price_cents = (int(row[c]) for c in ("number", "quantity", "price_cents"))
    customer, email, product = row["customer"], row["email"], row["product"]

    # The job first, before anything was checked, and even written to the database: this order of
    # things is the worst one, and it makes no difference. Job and order are one transaction.
    session.add(enqueue(SendReceipt(number, customer, email, product, quantity, price_cents)))
    session.flush()

    session.add(
        Order(
            number=number,
            customer=customer,
            email=email,
            product=product,
            quantity=quantity,
            price_cents=price_cents,
        )
    )
    session.execute(
        update(Product).where(Product.name == product).values(stock=Product.stock - quantity)
    )


def main(orders: Path) -> None:
    taken = rolled_back = 0
    with orders.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                with SessionLocal.begin() as session:
                    take(session, row)
                taken += 1
            # Mostly an IntegrityError; MySQL calls a failed CHECK an OperationalError.
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise
                rolled_back += 1
                print(f"order {row['number']} rolled back: {str(error.orig).splitlines()[0]}")
    print(f"{taken} orders taken, {rolled_back} rolled back")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
