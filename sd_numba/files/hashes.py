"""SHA-256 of files, with a cache of the results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..kernels.machine.jit import user_cache


def files_hash(files: Sequence[Path]) -> str:
    """Return the first ten hexadecimal digits of the SHA-256 over a model's files. Pass the files of the UNet.

    Hashing gigabytes takes seconds, so the result is cached in ``$XDG_CACHE_HOME/sd-numba/hashes.json``
    (``~/.cache`` by default) under the files' paths, sizes and modification times. A failure to write the
    cache is ignored.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr(stats).encode()).hexdigest()
    cache = (user_cache() or Path(os.devnull)) / "sd-numba" / "hashes.json"
    try:
        known: dict[str, str] = dict(json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    if isinstance(known.get(key), str):
        return known[key]
    known[key] = _sha256(files)[:10]
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
        temporary.write_text(json.dumps(known))
        os.replace(temporary, cache)
    return known[key]


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest_file(digest, path)
    return digest.hexdigest()


def digest_file(digest: Any, path: Path) -> None:
    """Add a file's bytes to a digest of `hashlib`."""
    block = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
