"""Sessions for runs, and which of them may serve another one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session

from sqlalchemy_jobs.app import Handler

REST = 20
"""Of how many runs of a handler it is not asked whether they left their sessions as new, after one did not."""


class Opened:
    """A session for a run, and what the handler gets for it: ``base`` is SQLAlchemy's class of that.

    ``base`` is None where it serves one run only.
    """

    def __init__(self, session: Session, argument: Any, base: type[Any] | None) -> None:
        self.session = session
        self.argument = argument
        # A session with listeners of its own has the attribute that tells of a transaction from the beginning.
        self._may_serve_again = (
            base is not None
            and "dispatch" not in vars(session)
            and all(
                type(each).__init__ is own.__init__ and type(each).close is own.close
                for each, own in ((session, Session), (argument, base))
            )
        )
        if not self._may_serve_again:
            return
        session.info  # noqa: B018 (it is made by the first look at it)
        self._attributes = [vars(each) for each in dict.fromkeys((session, argument))]
        self._were = [each.copy() for each in self._attributes]
        self._dicts = [
            value for each in self._were for value in each.values() if type(value) is dict
        ]
        self._held = [each.copy() for each in self._dicts]

    def is_as_new(self) -> bool:
        """Tell whether nobody can see that it served a run: so it may serve another one, without being closed.

        To make a session and to close it costs as much as all the rest of a run. Never told of a class that does more
        than SQLAlchemy's own. A transaction leaves an attribute behind, and without one there is nothing in the
        identity map.
        """
        return (
            self._may_serve_again and self._attributes == self._were and self._dicts == self._held
        )


class Reserve:
    """Sessions that served a run and are as new: the next one may have them."""

    def __init__(self, base: type[Any]) -> None:
        self._base = base
        self._as_new: deque[Opened] = deque()
        self._rests: dict[str, int] = {}
        """By kind: of how many runs more the sessions are not looked at."""

    def take(self, handler: Handler, make: Callable[[], tuple[Session, Any]]) -> Opened:
        try:
            return self._as_new.pop()
        except IndexError:
            session, argument = make()
        kind = handler.declaration.kind
        if rest := self._rests.get(kind, 0):
            self._rests[kind] = rest - 1
        return Opened(session, argument, None if rest else self._base)

    def takes(self, opened: Opened, handler: Handler) -> bool:
        """Keep a session if it is as new; else it is to be closed."""
        if opened.is_as_new():
            self._as_new.append(opened)
            return True
        kind = handler.declaration.kind
        if not self._rests.get(kind):
            self._rests[kind] = REST
        return False
