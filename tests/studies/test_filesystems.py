"""SQLite on file systems that several machines share is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import studies.storage
from studies.errors import StorageError
from studies.filesystems import Mounts, mounts, network_file_system
from studies.storage import open_storage

TABLE: Mounts = (
    ("/", "ext4"),
    ("/home", "nfs4"),
    ("/home/me/scratch", "xfs"),
    ("/data", "xfs"),
    ("/data", "lustre"),
    ("/mnt/laptop", "fuse.sshfs"),
)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/home/me/studies.db", ("/home", "nfs4")),
        ("/home/me/not/yet/there/studies.db", ("/home", "nfs4")),
        ("/home/me/scratch/studies.db", None),
        ("/homes/studies.db", None),
        ("/data/studies.db", ("/data", "lustre")),
        ("/mnt/laptop/../laptop/x/studies.db", ("/mnt/laptop", "fuse.sshfs")),
        ("/var/studies.db", None),
    ],
)
def test_the_deepest_and_latest_mount_decides(path: str, found: tuple[str, str] | None) -> None:
    assert network_file_system(Path(path), TABLE) == found


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    table = (("/", "ext4"), (str(tmp_path / "shared"), "cifs"))
    assert network_file_system(tmp_path / "link" / "s.db", table) == (str(tmp_path / "shared"), "cifs")


def test_this_machine_has_mounts_and_a_local_temporary_folder(tmp_path: Path) -> None:
    assert "/" in dict(mounts())
    assert network_file_system(tmp_path) is None


def test_sqlite_there_is_refused_and_a_journal_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.filesystems.mounts", lambda: (("/", "ext4"), (str(tmp_path), "nfs4")))
    with pytest.raises(StorageError, match=rf"network file system \(nfs4 at {tmp_path}\).*use postgresql://"):
        open_storage(f"sqlite:///{tmp_path}/deep/studies.db")
    assert not (tmp_path / "deep").exists()
    open_storage(f"journal://{tmp_path}/studies.journal")
    monkeypatch.setattr(studies.storage, "network_file_system", lambda _: None)
    open_storage(f"sqlite:///{tmp_path}/deep/studies.db")
