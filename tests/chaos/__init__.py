"""Chaos: ``python -m tests.chaos``; ``__main__.py`` says what it does, and what is where."""
