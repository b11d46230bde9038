"""Hashes of files are remembered."""

import hashlib

from sd_numba.files import hashes
from sd_numba.files.hashes import files_hash


def test_files_hash_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_bytes(b"x" * 3_000_000)
    files[1].write_bytes(b"y")
    first = files_hash(files[:1])
    assert first == hashlib.sha256(b"x" * 3_000_000).hexdigest()[:10]
    both = files_hash(files)
    assert both == hashlib.sha256(b"x" * 3_000_000 + b"y").hexdigest()[:10]
    monkeypatch.setattr(hashes, "_sha256", lambda files: "f" * 64)
    assert (files_hash(files[:1]), files_hash(files)) == (first, both)
    files[0].write_bytes(b"changed")
    assert files_hash(files[:1]) == "f" * 10
    (tmp_path / "cache" / "sd-numba" / "hashes.json").write_text("rubbish")
    assert files_hash(files) == "f" * 10


def test_files_hash_without_a_place_for_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"y")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert files_hash([tmp_path / "file"]) == hashlib.sha256(b"y").hexdigest()[:10]
