"""A small shop that mails a receipt for each order. The demo runs it; nothing here is about the demo."""
