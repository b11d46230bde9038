"""Memory that this process can still use, under the limits of the machine, its control groups and the process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

UNKNOWN = 1 << 62  # bytes: the system reports no limit


def available_memory(root: str | Path = "/") -> int:
    """Return the bytes of memory that can still be used: the lowest of the limits that the system reports.

    Parameters
    ----------
    root : path
        Folder that contains ``proc`` and ``sys``.
    """
    root = Path(root)
    return max(0, min([UNKNOWN, *_of_machine(root), *_of_groups(root), *_of_process(root)]))


def _of_machine(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _of_groups(root: Path) -> Iterator[int]:
    """Yield the memory left in this control group and its ancestors (version 1 or 2); page cache counts as free."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = base / path.lstrip("/")
        while True:
            limit, used = (_read(group / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                counts = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                total = "total_" if "total_inactive_file" in counts else ""  # version 1: includes the groups below
                cached = sum(int(counts.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int(limit) - int(used) + cached
            if group == base or base not in group.parents:
                break
            group = group.parent


def _of_process(root: Path) -> Iterator[int]:
    pages = _read(root / "proc/self/statm").split()
    if not pages:
        return
    import resource  # noqa: PLC0415  # available wherever /proc exists

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - int(pages[0]) * resource.getpagesize()


def _read(path: Path) -> str:
    """Return a file's text, or an empty string if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes, including mapped files; 0 if unknown."""
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
