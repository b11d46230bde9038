"""Adds files of the repository outside `docs/` to the site, so that a link works on the site and in the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/RESULTS.md",
    *(f"sd_numba/models/emoji-world/{name}" for name in ("README.md", "NOTICE.md", "prompts.txt")),
    *(f"sd_numba/models/emoji-world/{name}.jpg" for name in ("exam", "examples", "grid", "precisions")),
    "training/README.md",
    "training/vocabulary.toml",
]
TARGET = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files, at the same paths as in the repository."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links from `docs/` to the files above point to their copies: on the site, `docs/` is the root."""
    folder = posixpath.dirname(page.file.src_uri)

    def target(match: re.Match[str]) -> str:
        inside = posixpath.normpath(posixpath.join("docs", folder, match[1]))
        return posixpath.relpath(inside, folder or ".") if inside in OUTSIDE else match[1]

    return TARGET.sub(target, markdown)
