"""A database that may be away for a while: what is asked of it is asked again until it answers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from mutransfer.progress import Report, quiet

PATIENCE = 600.0
"""Seconds after which a database that does not answer is given up."""

_LONGEST_WAIT = 5.0


class PatientStorage(RDBStorage):
    """Optuna's RDB storage, whose every operation waits for the database to come back.

    An operation that was done just as the connection broke may be done twice. The study bears
    that: a trial that nobody knows of has no living owner, and of two that continue the same one
    the later is dropped (`sweeps.study`).

    Args:
        url: Of the database.
        say: Is told that the database is away.
    """

    def __init__(self, url: str, say: Report = quiet) -> None:
        self.say = say
        # a connection that was broken while it was not in use is replaced before it is used
        super().__init__(url, engine_kwargs={"pool_pre_ping": True})


def _patiently(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        started, wait = time.monotonic(), 0.1
        while True:
            try:
                return method(self, *args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                if not is_away(error) or time.monotonic() - started > PATIENCE:
                    raise
            if wait == 0.8:  # a short stumble is not worth a line
                self.say(f"the database does not answer; asked again for {PATIENCE / 60:.0f} min")
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    return call


# with those that Optuna's cache in front of it calls
for _name in (*BaseStorage.__abstractmethods__, "_create_new_trial", "_get_trials",
              "_set_trial_param", "get_trial_id_from_study_id_trial_number"):  # fmt: skip
    setattr(PatientStorage, _name, _patiently(getattr(RDBStorage, _name)))


def is_away(error: BaseException | None) -> bool:
    """Whether this comes from a broken connection or a lock, and not from what was asked."""
    while error is not None:
        if isinstance(error, OperationalError):
            return True
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__ or error.__context__
    return False
