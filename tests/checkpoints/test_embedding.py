"""Textual inversion: words in prompts that stand for learned vectors."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from sd_numba import StableDiffusionPipeline
from sd_numba.checkpoints.embedding import find_embeddings, read_embedding
from sd_numba.errors import InputError, ModelError

WIDTH = 192


@pytest.fixture
def pipe():
    return StableDiffusionPipeline.from_pretrained(weights="mmap")


@pytest.fixture
def vectors():
    return np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)


def saved(path, vectors, name="emb_params"):
    save_file({name: vectors}, path)
    return path


def test_a_word_is_its_vectors(pipe, vectors, tmp_path):
    before = pipe.text_encoder(pipe.tokenizer("a red cat"))
    pipe.load_textual_inversion(saved(tmp_path / "Moody-style.safetensors", vectors))
    ids = pipe.tokenizer.encode("a cat, moody-STYLE!")
    cat = pipe.tokenizer.encode("a cat,")
    assert ids == [*cat, 2560, 2561, 2562, *pipe.tokenizer.encode("!")]
    np.testing.assert_array_equal(pipe.text_encoder.token_embedding(np.array(ids))[len(cat) : -1], vectors)
    np.testing.assert_array_equal(pipe.text_encoder(pipe.tokenizer("a red cat")), before)
    assert pipe.tokenizer.vocab_size == 2560


def test_vectors_of_a_token_are_that_token(pipe, tmp_path):
    """So a prompt with the word gives the same as one with the token itself."""
    (cat,) = pipe.tokenizer.encode("cat")
    row = pipe.text_encoder.token_embedding(np.array([cat]))
    pipe.load_textual_inversion(saved(tmp_path / "zz9.safetensors", row))
    a, b = (pipe.text_encoder(pipe.tokenizer(prompt)) for prompt in ("a cat in snow", "a zz9 in snow"))
    np.testing.assert_array_equal(a, b)
    a, b = (
        pipe(p, seed=1, num_inference_steps=2, width=64, height=64, output_type="latent").images
        for p in ("a cat in snow", "a zz9 in snow")
    )
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (4, WIDTH)])
def test_layouts_and_dtypes(pipe, tmp_path, dtype, shape):
    x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    path = saved(tmp_path / "w.safetensors", x, "<cat-toy>")
    np.testing.assert_array_equal(read_embedding(path, WIDTH), x.reshape(-1, WIDTH).astype(np.float32))
    pipe.load_textual_inversion(path, token="<cat-toy>")
    assert len(pipe.tokenizer.encode("a <cat-toy>")) == 1 + x.size // WIDTH


def test_several_and_packed(pipe, vectors, tmp_path):
    for i in range(3):
        pipe.load_textual_inversion(saved(tmp_path / f"word{i}.safetensors", vectors[i : i + 1]))
    ids = pipe.tokenizer("word2 word0 word1")
    pipe.prepare("packed")
    np.testing.assert_array_equal(pipe.text_encoder.token_embedding(ids[0, 1:4]), vectors[[2, 0, 1]])


def test_a_long_embedding_is_cut_with_the_prompt(pipe, vectors, tmp_path):
    pipe.load_textual_inversion(saved(tmp_path / "w.safetensors", np.tile(vectors, (10, 1))))
    prompt = "a w, " * 4
    assert pipe.tokenizer.truncated(prompt).startswith("w, a w")
    assert pipe.text_encoder(pipe.tokenizer(prompt)).shape == (1, 77, WIDTH)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"emb_params": np.ones((2, 768), np.float32)}, "vectors of 768 values, the model's text encoder has 192"),
        ({"clip_l": np.ones((2, 768), np.float32), "clip_g": np.ones((2, 1280), np.float32)}, "found 2 tensors"),
        ({"emb_params": np.ones((2, WIDTH), np.int64)}, "found I64"),
        ({"emb_params": np.full((2, WIDTH), np.nan, np.float32)}, "NaN"),
        ({"emb_params": np.ones((76, WIDTH), np.float32)}, "found 76 vectors"),
        ({"emb_params": np.ones((2, 0), np.float32)}, "expected vectors"),
    ],
)
def test_files_that_do_not_fit(pipe, tmp_path, tensors, expected):
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=expected):
        pipe.load_textual_inversion(tmp_path / "w.safetensors")
    assert len(pipe.text_encoder.token_embedding) == 2560


def test_only_whole_words_count(pipe, vectors, tmp_path):
    for word in ("cat", "cat 2"):  # a token of the vocabulary, too, and one that starts alike
        pipe.load_textual_inversion(saved(tmp_path / "x.safetensors", vectors[:1]), token=word)
    cats, dog = pipe.tokenizer.encode("concat cats"), pipe.tokenizer.encode("dog")
    assert pipe.tokenizer.encode("concat cats cat dog cat 2") == [*cats, 2560, *dog, 2561]
    assert pipe.tokenizer.encode("cat,cat") == [2560, *pipe.tokenizer.encode(","), 2560]


def test_words_that_are_taken(pipe, vectors, tmp_path):
    path = saved(tmp_path / "w.safetensors", vectors)
    pipe.load_textual_inversion(path)
    for word, reason in (("W", "the name is taken"), ("", "the name is empty")):
        with pytest.raises(InputError, match=f"{reason}; rename the file"):
            pipe.load_textual_inversion(path, token=word)
    assert len(pipe.text_encoder.token_embedding) == 2563


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_embeddings(tmp_path / "none")
