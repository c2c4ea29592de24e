"""Did the kernel kill a process for want of memory, or did someone else? Told by the kernel's own counters.

A signal 9 says nothing of its sender. The memory control group of a process counts those that the kernel's
out-of-memory killer took out of it, in every version of control groups; where there is none, the whole machine's count
(`oom_kill` of /proc/vmstat, Linux 4.13) stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True, kw_only=True)
class KillCount:
    """How many processes the kernel has killed for want of memory, by the counter in `source`."""

    source: str
    count: int


def kill_count(group: Path = Path("/proc/self/cgroup")) -> KillCount | None:
    """The count for processes that this one starts; None where the kernel does not tell."""
    for file in (*_group_files(group), _VMSTAT):
        count = _read(file)
        if count is not None:
            return KillCount(source=str(file), count=count)
    return None


def killed_for_memory(before: KillCount | None) -> bool | None:
    """True where the kernel has killed since `before`, False where it has not, None where it does not tell."""
    if before is None:
        return None
    now = _read(Path(before.source))
    return None if now is None else now > before.count


def _group_files(group: Path) -> list[Path]:
    """Files with the counter of this process's memory group: of version 2, then of version 1."""
    try:
        lines = group.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if number == "0":
            files += [root / inside / "memory.events" for root in (_ROOT, _ROOT / "unified")]
            files.append(_ROOT / "memory.events")  # the group's own root, as containers see it
        elif "memory" in controllers.split(","):
            files += [_ROOT / "memory" / inside / "memory.oom_control", _ROOT / "memory" / "memory.oom_control"]
    return files


def _read(file: Path) -> int | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    counts = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
    return int(counts[0]) if counts else None
