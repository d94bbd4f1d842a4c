"""Who is at work on a shared study: every process beats, and who misses four beats is gone.

No clock is compared with another one. A process counts its own beats, each of which it has written
to the database, and how many of them passed since another's count last changed. So a clock that
jumps, a machine that sleeps and a database that is away put nobody's trials into other hands.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Self

import optuna

from mutransfer.errors import UserError

LEASE = 60.0
"""Seconds without a beat after which a process is gone."""

_MISSES = 4
_PREFIX = "beats of "
_SECONDS = "lease"
_LEFT = -1
_GOODBYE = 3.0


class Lease:
    """This process's place at a study; a context manager.

    Args:
        study: A study in a database.
        seconds: How long the place is kept without a sign of life; for all processes alike.

    Attributes:
        owner: The process's name; its trials carry it.
    """

    def __init__(self, study: optuna.Study, seconds: float = LEASE) -> None:
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.interval, self._seconds = seconds / _MISSES, seconds
        self._study, self._beats = study, 0
        self._seen: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> Self:
        """Takes the place.

        Raises:
            UserError: The processes at this study have another lease.
        """
        theirs = self._study.user_attrs.get(_SECONDS)
        if theirs is None:
            self._study.set_user_attr(_SECONDS, self._seconds)
        elif theirs != self._seconds:
            raise UserError("processes at one study have one lease", where="--lease",
                            got=self._seconds, expected=theirs)  # fmt: skip
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the study: what this process had in work is free at once."""
        self._stop.set()
        leave = threading.Thread(target=self._leave, daemon=True)
        leave.start()
        leave.join(_GOODBYE)  # a database that is away must not keep the user

    def beat(self) -> None:
        """Gives a sign of life, and looks for those of the others."""
        with self._lock:
            if self._stop.is_set():
                return
            self._study.set_user_attr(_PREFIX + self.owner, self._beats + 1)
            self._beats += 1  # written, and only then counted
            counts = self._study.user_attrs
            for name, count in counts.items():
                owner = name.removeprefix(_PREFIX)
                if owner == name or owner == self.owner:
                    continue
                if self._seen.get(owner, (None, 0))[0] != count:
                    self._seen[owner] = (count, self._beats)

    def is_gone(self, owner: str | None, trial: int) -> bool:
        """Whether the process that has this trial has left, or missed its beats.

        Where it died before it could write its name, the first question starts the clock.
        """
        if owner == self.owner:
            return False
        name = owner or f"nobody, at trial {trial}"
        with self._lock:
            count, since = self._seen.setdefault(name, (0, self._beats))
            return count == _LEFT or self._beats - since >= _MISSES

    def _keep_beating(self) -> None:
        while not self._stop.wait(self.interval):
            with suppress(Exception):  # the process hears of it with its own next question
                self.beat()

    def _leave(self) -> None:
        with self._lock:
            self._study.set_user_attr(_PREFIX + self.owner, _LEFT)
