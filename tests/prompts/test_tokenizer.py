"""The tokenizer on the embedded model's vocabulary; ids compared with transformers are in test_tokenizer_golden.py."""

import json
import shutil

import numpy as np
import pytest

from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.errors import InputError, ModelError
from sd_numba.prompts.tokenizer import Tokenizer

FOLDER = embedded_model_path() / "tokenizer"
START, END = 2558, 2559


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "tokenizer")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_rows(tokenizer):
    vocab = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    ids = tokenizer("a cat")
    assert ids.shape == (1, 77) and ids.dtype == np.int64
    assert ids[0, :4].tolist() == [START, vocab["a</w>"], vocab["cat</w>"], END]
    assert (ids[0, 4:] == tokenizer.pad_id).all() and tokenizer.pad_id == END
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.max_length) == (START, END, 77)
    assert tokenizer.vocab_size == len(vocab) == 2560


def test_several_prompts(tokenizer):
    texts = ["a cat", "", "two red dogs"]
    np.testing.assert_array_equal(tokenizer(texts), np.concatenate([tokenizer(text) for text in texts]))
    assert tokenizer([]).shape == (0, 77)


def test_an_empty_prompt(tokenizer):
    for text in ("", "  \n\t "):
        assert tokenizer(text)[0].tolist() == [START] + [END] * 76


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A Red CAT", "a red cat"),
        ("a\n\tred   cat ", "a red cat"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "café"),
        ("a,cat", "a , cat"),
        ("12", "1 2"),
        ("it's", "it 's"),
    ],
)
def test_normalisation(tokenizer, text, same):
    np.testing.assert_array_equal(tokenizer(text), tokenizer(same))


@pytest.mark.parametrize("text", ["你好，世界", "🐱 👨\u200d👩\u200d👧", "\x00\x01\ufffd\ue000", "İß½ǅ"])
def test_any_unicode_has_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) >= 2 and max(ids) < tokenizer.vocab_size


def test_what_does_not_fit_is_cut_and_told(tokenizer):
    fitting = " ".join(["cat"] * 75)
    assert tokenizer.truncated(fitting) == "" and tokenizer.truncated("") == ""
    assert tokenizer(fitting)[0, 75:].tolist() == [tokenizer.encode("cat")[0], END]
    long = f"{fitting} a Big 🐱!"
    assert tokenizer.truncated(long) == "a Big 🐱!"
    np.testing.assert_array_equal(tokenizer(long), tokenizer(fitting))
    words = " ".join(f"word{index}" for index in range(500))
    cut = tokenizer.truncated(words)
    assert words.endswith(cut) and 400 < len(cut.split()) < 500


def test_words_with_ids_of_their_own(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.word_ids == ()
    tokenizer.add_word("zz", range(2560, 2563))
    tokenizer.add_word("zzword", range(2563, 2573))
    assert sorted(tokenizer.word_ids, key=lambda ids: ids.start) == [range(2560, 2563), range(2563, 2573)]
    cats = " ".join(["cat"] * 73)
    assert tokenizer.encode("a ZZ") == [*tokenizer.encode("a"), 2560, 2561, 2562]
    assert tokenizer.truncated(f"{cats} zz, a dog") == "zz, a dog"  # a word that is cut is told whole


def test_special_tokens_in_a_prompt(tokenizer):
    assert tokenizer.encode("<|startoftext|>cat<|endoftext|>") == [START, *tokenizer.encode("cat"), END]


@pytest.mark.parametrize("bad", [3, None, b"cat", ["cat", 3], "\udcff"])
def test_other_things_than_text(tokenizer, bad):
    with pytest.raises((InputError, TypeError)):
        tokenizer(bad)
    with pytest.raises(InputError):
        tokenizer([bad])


def test_the_pad_token_of_stable_diffusion_2(folder):
    edit(folder / "special_tokens_map.json", pad_token="!")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.pad_id == 0
    assert tokenizer("a")[0, 2:].tolist() == [END] + [0] * 74
    # As a special token it is no longer joined with its neighbours.
    assert tokenizer.encode("cat!!") == [*tokenizer.encode("cat"), 0, 0]


def test_special_tokens_as_records(folder):
    token = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    edit(folder / "special_tokens_map.json", eos_token=token, unk_token=token, pad_token=token)
    assert Tokenizer.from_folder(folder)("cat")[0, -1] == END


@pytest.mark.parametrize(("length", "expected"), [(16, 16), (1e30, 77), (10**30, 77), (None, 77), (-1, 77)])
def test_model_max_length(folder, length, expected):
    edit(folder / "tokenizer_config.json", model_max_length=length)
    assert Tokenizer.from_folder(folder)("cat").shape == (1, expected)


def test_the_two_settings_files_may_be_missing(folder, tokenizer):
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    np.testing.assert_array_equal(Tokenizer.from_folder(folder)("a cat!"), tokenizer("a cat!"))


@pytest.mark.parametrize("pairs", [True, False])
def test_tokenizer_json_alone(folder, tokenizer, pairs):
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    model = {
        "vocab": json.loads((folder / "vocab.json").read_text(encoding="utf-8")),
        "merges": [line.split(" ") if pairs else line for line in merges if line],
    }
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    text = "Two big dogs, a CAT and 🐱 café on a beach"
    np.testing.assert_array_equal(Tokenizer.from_folder(folder)(text), tokenizer(text))


def break_vocab(folder):
    (folder / "vocab.json").write_text('{"a": "b"}')


def break_merges(folder):
    (folder / "merges.txt").write_text("#version: 0.2\nx y z\n")


def foreign_merges(folder):
    (folder / "merges.txt").write_text("#version: 0.2\nfoo bar\n")


def no_vocab(folder):
    (folder / "vocab.json").unlink()


def bad_config(folder):
    (folder / "tokenizer_config.json").write_text("[]")


def bad_added(folder):
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"x": 3})


def bad_whole(folder):
    (folder / "tokenizer.json").write_text('{"model": 3}')


def unknown_pad(folder):
    edit(folder / "special_tokens_map.json", pad_token=["nonsense"])


def new_pad(folder):
    edit(folder / "special_tokens_map.json", pad_token="<|pad|>")


def no_folder(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "damage",
    [
        break_vocab,
        break_merges,
        foreign_merges,
        no_vocab,
        bad_config,
        bad_added,
        bad_whole,
        unknown_pad,
        new_pad,
        no_folder,
    ],
)
def test_damaged_files_are_one_clear_error(folder, damage):
    damage(folder)
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_folder(folder, vocab_size=2560)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
