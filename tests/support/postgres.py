"""A real PostgreSQL server for the tests: started by them, on a free port of 127.0.0.1, with a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import free_port

START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
USER, PASSWORD = "tuner", "hush-hush"
_UNPRIVILEGED = ("postgres", "nobody")
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",  # a test's data may go with the machine
    "max_connections": "60",
}


@dataclass
class PostgresServer:
    """A running server; its user is a superuser with a password."""

    port: int
    home: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def log_path(self) -> Path:
        return self.home / "server.log"

    def start(self) -> None:
        """Start it on its port, with its data, and wait until it answers."""
        settings = _OPTIONS | {"port": str(self.port)}
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with self.log_path.open("ab") as sink:
            argv = ["postgres", "-D", str(self.home / "data"), *options]
            self.process = _popen(argv, stdout=sink, stderr=sink)
        _wait_until_ready(self, self.process)

    def stop(self) -> None:
        """Disconnect everybody and end it; its data stay."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_LIMIT_S)
        self.process = None

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """URL of an empty database."""
        import psycopg

        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload,unused-ignore]  # made here
        return self.url(name)


def missing() -> str | None:
    """Why no server can be started here; None where one can."""
    try:
        import psycopg  # noqa: F401 - whether it is there is the question
    except ImportError:
        return "the driver psycopg is not installed (pip install 'tuner[postgresql]')"
    if binaries() is None:
        return "no PostgreSQL server on this machine (Debian: apt install postgresql)"
    if os.geteuid() == 0 and _account() is None:
        return f"PostgreSQL does not run as root, and there is no user {' or '.join(_UNPRIVILEGED)}"
    return None


def binaries() -> Path | None:
    """Folder with `initdb` and `postgres`: of the newest version that Debian installed, else of the search path."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    found = shutil.which("initdb")
    folders = [path.parent for path in reversed(debian)] + ([Path(found).parent] if found else [])
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


def _account() -> pwd.struct_passwd | None:
    for name in _UNPRIVILEGED:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A server for the time of the block; call it only where `missing()` is None."""
    home = Path(tempfile.mkdtemp(prefix="tuner-postgres-"))
    server = PostgresServer(port=free_port(), home=home)
    try:
        _initialise(home)
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)


def _initialise(home: Path) -> None:
    password = home / "password"
    password.write_text(PASSWORD)
    account = _account() if os.geteuid() == 0 else None
    if account is not None:
        for path in (home, password):
            os.chown(path, account.pw_uid, account.pw_gid)
    command = ["initdb", "-D", str(home / "data"), "-U", USER, "--pwfile", str(password), "--auth=scram-sha-256"]
    process = _popen([*command, "--encoding=UTF8", "--locale=C", "--no-sync"], stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=START_LIMIT_S)
    assert process.returncode == 0, f"initdb failed:\n{out.decode(errors='replace')}"


def _popen(argv: list[str], **options: object) -> subprocess.Popen[bytes]:
    """Run one of the server's programs, as an unprivileged user where this one is root."""
    folder = binaries()
    assert folder is not None
    account = _account() if os.geteuid() == 0 else None
    if account is not None:
        options |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    settings = {"stderr": subprocess.STDOUT, "cwd": "/", "env": {**os.environ, "LC_ALL": "C"}} | options
    return subprocess.Popen([str(folder / argv[0]), *argv[1:]], **settings)  # type: ignore[call-overload,no-any-return]


def _wait_until_ready(server: PostgresServer, process: subprocess.Popen[bytes]) -> None:
    import psycopg

    deadline = time.monotonic() + START_LIMIT_S
    while True:
        assert process.poll() is None, f"PostgreSQL ended:\n{server.log_path.read_text()}"
        assert time.monotonic() < deadline, f"PostgreSQL is not ready:\n{server.log_path.read_text()}"
        with suppress(psycopg.OperationalError):
            psycopg.connect(server.url(), connect_timeout=5).close()
            return
        time.sleep(0.1)
