"""Which file system a path lies on, and whether several machines share it."""

from __future__ import annotations

from pathlib import Path

import psutil

_KERNEL = (
    "nfs nfs3 nfs4 cifs smb smbfs smb2 smb3 afs afpfs ncpfs davfs ceph glusterfs lustre gpfs mmfs beegfs panfs pvfs2 "
    "orangefs wekafs fhgfs gfs gfs2 ocfs2 quobyte moosefs juicefs ibrix"
)
_FUSE = (
    "sshfs ceph glusterfs beegfs davfs davfs2 rclone s3fs goofys mountpoint-s3 gcsfuse blobfuse blobfuse2 juicefs "
    "moosefs mfs quobyte cvmfs smbnetfs hdfs alluxio weka seaweedfs curlftpfs"
)
NETWORK_FILE_SYSTEMS = frozenset(_KERNEL.split()) | {f"fuse.{name}" for name in _FUSE.split()}
"""Types as mount tables name them. `9p` and `virtiofs` are left out: the root of many a virtual machine is one."""

Mounts = tuple[tuple[str, str], ...]


def mounts() -> Mounts:
    """Mount points of this machine and their types, later ones hiding earlier ones."""
    return tuple((mount.mountpoint, mount.fstype) for mount in psutil.disk_partitions(all=True))


def network_file_system(path: Path, table: Mounts | None = None) -> tuple[str, str] | None:
    """Mount point and type of the network file system that `path` lies on, or will when it is made; None elsewhere."""
    resolved = path.resolve()
    inside = [(Path(point), kind) for point, kind in (mounts() if table is None else table)]
    around = [(point, kind) for point, kind in inside if resolved.is_relative_to(point)]
    if not around:
        return None
    deepest = max(len(point.parts) for point, _ in around)
    point, kind = [entry for entry in around if len(entry[0].parts) == deepest][-1]
    return (str(point), kind) if kind.lower() in NETWORK_FILE_SYSTEMS else None
