"""optuna-dashboard on the storage of our studies, in this process: the URL, secrets included, is on no command line."""

from __future__ import annotations

from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna_dashboard
from optuna.artifacts import FileSystemArtifactStore

from studies.errors import StorageError
from studies.storage import Storage


class DashboardServer(ThreadingMixIn, WSGIServer):
    """Answers every request in a thread of its own, so that a slow one does not block the page."""

    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *_args: object) -> None:
        """Requests are nobody's concern."""


def open_dashboard(storage: Storage, artifact_dir: Path, *, host: str, port: int) -> DashboardServer:
    """A server that listens on `host` and `port` (0 for a free one); call its `serve_forever`.

    Raises `StorageError` where the port cannot be had.
    """
    artifact_dir.mkdir(parents=True, exist_ok=True)
    app = optuna_dashboard.wsgi(storage.backend, artifact_store=FileSystemArtifactStore(artifact_dir))
    try:
        return make_server(host, port, app, server_class=DashboardServer, handler_class=_QuietHandler)
    except OSError as error:
        raise StorageError(
            f"the dashboard cannot listen on {host}:{port} ({error.strerror}); choose another port with --port"
        ) from error
