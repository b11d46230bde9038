"""Token ids against transformers' CLIPTokenizer, for prompts that break simpler tokenizers."""

import numpy as np
import pytest

from sd_numba.prompts.tokenizer import Tokenizer
from tests.golden.cases import GOLDEN, PROMPTS, TOKENIZERS
from tests.golden.compare import golden


@pytest.fixture(scope="module", params=TOKENIZERS)
def named_tokenizer(request, tmp_path_factory):
    folder = TOKENIZERS[request.param].write(tmp_path_factory.mktemp("tokenizer"))
    return request.param, Tokenizer.from_folder(folder)


def test_ids_are_equal(named_tokenizer):
    name, tokenizer = named_tokenizer
    expected = golden(GOLDEN / "tokenizer.npz")[name].astype(np.int64)
    wrong = [
        f"{prompt!r:.60}: {[int(i) for i in found if i != tokenizer.pad_id]}, "
        f"expected {[int(i) for i in row if i != tokenizer.pad_id]}"
        for prompt, row in zip(PROMPTS, expected, strict=True)
        for found in tokenizer(prompt)
        if not np.array_equal(found, row)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_batch_is_its_prompts(named_tokenizer):
    name, tokenizer = named_tokenizer
    ids = tokenizer(list(PROMPTS))
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, golden(GOLDEN / "tokenizer.npz")[name])
