"""Flags that an engine does not know are found before it is launched, from what a real program says in its help."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cluster.engines.flags import HelpRequest, check_flags, known_flags
from search_spaces.errors import InvalidValueError

REQUEST = HelpRequest(help=("serve", "--help=all"), package="pytest")
PROGRAM = """
import argparse, os, sys, pathlib
log = pathlib.Path(os.environ["CALLS"])
log.write_text(log.read_text() + " ".join(sys.argv[1:]) + "\\n" if log.exists() else " ".join(sys.argv[1:]) + "\\n")
if sys.argv[1:] == ["--version"]:
    print("engine 1.2.3+cpu"); sys.exit()
print("usage: engine serve [options]\\n  --max-num-seqs N, -s N\\n  --fast, --no-fast")
print("  --config JSON (as in --config.key=1)")
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "calls"


def engine(directory: Path, first_line: str) -> Path:
    program = directory / "engine"
    program.write_text(first_line + PROGRAM, encoding="utf-8")
    program.chmod(0o755)
    return program


def test_unknown_flags_are_named_with_those_that_come_near(tmp_path: Path, calls: Path) -> None:
    program = engine(tmp_path, f"#!{sys.executable}\n")
    env = {"CALLS": str(calls)}
    fine = ["serve", "model", "--max-num-seqs", "8", "--no-fast", "--config.key=2", "--config", "{}", "-s", "1"]
    version = check_flags("engine", [str(program)], fine, REQUEST, env)
    assert version == pytest.__version__  # said by the program's own Python, which need not start the engine
    with pytest.raises(InvalidValueError, match=r"does not know --max-num-seq \(it has --max-num-seqs.*\); --zzz;"):
        check_flags("engine", [str(program)], [*fine, "--max-num-seq=8", "--zzz"], REQUEST, env)
    assert calls.read_text() == "serve --help=all\n"


def test_a_program_is_asked_again_when_it_has_changed(tmp_path: Path, calls: Path) -> None:
    program = engine(tmp_path, f"#!{sys.executable}\n")
    env = {"CALLS": str(calls)}
    known_flags("engine", [str(program)], REQUEST, env)
    known_flags("engine", [str(program)], REQUEST, env)
    assert len(calls.read_text().splitlines()) == 1
    os.utime(program, ns=(1, 1))
    known_flags("engine", [str(program)], REQUEST, env)
    assert len(calls.read_text().splitlines()) == 2


def test_a_wrapper_says_its_version_itself(tmp_path: Path, calls: Path) -> None:
    inner = engine(tmp_path, f"#!{sys.executable}\n")
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {inner} "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    found = known_flags("engine", [str(wrapper)], REQUEST, {"CALLS": str(calls)})
    assert found.version == "1.2.3+cpu"
    assert found.flags == ("--config", "--config.key", "--fast", "--max-num-seqs", "--no-fast")


def test_a_module_is_asked_with_its_python(tmp_path: Path, calls: Path) -> None:
    (tmp_path / "engine_module.py").write_text(PROGRAM, encoding="utf-8")
    program = [sys.executable, "-m", "engine_module"]
    found = known_flags("engine", program, REQUEST, {"CALLS": str(calls), "PYTHONPATH": str(tmp_path)})
    assert found.version == pytest.__version__
    assert "--fast" in found.flags


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\necho broken >&2; exit 3\n", "exited with 3.*broken"),
        ("#!/bin/sh\necho nothing of interest\n", "named no flags"),
        ("no program at all", "cannot be asked what it knows"),
    ],
)
def test_a_program_that_cannot_be_asked_says_why(tmp_path: Path, calls: Path, text: str, said: str) -> None:
    del calls
    program = tmp_path / "engine"
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(InvalidValueError, match=said):
        known_flags("engine", [str(program)], REQUEST, {})
