"""optuna-dashboard on the storage of our studies, in this process: the URL, secrets included, is on no command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna_dashboard
from optuna.artifacts import FileSystemArtifactStore
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna_dashboard import _app, _pareto_front

from studies.constraints import LEGACY_KEY
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
    _app.get_pareto_front_trials = feasible_front  # version 0.21 lists trials that break constraints as best ones
    app = optuna_dashboard.wsgi(storage.backend, artifact_store=FileSystemArtifactStore(artifact_dir))
    try:
        return make_server(host, port, app, server_class=DashboardServer, handler_class=_QuietHandler)
    except OSError as error:
        raise StorageError(
            f"the dashboard cannot listen on {host}:{port} ({error.strerror}); choose another port with --port"
        ) from error


def feasible_front(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    """The "best trials" of the dashboard, from those that violate no constraint; all trials of a study without any."""
    kept = [trial for trial in trials if all(value <= 0 for value in trial.system_attrs.get(LEGACY_KEY, ()))]
    found: list[FrozenTrial] = _pareto_front.get_pareto_front_trials(kept, directions)
    return found
