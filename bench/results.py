"""What the scripts that write a section of ``bench/RESULTS.md`` share: its circumstances, its command, its place."""

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def circumstances(threads: int, packages: Iterable[str]) -> str:
    """Return when and where a script ran: the date, the machine, the versions of these packages."""
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "unknown")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{time.strftime('%F')}, {os.cpu_count()} cores of {cpu.split(':')[-1].strip()}, {threads} threads, "
        f"Python {platform.python_version()}, {versions}."
    )


def command(script: str, paths: Iterable[Path]) -> str:
    """Return the command that was typed, with only the names of these paths: folders differ between machines."""
    names = {str(path): path.name for path in paths}
    return shlex.join(["python", "-m", f"bench.{script}", *(names.get(word, word) for word in sys.argv[1:])])


def write(script: str, text: str) -> None:
    """Write the section of a script in place of its previous one, or at the end."""
    old, begin, end = RESULTS.read_text(encoding="utf-8"), f"<!-- {script} -->", f"<!-- /{script} -->"
    before, found, after = old.partition(begin)
    if found:
        after = after.partition(end)[2]
    else:
        before, after = before.rstrip() + "\n\n", "\n"
    new = RESULTS.with_suffix(".tmp")
    new.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    os.replace(new, RESULTS)
