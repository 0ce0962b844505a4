"""How the jobs are done: ``sajobs worker --app shop.jobs:jobs``."""

from __future__ import annotations

import os
import smtplib
from email.headerregistry import Address
from email.message import EmailMessage
from uuid import UUID

from sqlalchemy import func
from sqlalchemy.orm import Session

from sqlalchemy_jobs import JobApp, current_run

from .database import SessionLocal
from .models import Order
from .payloads import SendReceipt

SMTP_HOST, _, SMTP_PORT = os.environ.get("SHOP_SMTP", "localhost:25").partition(":")

jobs = JobApp(SessionLocal)


@jobs.handler(SendReceipt)
def send_receipt(session: Session, receipt: SendReceipt) -> None:
    # A mail cannot be rolled back: who dies between here and the commit sends it again, with the same id.
    send(receipt_mail(receipt, current_run().job_id))

    # The session is used last. On SQLite the first use takes the only write lock, and nobody should have
    # to wait for it while we talk to a mail server.
    order = session.get_one(Order, receipt.order)
    order.receipt_sent_at = func.now()
    order.receipts_marked = Order.receipts_marked + 1
    # Returning commits this together with the job's "succeeded".


def message_id(job_id: UUID) -> str:
    """The same for each run of a job, so that a receipt sent twice can be recognised."""
    return f"<{job_id}@shop.example>"


def receipt_mail(receipt: SendReceipt, job_id: UUID) -> EmailMessage:
    user, _, domain = receipt.email.partition("@")
    price, total = receipt.price_cents, receipt.quantity * receipt.price_cents
    mail = EmailMessage()
    mail["Message-ID"] = message_id(job_id)
    mail["From"] = Address("The Shop", "receipts", "shop.example")
    mail["To"] = Address(receipt.customer, user, domain)
    mail["Subject"] = f"Receipt for your order {receipt.order}"
    mail.set_content(
        f"Dear {receipt.customer},\n\nthank you for your order {receipt.order}:\n\n"
        f"  {receipt.quantity} x {receipt.product} at {price / 100:.2f} € = {total / 100:.2f} €\n"
    )
    return mail


def send(mail: EmailMessage) -> None:
    with smtplib.SMTP(SMTP_HOST, int(SMTP_PORT), local_hostname="localhost", timeout=10) as smtp:
        smtp.send_message(mail)
