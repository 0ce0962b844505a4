"""What may be enqueued. The application imports this, and never a handler."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy_jobs import job


@job("send_receipt", queue="mail", max_attempts=10)
@dataclass(frozen=True)
class SendReceipt:
    """All that the receipt says, as it was when the order was taken."""

    order: int
    customer: str
    email: str
    product: str
    quantity: int
    price_cents: int
