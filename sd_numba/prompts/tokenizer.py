"""CLIP's tokenizer: text -> token ids, exactly those of transformers' ``CLIPTokenizer``.

Text is normalised (NFC, runs of white space folded, lower case), the special tokens are matched, the rest is split
into words, and every word is byte-pair encoded over its UTF-8 bytes, with ``</w>`` at word ends. The ``tokenizers``
library does the work; this module reads a model's tokenizer folder and sets it up.

Method: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from ..errors import InputError, ModelError
from ..files.folders import packaged, read_json

CLIP_LENGTH = 77
SPECIAL_TOKENS = {  # in the order in which they are registered; unnamed ones take these defaults
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# Special tokens, English contractions, runs of letters, single digits, runs of anything else but white space.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Turns prompts into rows of token ids: start, tokens, end, padding.

    Attributes
    ----------
    max_length : int
        Ids in a row, 77 for CLIP.
    vocab_size : int
        One more than the largest id of the model's own tokens.
    bos_id, eos_id, pad_id : int
        Ids of the start, the end and the padding (SD 1.x pads with the end token, SD 2.x with ``!``, id 0).

    Examples
    --------
    >>> from sd_numba.checkpoints.opening import embedded_model_path
    >>> tokenizer = Tokenizer.from_folder(embedded_model_path() / "tokenizer")
    >>> tokenizer("a cat").shape
    (1, 77)
    """

    def __init__(self, backend: Backend, bos_id: int, eos_id: int, pad_id: int, max_length: int = CLIP_LENGTH):
        self._backend = backend
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.max_length = max_length
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self._words: dict[str, range] = {}
        self._pattern: re.Pattern[str] | None = None

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], vocab_size: int | None = None) -> Tokenizer:
        """Open a model's ``tokenizer`` folder: ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``.

        Parameters
        ----------
        folder
            The folder.
        vocab_size
            Size of the text encoder's vocabulary, to check that it has every id.

        Raises
        ------
        ModelError
            Files are missing or damaged, or there are more tokens than the text encoder knows.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder")
        config, whole = _read_settings(folder)
        try:
            special = {key: config.get(key) or default for key, default in SPECIAL_TOKENS.items()}
            model = _read_vocabulary(folder, whole, _content(special["unk_token"]))
            tokenizer = cls._of(model, _added_tokens(config, whole, special), special, config.get("model_max_length"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder}: its tokenizer files are damaged: {error!r:.200}") from None
        return tokenizer._checked(folder, vocab_size)

    @classmethod
    def clip(cls, pad_token: str, vocab_size: int | None = None) -> Tokenizer:
        """Set up CLIP's own tokenizer, from the vocabulary that comes with the package.

        SD 1.x pads with ``<|endoftext|>``, SD 2.x with ``!``; ``vocab_size`` is as for `from_folder`.

        Raises
        ------
        ModelError
            There are more tokens than the text encoder knows.
        """
        special = SPECIAL_TOKENS | {"pad_token": pad_token}
        merges = _clip_merges()
        model = _byte_pairs(vocabulary(merges), merges, special["unk_token"])
        tokenizer = cls._of(model, _added_tokens({}, {}, special), special, CLIP_LENGTH)
        return tokenizer._checked("CLIP's vocabulary", vocab_size)

    @classmethod
    def _of(cls, model: BPE, added: list[AddedToken], special: Mapping[str, Any], length: object) -> Tokenizer:
        backend = build_backend(model, added)
        vocab = backend.get_vocab()
        bos_id, eos_id, pad_id = (vocab[_content(special[key])] for key in ("bos_token", "eos_token", "pad_token"))
        # Some files say 1e30 for "no limit", but CLIP always has one.
        if not isinstance(length, int) or not 2 < length <= 4096:
            length = CLIP_LENGTH
        return cls(backend, bos_id, eos_id, pad_id, length)

    def _checked(self, source: object, vocab_size: int | None) -> Tokenizer:
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ModelError(f"{source}: has {self.vocab_size} tokens, but the text encoder knows {vocab_size}")
        return self

    @property
    def is_clip(self) -> bool:
        """Whether it is CLIP's own vocabulary."""
        return self._backend.get_vocab() == vocabulary(_clip_merges())

    def save(self, folder: Path) -> None:
        """Write CLIP's tokenizer as a ``tokenizer`` folder, with this one's padding."""
        write_tokenizer(folder, _clip_merges(), str(self._backend.id_to_token(self.pad_id)), self.max_length)

    def __call__(self, text: str | Sequence[str]) -> np.ndarray:
        """Return the token ids of one or more prompts.

        Returns
        -------
        numpy.ndarray
            int64 (n, 77). Tokens that do not fit are cut off; see ``truncated``.

        Raises
        ------
        InputError
            A prompt is not text.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows = np.full((len(texts), self.max_length), self.pad_id, np.int64)
        for row, item in zip(rows, texts, strict=True):
            ids = [self.bos_id, *self.encode(item)[: self.max_length - 2], self.eos_id]
            row[: len(ids)] = ids
        return rows

    def add_word(self, word: str, ids: range) -> None:
        """Make a word, in any case, stand for these ids (of a textual inversion embedding).

        Raises
        ------
        InputError
            The word is empty or already taken.
        """
        if not word.strip() or word.lower() in self._words:
            reason = "the name is taken" if word.strip() else "the name is empty"
            raise InputError(f"embedding {word!r:.80}: {reason}; rename the file")
        words = {**self._words, word.lower(): ids}
        self._words = dict(sorted(words.items(), key=lambda item: -len(item[0])))  # the longest match wins
        self._pattern = re.compile("|".join(f"({whole_word(word).pattern})" for word in self._words), re.IGNORECASE)

    @property
    def word_ids(self) -> tuple[range, ...]:
        """The ids of each word of `add_word`."""
        return tuple(self._words.values())

    def encode(self, text: str) -> list[int]:
        """Return all token ids of a text, without start, end, padding or limit."""
        return [token for token, _ in self._encode(text)]

    def truncated(self, text: str) -> str:
        """Return the part of a prompt that does not fit and is cut off; empty if all of it fits."""
        encoding = self._encode(text)
        if len(encoding) <= self.max_length - 2:
            return ""
        return text[encoding[self.max_length - 2][1] :]

    def _encode(self, text: str) -> list[tuple[int, int]]:
        """Return all token ids of a text, each with its start in the text."""
        if not isinstance(text, str):
            raise InputError(f"prompt: found {type(text).__name__}, expected text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError("prompt: not valid Unicode text") from None
        pairs: list[tuple[int, int]] = []
        start = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            pairs += self._encode_piece(text, start, match.start())
            ids = list(self._words.values())[(match.lastindex or 1) - 1]
            pairs += [(token, match.start()) for token in ids]
            start = match.end()
        return pairs + self._encode_piece(text, start, len(text))

    def _encode_piece(self, text: str, start: int, end: int) -> list[tuple[int, int]]:
        encoding = self._backend.encode(text[start:end], add_special_tokens=False)
        return [(token, start + offset) for token, (offset, _) in zip(encoding.ids, encoding.offsets, strict=True)]


def whole_word(word: str) -> re.Pattern[str]:
    """Return a pattern that finds a word in prompts, but not inside a longer word."""
    before, after = (r"\b" if re.match(r"\w", letter) else "" for letter in (word[0], word[-1]))
    return re.compile(before + re.escape(word) + after, re.IGNORECASE)


def _content(token: str | Mapping[str, Any]) -> str:
    """Return the text of a special token, which files store as text or as ``{"content": text, ...}``."""
    return token if isinstance(token, str) else str(token.get("content"))


def _added_token(token: str | Mapping[str, Any], special: bool = True) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=special)
    flags = {key: bool(token[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in token}
    return AddedToken(_content(token), special=bool(token.get("special", special)), **flags)


def _read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the merged settings of the two small files, and the content of ``tokenizer.json`` if it exists."""
    config, named, whole = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
    )
    # In newer models the first file lists the tokens with their flags, and the second adds nothing.
    return (config if "added_tokens_decoder" in config else config | named), whole


def _added_tokens(
    config: Mapping[str, Any], whole: Mapping[str, Any], special: Mapping[str, str | Mapping[str, Any]]
) -> list[AddedToken]:
    """Return the tokens that are matched before a text is split."""
    if "added_tokens_decoder" in config:
        listed = [token for _, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    else:
        listed = whole.get("added_tokens", [])
    added = [_added_token(token, special=False) for token in listed]
    known = {token.content for token in added}
    wanted = [*special.values(), *(config.get("extra_special_tokens") or config.get("additional_special_tokens") or [])]
    for index, token in enumerate(wanted):
        # A token given both as text and as a dict is registered twice, and the later flags win (in SD 1.5 those of
        # the pad token, which is matched before the text is lower-cased). transformers does the same.
        if _content(token) not in known and token not in wanted[:index]:
            added.append(_added_token(token))
    return added


def _read_vocabulary(folder: Path, whole: Mapping[str, Any], unknown: str) -> BPE:
    if whole:
        vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    else:
        files = folder / "vocab.json", folder / "merges.txt"
        for file in files:
            if not file.is_file():
                raise ModelError(f"{file}: no such file, and no tokenizer.json in its place")
        try:
            vocab, merges = BPE.read_file(*map(str, files))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{folder}: vocab.json or merges.txt is damaged: {error}") from None
    try:
        return _byte_pairs(vocab, merges, unknown)
    except Exception as error:
        raise ModelError(f"{folder}: vocabulary and merges do not belong together: {error}") from None


def _byte_pairs(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> BPE:
    return BPE(
        vocab, merges, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False
    )


def _clip_merges() -> list[tuple[str, str]]:
    text = gzip.decompress(packaged("models", "clip", "merges.txt.gz").read_bytes()).decode("utf-8")
    return [(left, right) for left, right in map(str.split, text.splitlines())]


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return the tokens of a CLIP tokenizer with their ids.

    They are a letter for each byte, the same letters with ``</w>``, the results of the merges, and two special tokens.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def write_tokenizer(folder: Path, merges: Sequence[tuple[str, str]], pad_token: str, max_length: int) -> None:
    """Write a CLIP tokenizer as a ``tokenizer`` folder."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {**SPECIAL_TOKENS, "pad_token": pad_token}
    settings = {"model_max_length": max_length, "tokenizer_class": "CLIPTokenizer"}
    settings |= {"do_lower_case": True, "add_prefix_space": False}
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", special | settings)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def build_backend(model: BPE, added: Sequence[AddedToken] = ()) -> Backend:
    """Build the pipeline from text to tokens: CLIP's normalisation and splitting into words, around a model."""
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_tokens(list(added))
    return backend
