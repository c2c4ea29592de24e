"""Deployment files of a study's front, as archives that optuna-dashboard offers with each trial."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from search_spaces.engines import engine_spec
from search_spaces.errors import TunerError
from studies.dashboard_files import AttachedFile, attach_files
from studies.storage import Storage
from tuner.deploy.chosen import Chosen, choose
from tuner.deploy.command import Target, make_files
from tuner.deploy.model import MODELS
from tuner.deploy.render import OutFile
from tuner.places import Place
from tuner.report import StudyReport
from tuner.study_schema import StudyFile


def attach_deployments(storage: Storage, place: Place, report: StudyReport, file: StudyFile) -> tuple[str, ...]:
    """Attach an archive of deployment files to each member of the front; call it under the study's lease.

    Returns in words which members have none, and why.
    """
    attached: dict[int, list[AttachedFile]] = {}
    missing: dict[str, list[int]] = {}
    for member in report.front:
        try:
            chosen = choose(report, file, str(member.number))
            attached[member.number] = [_archive(chosen, target, place) for target in _targets(chosen)]
        except TunerError as error:
            reason = str(error).replace(f"trial {member.number} of {report.name} ", "it ")
            missing.setdefault(reason, []).append(member.number)
    attach_files(storage, report.name, place.artifacts, attached)
    return tuple(
        f"no deployment files of trial {', '.join(map(str, trials))}: {why}" for why, trials in missing.items()
    )


def _targets(chosen: Chosen) -> tuple[Target, ...]:
    """Kubernetes beside this tool's own script where the engine has published images."""
    return (Target.SHELL, Target.KUBERNETES) if engine_spec(chosen.config.engine).apart else (Target.SHELL,)


def _archive(chosen: Chosen, target: Target, place: Place) -> AttachedFile:
    with TemporaryDirectory(prefix="tuner-archive-") as name:
        out = Path(name) / "deployment"
        out.mkdir()
        models = place.deployments(chosen.study) / MODELS
        models.mkdir(parents=True, exist_ok=True)
        (out / MODELS).symlink_to(models)  # what the tool made for the measurement is not made again
        _, files = make_files(chosen, target, out)
    number = chosen.trial.number
    note = f"Made with: tuner deploy {chosen.study} --trial {number} --target {target} --out DIR\n"
    sources = [process.model_source for process in chosen.measurement.processes if process.model_source is not None]
    if any(Path(source).parent.name == MODELS for source in sources):
        note += f"The model below {MODELS}/, which that command makes too, is too large for this archive.\n"
    folder = f"{chosen.study}-{number}-{target}"
    content = _packed([*files, OutFile(path="ABOUT.txt", text=note)], folder)
    return AttachedFile(name=f"{folder}.tar.gz", content=content, mimetype="application/gzip")


def _packed(files: Sequence[OutFile], folder: str) -> bytes:
    """A compressed archive of `files` below `folder`; the same files make the same bytes."""
    plain = BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for file in files:
            content = file.text.encode()
            member = tarfile.TarInfo(f"{folder}/{file.path}")
            member.size, member.mode = len(content), 0o755 if file.executable else 0o644
            archive.addfile(member, BytesIO(content))
    return gzip.compress(plain.getvalue(), mtime=0)
