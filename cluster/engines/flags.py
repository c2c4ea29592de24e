"""Finds flags that an installed engine does not know before it is launched: from its own `--help`, read once.

An engine takes 10 s and more to say what it knows, so the answer is kept in a file, named by the program that gave it:
its path, size and time of change. An upgrade in place writes the program anew, and is asked again.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from search_spaces.errors import InvalidValueError
from search_spaces.serving import canonical_key

HELP_LIMIT_S = 180.0
"""Longest wait for an engine's help: it imports most of the engine first."""
CACHE_VARIABLE = "TUNER_CACHE"
_FLAG = re.compile(r"(?<![\w-])(--[A-Za-z][A-Za-z0-9_.-]*)")
_VERSION = re.compile(r"\d+\.\d+[\w.+-]*")


@dataclass(frozen=True, kw_only=True)
class HelpRequest:
    """How an engine says what it knows: the words after those of its program, and its Python package."""

    help: tuple[str, ...]
    package: str


@dataclass(frozen=True, kw_only=True)
class KnownFlags:
    """What an installed engine knows: its version, and the flags that its help names."""

    version: str
    flags: tuple[str, ...]

    def unknown(self, argv: Sequence[str]) -> tuple[str, ...]:
        """The flags of `argv` that are not known; `--flag=value` and `--flag.key` count as `--flag`."""
        known = set(self.flags)
        used = (word.split("=")[0] for word in argv if word.startswith("--"))
        return tuple(dict.fromkeys(flag for flag in used if flag not in known and flag.split(".")[0] not in known))


def check_flags(
    engine: str, program: Sequence[str], argv: Sequence[str], request: HelpRequest, env: Mapping[str, str]
) -> str:
    """The version of the engine that `program` starts.

    Raises `InvalidValueError` for flags of `argv` that it does not know, with those that it has in their place.
    """
    known = known_flags(engine, program, request, env)
    unknown = known.unknown(argv)
    if not unknown:
        return known.version
    hints = "; ".join(f"{flag}{_nearest(flag, known.flags)}" for flag in unknown)
    raise InvalidValueError(
        f"{engine} {known.version} ({program[0]}) does not know {hints}; leave that out, or install another"
    )


def _nearest(flag: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(flag, known, n=2, cutoff=0.7)
    return f" (it has {' and '.join(close)})" if close else ""


def known_flags(engine: str, program: Sequence[str], request: HelpRequest, env: Mapping[str, str]) -> KnownFlags:
    """What `program` says it knows, kept for the next time; raises `InvalidValueError` where it says nothing."""
    file = _cache_folder() / f"{engine}-{_identity(program, request)}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return KnownFlags(version=str(kept["version"]), flags=tuple(kept["flags"]))
    except (OSError, ValueError, KeyError):
        found = _asked(engine, program, request, env)
    _keep(file, found)
    return found


def _identity(program: Sequence[str], request: HelpRequest) -> str:
    where = shutil.which(program[0])
    path = Path(where or program[0]).resolve()
    state = path.stat() if path.is_file() else None
    stamp = None if state is None else (state.st_size, state.st_mtime_ns)
    return canonical_key({"program": [str(path), *program[1:]], "stamp": stamp, "request": asdict(request)})


def _cache_folder() -> Path:
    base = os.environ.get(CACHE_VARIABLE) or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tuner" / "engine-flags"


def _keep(file: Path, found: KnownFlags) -> None:
    """Write the answer by an atomic rename; a folder that cannot be written only costs the time of asking again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
        with os.fdopen(descriptor, "w", encoding="utf-8") as sink:
            json.dump(asdict(found), sink)
        Path(partial).replace(file)
    except OSError:
        return


def _asked(engine: str, program: Sequence[str], request: HelpRequest, env: Mapping[str, str]) -> KnownFlags:
    text = _output(engine, [*program, *request.help], env)
    flags = tuple(sorted(set(_FLAG.findall(text))))
    if not flags:
        raise InvalidValueError(f"{engine} named no flags in its help ({' '.join([*program, *request.help])})")
    found = _VERSION.search(_output(engine, _version_command(program, request.package), env))
    return KnownFlags(version=found[0] if found else "of unknown version", flags=flags)


def _version_command(program: Sequence[str], package: str) -> list[str]:
    """What says the version: the Python of the program, which need not import the engine for it, else the program."""
    python = _python_of(program)
    if python is None:
        return [*program, "--version"]
    return [python, "-c", f"from importlib.metadata import version; print(version({package!r}))"]


def _python_of(program: Sequence[str]) -> str | None:
    """The interpreter that runs `program`, which is a Python or a script of one; None where it is neither."""
    if "-m" in program:
        return program[0]
    script = shutil.which(program[0])
    if script is None:
        return None
    with Path(script).open("rb") as file:
        first = file.readline(512).decode(errors="replace").strip()
    return first.removeprefix("#!").strip() if re.fullmatch(r"#!\s*\S*python[\d.]*", first) else None


def _output(engine: str, command: Sequence[str], env: Mapping[str, str]) -> str:
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=HELP_LIMIT_S,
            env={**os.environ, **env, "COLUMNS": "200"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InvalidValueError(f"{engine} cannot be asked what it knows ({' '.join(command)}): {error}") from error
    if answer.returncode != 0:
        last = (answer.stderr or answer.stdout).strip().splitlines()[-3:]
        raise InvalidValueError(
            f"{engine} cannot be asked what it knows ({' '.join(command)} exited with {answer.returncode}): "
            f"{' '.join(last)}"
        )
    return answer.stdout
