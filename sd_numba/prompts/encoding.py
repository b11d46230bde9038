"""Prompts of any length and with emphasis: text -> chunks of tokens with weights -> vectors.

Method: AUTOMATIC1111's stable-diffusion-webui 1.10 (``modules/sd_hijack_clip.py``, and the emphasis "Original" of
``modules/sd_emphasis.py``). `prompt_syntax` says what can be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..networks.clip import TextEncoder
from .syntax import BREAK, expand_variants, parse_attention, prompt_schedule, require_text
from .tokenizer import Tokenizer

__all__ = [
    "SYNTAXES",
    "Chunks",
    "encode_prompts",
    "expand_variants",
    "parse_attention",
    "prompt_schedule",
    "tokenize_prompt",
]

SYNTAXES = ("a1111", "plain")
TEXTS = 8  # chunks that go through the text encoder together
COMMA_BACKTRACK = 20  # tokens after a comma that move to the next chunk with what follows
MAX_WEIGHT = 1e6  # far beyond what makes pictures, far within what float32 holds


@dataclass(frozen=True)
class Chunks:
    """A prompt as the text encoder takes it: k rows of as many ids as it takes at once, 77 for CLIP.

    Attributes
    ----------
    ids : int64 array ``(k, t)``
        Start, tokens, end and padding.
    weights : float32 array ``(k, t)``
        How strong each token is; 1 for start, end and padding.
    """

    ids: np.ndarray
    weights: np.ndarray


class _Filler:
    """Distributes tokens over chunks."""

    def __init__(self, room: int, comma: int | None) -> None:
        self.room, self.comma = room, comma
        self.chunks: list[list[tuple[int, float]]] = []
        self.tokens: list[tuple[int, float]] = []
        self.last_comma = -1

    def next_chunk(self) -> None:
        self.chunks.append(self.tokens)
        self.tokens, self.last_comma = [], -1

    def add(self, unit: Sequence[int], weight: float) -> None:
        """Add tokens that belong together, at most as many as there is room for."""
        if unit[0] == self.comma:
            self.last_comma = len(self.tokens)
        elif len(self.tokens) == self.room and self.last_comma >= 0 and self.room - self.last_comma <= COMMA_BACKTRACK:
            moved = self.tokens[self.last_comma + 1 :]
            del self.tokens[self.last_comma + 1 :]
            self.next_chunk()
            self.tokens = moved
        if len(self.tokens) + len(unit) > self.room:
            self.next_chunk()
        self.tokens += [(token, weight) for token in unit]


def tokenize_prompt(tokenizer: Tokenizer, text: str) -> Chunks:
    """Tokenise a prompt with emphasis, of any length.

    Every piece of `parse_attention` is tokenised by itself. A chunk that is full ends after its last comma if that is
    among its last 20 tokens, and anywhere else otherwise; a word of several vectors (textual inversion) is not split
    unless it is longer than a chunk. ``BREAK`` ends a chunk, too, even an empty one.

    Raises
    ------
    InputError
        The text is not valid, or its brackets make a weight larger than a million.
    """
    room = tokenizer.max_length - 2
    comma = tokenizer.encode(",")
    words = {ids.start: len(ids) for ids in tokenizer.word_ids}
    filler = _Filler(room, comma[0] if len(comma) == 1 else None)
    for piece, weight in parse_attention(text):
        if (piece, weight) == BREAK:
            filler.next_chunk()
            continue
        if not abs(weight) <= MAX_WEIGHT:
            raise InputError(f"prompt: found weight {weight:g} of {piece!r:.40}, expected at most {MAX_WEIGHT:,.0f}")
        ids, position = tokenizer.encode(piece), 0
        while position < len(ids):
            size = min(words.get(ids[position], 1), room)
            filler.add(ids[position : position + size], weight)
            position += size
    if filler.tokens or not filler.chunks:
        filler.next_chunk()
    shape = len(filler.chunks), tokenizer.max_length
    chunks = Chunks(np.full(shape, tokenizer.pad_id, np.int64), np.ones(shape, np.float32))
    for row, weights, tokens in zip(chunks.ids, chunks.weights, filler.chunks, strict=True):
        row[: len(tokens) + 2] = [tokenizer.bos_id, *(token for token, _ in tokens), tokenizer.eos_id]
        weights[1 : len(tokens) + 1] = [weight for _, weight in tokens]
    return chunks


def encode_prompts(
    tokenizer: Tokenizer,
    text_encoder: TextEncoder,
    texts: Iterable[str],
    *,
    syntax: str = "a1111",
    clip_skip: int = 0,
) -> dict[str, np.ndarray]:
    """Encode prompts; what one becomes does not depend on the others.

    Parameters
    ----------
    tokenizer, text_encoder
        The model's.
    texts
        The prompts, without variants and editing.
    syntax
        ``"a1111"``: emphasis and any length, as `tokenize_prompt` does it. ``"plain"``: all is text, and what the text
        encoder does not take at once is cut, as in diffusers.
    clip_skip
        Layers of the text encoder that are left out.

    Returns
    -------
    dict of float32 arrays ``(t, d)``
        By text; ``t`` is 77 for every chunk.

    Raises
    ------
    InputError
        The syntax is unknown, a text is not valid, or the encoder has too few layers.
    """
    if syntax not in SYNTAXES:
        raise InputError(f"prompt syntax: found {syntax!r:.40}, expected {' or '.join(SYNTAXES)}")
    prompts = {}
    for text in texts:
        if syntax == "plain":
            ids = tokenizer(require_text(text))
            prompts[text] = Chunks(ids, np.ones(ids.shape, np.float32))
        else:
            prompts[text] = tokenize_prompt(tokenizer, text)
    rows = {row.tobytes(): row for chunks in prompts.values() for row in chunks.ids}
    keys = list(rows)
    vectors: dict[bytes, np.ndarray] = {}
    for first in range(0, len(keys), TEXTS):
        some = keys[first : first + TEXTS]
        vectors.update(zip(some, text_encoder(np.stack([rows[key] for key in some]), skip=clip_skip), strict=True))
    return {
        text: np.concatenate(
            [_emphasise(vectors[row.tobytes()], w) for row, w in zip(chunks.ids, chunks.weights, strict=True)]
        )
        for text, chunks in prompts.items()
    }


def _emphasise(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiply vectors ``(t, d)`` by their weights ``(t,)``, and restore the mean of all values."""
    if (weights == 1).all():
        return vectors
    weighted: np.ndarray = vectors * weights[:, None]
    before, after = vectors.mean(dtype=np.float64), weighted.mean(dtype=np.float64)
    weighted = weighted * np.float32(before / after if after else 1)
    return weighted
