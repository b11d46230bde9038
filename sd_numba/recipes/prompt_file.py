"""Files of prompts, for many pictures in one run: text, CSV, JSON or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..generation.settings import Settings, settings_of
from ..values import TEXT, read_value
from .recipe import read_fields

MAX_BYTES = 64 << 20
OUTPUT = "output"  # the key of a picture's file


def read_prompt_file(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the settings of pictures, in the order of the file.

    Parameters
    ----------
    path : path
        UTF-8, with or without a byte order mark. The extension determines the format:

        ``.csv``
            A header with names of settings, as `read_fields` knows them; an empty cell means not given (RFC 4180).
        ``.json``
            A list of prompts or of objects with settings, or ``{"prompts": [...]}``.
        ``.jsonl``, ``.ndjson``
            A prompt (a JSON string) or an object on each line.
        others
            A prompt on each line; empty lines and those that begin with ``#`` are skipped.

    Returns
    -------
    list of dict
        The given settings of each picture by the names of `Recipe`'s fields: always ``prompt``, and ``output``, the
        name of its file, if given. The file counts ``clip_skip`` as AUTOMATIC1111, sd.cpp and the command line do,
        where 1 skips no layer; the result counts it as `Recipe` does.

    Raises
    ------
    InputError
        The file is missing, too large, not UTF-8 or damaged, holds no prompt, or a setting is wrong; the
        message names the line.
    """
    path = Path(path)
    content = _read(path)
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _line_rows, ".ndjson": _line_rows}
    rows = readers.get(path.suffix.lower(), _text_rows)(path, content)
    found = [_checked(f"{path}: {place}", row) for place, row in rows]
    if not found:
        raise InputError(f"{path}: no prompt in the file")
    return found


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MB; split the file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not valid UTF-8; save the file as UTF-8") from None


def _text_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield f"line {number}", {"prompt": prompt}


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] | None = None
    line = 0
    try:
        for cells in rows:
            place, line = f"line {line + 1}", rows.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = cells
                _check_header(f"{path}: {place}", header)
            elif len(cells) > len(header):
                raise InputError(f"{path}: {place}: found {len(cells)} cells, expected {len(header)}, as in the header")
            else:
                yield place, {key: cell for key, cell in zip(header, cells, strict=False) if cell.strip()}
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: not valid CSV (RFC 4180): {error}") from None


def _check_header(place: str, header: list[str]) -> None:
    names = [name.strip().lower() for name in header]
    if "prompt" not in names:
        raise InputError(f"{place}: found the header {','.join(header)!r:.80}, expected a column named prompt")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{place}: two columns are named {name!r:.80}; remove one")


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    found = _parse(f"{path}", content, 1)
    if isinstance(found, dict) and "prompts" in found:
        found = found["prompts"]
    if not isinstance(found, list):
        raise InputError(f'{path}: found {_kind(found)}, expected a list of prompts or {{"prompts": [...]}}')
    for number, item in enumerate(found, 1):
        yield f"prompt {number}", item


def _line_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(f"{path}", line, number)


def _parse(path: str, content: str, line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{path}: {place}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: line {line}: the JSON is nested too deeply or has too long a number") from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _checked(place: str, row: object) -> dict[str, Any]:
    """Check the settings of one picture."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise InputError(f"{place}: found {_kind(row)}, expected a prompt or an object with settings")
    outputs = {key: value for key, value in row.items() if key.strip().lower() == OUTPUT and value is not None}
    try:
        found = read_fields({key: value for key, value in row.items() if key not in outputs})
        for key, value in outputs.items():
            found[OUTPUT] = read_value(key, value, TEXT.read)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    known = settings_of(Settings)
    for name in found.keys() - {OUTPUT}:
        if name not in known:
            raise InputError(f"{place}: {name} applies to the whole run; give it as an option")
    if not found.get("prompt", "").strip():
        raise InputError(f"{place}: no prompt")
    for name in found.keys() & known.keys():
        if offset := known[name].offset:
            found[name] = max(found[name] - offset, 0)
    return found
