"""Where a study lies: an Optuna journal in the run's folder, or a database that the user names."""

from __future__ import annotations

import re
import time
from pathlib import Path
from urllib.parse import unquote_plus

import optuna

from mutransfer.errors import UserError
from mutransfer.progress import Report, quiet

_URLS = "sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"


def connect(
    name: str, folder: Path, storage: str | None = None, say: Report = quiet
) -> optuna.Study:
    """Creates or loads the study `name`.

    With the embedded storage the caller holds the experiment's ledger and so is alone here: a
    lock on the journal is that of a killed process, which Optuna would wait half a minute for,
    and a last line without its end is one that such a process had not finished.

    Args:
        name: Of the study.
        folder: Where the embedded storage, an Optuna journal, lies.
        storage: URL of an Optuna RDB storage to use in its place.
        say: Is told where it is away for a while.

    Raises:
        UserError: The URL is none that Optuna knows, its driver is not installed, or the
            database does not answer. No part of the URL that may hold a password is shown.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    if storage is None:
        journal = _journal(folder)
        journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
        _cut_torn_line(journal)
        return _create(name, JournalStorage(JournalFileBackend(str(journal))))
    # `from None`: what is said below is all that may be said, in a traceback too
    try:
        return _create(name, _open(storage, say))
    except ImportError:
        raise UserError(
            "the Python driver of this database is not installed",
            where="--storage",
            got=shown(storage),
            cure=_driver(storage),
        ) from None
    except DBAPIError as error:
        raise UserError(
            f"the database refuses: {_scrub(str(error.orig), storage)}",
            where="--storage",
            got=shown(storage),
            cure="Check the URL, and that the database can be reached from here.",
        ) from None
    except (SQLAlchemyError, ValueError):
        raise UserError(
            "not the URL of a database that a study can lie in",
            where="--storage",
            got=shown(storage),
            expected=_URLS,
        ) from None


def refuse_password(url: str) -> None:
    """Refuses a URL from a command line, which all users of the machine see, with a password in it.

    Raises:
        UserError: It has one.
    """
    if re.search(r"://[^/@]*:[^/]*@|[?&](password|key)=", url):
        raise UserError(
            "a password on the command line can be read by everybody on this machine",
            where="--storage",
            got=shown(url),
            cure="Leave it out of the URL and put it into PGPASSWORD or ~/.pgpass, or put the "
            "whole URL into the environment variable MUTRANSFER_STORAGE.",
        )


def place(folder: Path, storage: str | None) -> str:
    """Where the study lies, for a message."""
    return str(_journal(folder)) if storage is None else shown(storage)


def shown(url: str) -> str:
    """A storage's URL without a password.

    A mistyped URL has its password anywhere, so that of all but a SQLite file only the scheme
    is left.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        return url if re.fullmatch(r"[\w./-]*", url) else "…"
    if scheme == "sqlite" and "@" not in rest:
        return url.partition("?")[0]
    return f"{scheme}://…" if re.fullmatch(r"[a-z0-9+._]+", scheme) else "…"


def _open(url: str, say: Report) -> optuna.storages.BaseStorage:
    """The database with its tables; another process may be making them too."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    from sweeps.patience import PatientStorage

    tries = 5
    while True:
        try:
            return PatientStorage(url, say)
        except (IntegrityError, ProgrammingError, StorageInternalError):
            tries -= 1
            if not tries:
                raise
            time.sleep(0.5)


def _create(name: str, backend: optuna.storages.BaseStorage) -> optuna.Study:
    return optuna.create_study(
        study_name=name, storage=backend, direction="minimize", load_if_exists=True
    )


def _journal(folder: Path) -> Path:
    return folder / "study.journal"


def _cut_torn_line(journal: Path) -> None:
    """Cuts what follows the last newline: Optuna would append to it and never read it again."""
    if journal.exists():
        with journal.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _driver(url: str) -> str:
    if url.startswith("postgres"):
        return (
            "Run 'make setup EXTRAS=postgres' in the checkout or pip install "
            "'mutransfer[postgres]', and let the URL begin with postgresql+psycopg://."
        )
    return f"Install it with pip, or use {_URLS}."


def _scrub(message: str, url: str) -> str:
    """A database's message without the words of the URL, which a mistyped one takes apart."""
    if shown(url).startswith("sqlite:"):
        return message
    for part in re.split(r"[:/@?&=]+", url.partition("://")[2]):
        for word in {part, unquote_plus(part)} - {""}:
            message = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "…", message)
    return message
