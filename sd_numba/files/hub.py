"""Download and verify files of the Hugging Face hub: the only module that uses the network.

``huggingface_hub`` asks the hub, authenticates, retries and draws the progress bars. This module adds
SHA-256 checksums (it compares sizes only) and resuming after an interruption (its version 2 restarts a file in every
process). Resuming needs plain HTTP, where the size of the partial file says where to continue. With Xet, chunks arrive
in any order inside a native library. The layout of the hub's cache, which other programs share, is described at
https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import DownloadError, InputError, SdNumbaError
from .hashes import digest_file

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MOVED = {"runwayml/stable-diffusion-v1-5": DEFAULT_MODEL}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AGAIN = "run the same command again to continue where it stopped"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it. The checksum is SHA-256 for a large file (in LFS), git's SHA-1 for a small one."""

    name: str
    size: int
    checksum: str

    def matches(self, path: Path) -> bool:
        """Whether the file at this path has this size and checksum."""
        if path.stat().st_size != self.size:
            return False
        if len(self.checksum) == 64:
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        digest_file(digest, path)
        return digest.hexdigest() == self.checksum


@dataclass(frozen=True)
class Repository:
    """A model's files at one commit."""

    model: str
    revision: str
    commit: str
    files: dict[str, HubFile]


@dataclass(frozen=True)
class Place:
    """Destination of files: `folder` has them by name, `store` by checksum.

    In the hub's cache, the store holds the files and the folder holds links to them. For a plain folder, the store
    holds only unfinished files.
    """

    folder: Path
    store: Path
    in_cache: bool

    def reuse(self, file: HubFile) -> bool:
        """Whether the complete file already exists; a damaged one counts as missing."""
        path, blob = self.folder / file.name, self.store / file.checksum
        found = next((candidate for candidate in (blob, path) if candidate.is_file()), None)
        if found is None:
            return False
        if not file.matches(found):
            logger.warning("%s: differs from the hub's file; downloading it again", path)
            if self.in_cache:  # other programs would take it for complete
                found.unlink()
                path.unlink(missing_ok=True)
            return False
        if found == blob and not (path.exists() and path.samefile(blob)):
            self._link(blob, path)
        return True

    def partial(self, file: HubFile) -> Path:
        """Return the path of the partial download."""
        return self.store / f"{file.checksum}.incomplete"

    def accept(self, file: HubFile) -> None:
        """Move a finished file to its final name."""
        path = self.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.in_cache:
            blob = self.store / file.checksum
            os.replace(self.partial(file), blob)
            self._link(blob, path)
        else:
            os.replace(self.partial(file), path)

    @staticmethod
    def _link(blob: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            path.symlink_to(os.path.relpath(blob, path.parent))
        except OSError:  # a file system without links: huggingface_hub moves the file, too
            os.replace(blob, path)


def _agent() -> dict[str, Any]:
    return {"library_name": "sd-numba", "library_version": __version__}


def list_repository(model: str, revision: str | None) -> Repository:
    """Ask the hub for the names, sizes and checksums of a repository's files.

    Raises
    ------
    DownloadError, InputError
        The hub cannot be reached or refuses access, or the id is not valid.
    """
    from huggingface_hub import HfApi, constants  # noqa: PLC0415  # takes 0.2 s

    if constants.HF_HUB_OFFLINE:
        raise DownloadError("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it and run the command again")
    try:
        info = HfApi(**_agent()).model_info(
            model, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        commit = str(info.sha)
        files = {}
        for entry in info.siblings or ():
            checksum = str(entry.lfs.sha256 if entry.lfs else entry.blob_id)
            # They become file names.
            if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", checksum) or not re.fullmatch("[0-9a-f]{40}", commit):
                raise ValueError(f"{entry.rfilename}: no checksum")
            files[entry.rfilename] = HubFile(entry.rfilename, int(str(entry.size)), checksum)
    except Exception as error:  # of huggingface_hub and, depending on its version, of httpx, httpx2 or requests
        raise _explained(error, model, revision) from None
    return Repository(model, revision or constants.DEFAULT_REVISION, commit, files)


def choose_place(repository: Repository, to: str | os.PathLike[str] | None) -> Place:
    """Return the plain folder `to`, or the place of this commit in the hub's cache."""
    from huggingface_hub import constants  # noqa: PLC0415

    if to is not None:
        return Place(Path(to), Path(to) / ".incomplete", in_cache=False)
    folder = cache_folder(constants.HF_HUB_CACHE, repository.model)
    return Place(folder / "snapshots" / repository.commit, folder / "blobs", in_cache=True)


def cache_folder(cache: str, model: str) -> Path:
    """Return a model's folder in a hub cache."""
    return Path(cache) / f"models--{model.replace('/', '--')}"


def fetch_missing(repository: Repository, place: Place, names: Sequence[str]) -> None:
    """Download the missing files, if the disk has room for them.

    Raises
    ------
    DownloadError
        The disk is full, the hub cannot be reached or refuses access, or a checksum is wrong.
    """
    missing = [file for name in names if not place.reuse(file := repository.files[name])]
    needed = sum(file.size for file in missing)
    needed -= sum(place.partial(file).stat().st_size for file in missing if place.partial(file).exists())
    disk = next(folder for folder in (place.store.absolute(), *place.store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise DownloadError(f"{disk}: not enough disk space: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    for file in missing:
        _fetch(repository, file, place)


def _fetch(repository: Repository, file: HubFile, place: Place) -> None:
    """Download one file, resuming an earlier attempt. Verify it before it gets its final name."""
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers  # noqa: PLC0415

    headers = build_hf_headers(**_agent())
    partial = place.partial(file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("ab") as stream:
            _lock(stream, file)
            if stream.tell() > file.size:
                stream.truncate(0)
            http_get(
                hf_hub_url(repository.model, file.name, revision=repository.commit),
                stream,
                resume_size=os.fstat(stream.fileno()).st_size,
                headers={**headers, "Accept-Encoding": "identity"},  # a compressed download cannot be resumed
                expected_size=file.size,
                displayed_filename=file.name,
            )
            stream.flush()
            os.fsync(stream.fileno())
    except SdNumbaError:
        raise
    except Exception as error:  # as in list_repository, or from the disk
        raise _explained(error, repository.model, repository.revision, file.name) from None
    if not file.matches(partial):
        partial.unlink()
        raise DownloadError(
            f"{file.name}: wrong checksum: the hub lists {file.checksum[:12]}...; the downloaded file was removed; "
            "run the same command again"
        )
    place.accept(file)


def _lock(stream: Any, file: HubFile) -> None:
    """Keep a second download from appending to the same file, until the stream is closed."""
    try:
        import fcntl  # noqa: PLC0415  # not on Windows

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DownloadError(f"{file.name}: another download of this file is running; wait until it ends") from None
    except (ImportError, OSError):  # a file system without locks
        return


def _explained(error: Exception, model: str, revision: str | None, file: str | None = None) -> Exception:
    """Turn an error into one line that says what to do."""
    from huggingface_hub import constants, errors  # noqa: PLC0415

    host = constants.ENDPOINT
    page = f"{host}/{model}"
    moved = f"; it has moved to {MOVED[model]}" if model in MOVED else ""
    what = f"{model}: {file}" if file else model
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return DownloadError(f"{what}: the disk is full; make room and {AGAIN}")
    if isinstance(error, OSError) and error.filename:
        return error
    if isinstance(error, errors.HFValidationError):
        return InputError(f"model: found {model!r}, expected an id of the hub, such as {DEFAULT_MODEL}")
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadError(f"{model}: no revision {revision}; its branches and tags are at {page}/tree/main")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            return DownloadError(
                f"{what}: no access (HTTP {status}): the model does not exist, or it is private or gated: accept its "
                f"licence at {page} and set HF_TOKEN to your token{moved}"
            )
        if status == 404:
            return DownloadError(f"{what}: not found at {host}; check the name{moved}")
        return DownloadError(f"{what}: {host} answered with HTTP {status}; wait a while, then {AGAIN}")
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, (LookupError, TypeError, ValueError, AttributeError)):
        return DownloadError(f"{what}: {host} does not answer like a Hugging Face hub ({reason}); check HF_ENDPOINT")
    stopped = "lost the connection to" if file else "cannot connect to"
    return DownloadError(f"{what}: {stopped} {host} ({reason}); check the network and {AGAIN}")
