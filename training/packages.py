"""The npm packages with the artwork: authors, licences, download by npm, and verification."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """One version of a package, and its purpose; ``integrity`` is as in npm's lock files."""

    name: str
    version: str
    licence: str
    copyright: str
    use: str
    integrity: str

    @property
    def file_name(self) -> str:
        """Its file name from ``npm pack``."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "fluent": Package(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        licence="MIT",
        copyright="Fluent Emoji, (c) Microsoft Corporation",
        use="pictures in fluent style",
        integrity="sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "noto": Package(
        name="@iconify-json/noto",
        version="1.2.9",
        licence="Apache-2.0",
        copyright="Noto Emoji, (c) Google LLC",
        use="pictures in noto style",
        integrity="sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twemoji": Package(
        name="@iconify-json/twemoji",
        version="1.2.5",
        licence="CC-BY-4.0",
        copyright="Twemoji, (c) Twitter, Inc and other contributors",
        use="pictures in twemoji style",
        integrity="sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "names": Package(
        name="emojibase-data",
        version="17.0.0",
        licence="MIT",
        copyright="Emojibase, (c) Miles Johnson",
        use="names and keywords",
        integrity="sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    ),
}


def fetch_packages(folder: Path, packages: Iterable[Package] = PACKAGES.values()) -> None:
    """Let npm download the packages that a folder lacks."""
    missing = [f"{package.name}@{package.version}" for package in packages if not (folder / package.file_name).exists()]
    if not missing:
        return
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"npm, which downloads {' '.join(missing)}, is missing; install Node.js, which includes it")
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--loglevel=error", "--pack-destination", str(folder), *missing]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if result.returncode:
        raise ValueError(f"npm could not download {' '.join(missing)} (exit status {result.returncode}, see above)")


def read_members(folder: Path, package: Package, *members: str) -> list[Any]:
    """Read JSON files of a downloaded package, after checking its integrity and licence against the records."""
    path = folder / package.file_name
    data = path.read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != package.integrity:
        raise ValueError(f"{path}: found {found}, expected {package.integrity}; delete the file to download it again")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        about, *contents = (_read_json(archive, f"package/{member}") for member in ("package.json", *members))
    if about.get("license") != package.licence:
        raise ValueError(
            f"{path}: found the licence {about.get('license')!r}, expected {package.licence!r}; "
            "read the new one, and record it in training/packages.py if it allows this use"
        )
    return contents


def _read_json(archive: tarfile.TarFile, member: str) -> Any:
    stream = archive.extractfile(member)
    if stream is None:
        raise ValueError(f"{member} of the package is not a file")
    return json.load(stream)
