"""`tuner serve`: the studies of a storage over HTTP."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from search_spaces.errors import InvalidValueError, TunerError
from tuner.cli_options import StorageOption


def serve(
    storage: StorageOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines reach needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for a free one.", min=0, max=65535)] = 8090,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens",
            help="File with lines 'read TOKEN' and 'write TOKEN' that only you can read; "
            "the variables TUNER_READ_TOKEN and TUNER_WRITE_TOKEN by default.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            envvar="RAY_ADDRESS",
            help="Ray cluster for the studies that are submitted; they run on this machine by default.",
        ),
    ] = None,
) -> None:
    """Serve studies, fronts, reports, predictions and plans over HTTP, and run submitted studies; a page is at /."""
    try:
        import uvicorn

        from tuner.serve.app import make_app, make_service
    except ModuleNotFoundError as error:
        raise TunerError(f"{error.name} is not installed; use: pip install 'tuner[serve]'") from error
    from studies.storage import open_storage
    from tuner.places import existing_place, find_place
    from tuner.serve.access import find_tokens, require_safe

    found = find_tokens(tokens)
    require_safe(host, found)
    place = existing_place(storage) if found.write is None else find_place(storage)
    service = make_service(place, open_storage(place.url), found, address)
    with _listening(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        rights = "read and write by token" if found.any else "reading only, from this machine, without a token"
        print(f"Serving http://{shown}:{listener.getsockname()[1]}/ ({rights}; Ctrl-C to end)", flush=True)
        config = uvicorn.Config(make_app(service), access_log=False, server_header=False, log_level="warning")
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print("Service ended.", file=sys.stderr)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InvalidValueError(
            f"cannot listen on {host} port {port} ({error.strerror or error}); choose another --host or --port"
        ) from error
