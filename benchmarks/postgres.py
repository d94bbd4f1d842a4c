"""A PostgreSQL server of its own in a temporary folder, for benchmarks and tests."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self


def binaries() -> Path | None:
    """The folder of the server's programs, or `None` where it is not installed."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


class Postgres:
    """A server with one user, who has a password; a context manager.

    The server refuses to run as root, and is then run as the user `postgres`.

    Attributes:
        password: Of the user `sweeper`.
        url: Of the database, with the password in it.
    """

    def __init__(self) -> None:
        found = binaries()
        assert found is not None, "PostgreSQL is not installed (Debian: apt install postgresql)"
        self._bin = found
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(self._folder, "postgres", "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.password = secrets.token_hex(12)
        self.url = f"postgresql+psycopg://sweeper:{self.password}@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> Self:
        secret = self._folder / "secret"
        secret.write_text(self.password)
        if self._as:
            shutil.chown(secret, "postgres", "postgres")
        self._run("initdb", "-D", self._data, "-U", "sweeper", "--auth=scram-sha-256",
                  f"--pwfile={secret}", "--no-sync")  # fmt: skip
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def start(self) -> None:
        """Starts it and waits until it answers."""
        options = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1"
        self._run("pg_ctl", "-D", self._data, "-l", str(self._folder / "log"), "-w", "-o",
                  options, "start")  # fmt: skip

    def stop(self) -> None:
        """Stops it at once, whoever is connected."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *args: str) -> None:
        # not to a pipe: the server that pg_ctl leaves behind would hold it open
        subprocess.run(
            [self._bin / program, *args], check=True, cwd=self._folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._as,
        )  # fmt: skip
