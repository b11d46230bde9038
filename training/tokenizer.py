"""Train the byte-pair encoding on captions: ``python -m training.tokenizer [--out training/data/tokenizer]``.

Method: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", arXiv:1508.07909.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from sd_numba.prompts.tokenizer import CLIP_LENGTH, SPECIAL_TOKENS, build_backend, vocabulary, write_tokenizer

from .art import Art, Concept
from .options import add_inputs
from .world import World

VOCABULARY = 2560
NAMED = 12
DAMPING = 0.6  # of the counts of words, so that rare nouns get tokens of their own


def captions(concepts: tuple[Concept, ...], count: int, seed: int) -> Iterator[str]:
    """Yield captions, then every name and keyword a dozen times."""
    world = World(concepts, random.Random(seed))
    yield from (world.compose().caption for _ in range(count))
    for concept in concepts * NAMED:
        yield from (*(name.text for name in concept.names), *concept.synonyms, *concept.keywords)


def train_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Return the merges of a tokenizer with `VOCABULARY` tokens."""
    backend = build_backend(BPE(end_of_word_suffix="</w>"))
    counts = Counter(
        text[start:end]
        for text in map(backend.normalizer.normalize_str, texts)
        for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)
    )
    damped = chain.from_iterable([word] * round(count**DAMPING) for word, count in sorted(counts.items()))
    alphabet = list(islice(vocabulary([]), 256))
    size = len(vocabulary([]))
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(damped, trainer)
    merges = [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]
    return merges[: VOCABULARY - size]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train the tokenizer.")
    add_inputs(parser, "--art")
    parser.add_argument("--count", type=int, default=120_000, help="captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("training/data/tokenizer"))
    arguments = parser.parse_args()
    art = Art.load(arguments.art)
    merges = train_merges(captions(art.concepts, arguments.count, arguments.seed))
    shutil.rmtree(arguments.out, ignore_errors=True)
    write_tokenizer(arguments.out, merges, SPECIAL_TOKENS["pad_token"], CLIP_LENGTH)
    print(f"{arguments.out}: {len(vocabulary(merges))} tokens, {len(merges)} merges")


if __name__ == "__main__":
    main()
