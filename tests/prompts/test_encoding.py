"""Prompts of any length, with emphasis, as vectors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_numba import StableDiffusionPipeline
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.errors import InputError
from sd_numba.networks.clip import TextEncoder, TextEncoderConfig
from sd_numba.prompts.encoding import encode_prompts, tokenize_prompt
from sd_numba.prompts.tokenizer import Tokenizer
from tests.golden.cases import CASES, TOKENIZERS
from tests.golden.compare import weights_of

COMMA_BACKTRACK = 20  # tokens, as in AUTOMATIC1111's stable-diffusion-webui


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pretrained()


@pytest.fixture(scope="module")
def tokenizer(pipe):
    return pipe.tokenizer


def content(tokenizer, chunks):
    """The tokens of each chunk, without start, end and padding."""
    found = []
    for row in chunks.ids:
        assert row[0] == tokenizer.bos_id and len(row) == tokenizer.max_length
        end = 1 + list(row[1:]).index(tokenizer.eos_id)
        assert (row[end + 1 :] == tokenizer.pad_id).all()
        found.append(list(row[1:end]))
    return found


def test_a_short_prompt_is_what_the_tokenizer_makes_of_it(tokenizer):
    chunks = tokenize_prompt(tokenizer, "a red fox, in the snow!")
    np.testing.assert_array_equal(chunks.ids, tokenizer("a red fox, in the snow!"))
    assert (chunks.weights == 1).all() and chunks.weights.shape == (1, 77)
    np.testing.assert_array_equal(tokenize_prompt(tokenizer, "").ids, tokenizer(""))


def test_weights_stand_at_their_tokens(tokenizer):
    chunks = tokenize_prompt(tokenizer, "a (red:1.5) [fox]")
    a, red, fox = (tokenizer.encode(word) for word in ("a", "red", "fox"))
    assert content(tokenizer, chunks) == [[*a, *red, *fox]]
    wanted = [1.0, *[1.0] * len(a), *[1.5] * len(red), *[1 / 1.1] * len(fox)]
    np.testing.assert_allclose(chunks.weights[0, : len(wanted)], wanted)
    assert (chunks.weights[0, len(wanted) :] == 1).all()


def test_long_prompts_fill_chunks_of_75(tokenizer):
    text = "fox " * 200
    chunks = content(tokenizer, tokenize_prompt(tokenizer, text))
    assert [len(chunk) for chunk in chunks] == [75, 75, 50]
    assert [token for chunk in chunks for token in chunk] == tokenizer.encode(text)


def test_a_chunk_ends_after_a_comma_near_its_end(tokenizer):
    (fox,), (comma,) = tokenizer.encode("fox"), tokenizer.encode(",")
    for tail in (1, COMMA_BACKTRACK - 1, COMMA_BACKTRACK, COMMA_BACKTRACK + 30):
        first = 75 - 1 - tail
        text = "fox " * first + ", " + "fox " * (tail + 5)
        found = content(tokenizer, tokenize_prompt(tokenizer, text))
        if tail < COMMA_BACKTRACK:
            assert found == [[fox] * first + [comma], [fox] * (tail + 5)]
        else:
            assert found == [[fox] * first + [comma] + [fox] * tail, [fox] * 5]
    # A comma that does not fit takes nothing with it.
    text = "fox " * 65 + ", " + "fox " * 9 + ", fox"
    assert content(tokenizer, tokenize_prompt(tokenizer, text)) == [[fox] * 65 + [comma] + [fox] * 9, [comma, fox]]


def test_break_begins_a_chunk(tokenizer):
    (fox,), (hen,) = tokenizer.encode("fox"), tokenizer.encode("hen")
    assert content(tokenizer, tokenize_prompt(tokenizer, "fox BREAK hen")) == [[fox], [hen]]
    assert content(tokenizer, tokenize_prompt(tokenizer, "fox BREAK BREAK hen")) == [[fox], [], [hen]]
    assert content(tokenizer, tokenize_prompt(tokenizer, "fox BREAK")) == [[fox]]
    word = tokenizer.encode("BREAK")
    chunks = tokenize_prompt(tokenizer, "(BREAK)")
    assert content(tokenizer, chunks) == [word]
    np.testing.assert_allclose(chunks.weights[0, 1 : 1 + len(word)], -1.1)


def test_a_word_of_several_vectors_is_not_split():
    pipe = StableDiffusionPipeline.open()
    pipe.tokenizer.add_word("zzword", range(50_000, 50_010))
    (fox,) = pipe.tokenizer.encode("fox")
    found = content(pipe.tokenizer, tokenize_prompt(pipe.tokenizer, "fox " * 70 + "zzword fox"))
    assert found == [[fox] * 70, [*range(50_000, 50_010), fox]]
    pipe.tokenizer.add_word("zzlong", range(51_000, 51_100))
    found = content(pipe.tokenizer, tokenize_prompt(pipe.tokenizer, "fox zzlong"))
    assert [token for chunk in found for token in chunk] == [fox, *range(51_000, 51_100)]
    assert max(map(len, found)) <= 75


WORD = range(60_000, 60_010)  # of textual inversion
PIECES = {  # text -> words, of one token each but WORD, and their weight
    "fox ": ("fox", 1.0),
    ", ": (",", 1.0),
    "zzword ": ("zzword", 1.0),
    "(hen:1.3) ": ("hen", 1.3),
    "(zzword:0.5) ": ("zzword", 0.5),
    "[,] ": (",", 1 / 1.1),
    " BREAK ": None,
}
runs = st.lists(st.tuples(st.sampled_from([*PIECES]), st.sampled_from([1, 1, 2, 19, 20, 21, 40, 73, 75])), max_size=8)


def chunks_twin(units, room):
    """Distribute words over chunks: fill one, look back for a comma, go on with what is left."""
    found = []
    while sum(len(ids) for ids, *_ in units) > room:
        count = next(n for n in range(len(units)) if sum(len(ids) for ids, *_ in units[: n + 1]) > room)
        flat = [is_comma for ids, _, is_comma in units[:count] for _ in ids]
        if len(flat) == room and not units[count][2] and any(flat[-COMMA_BACKTRACK:]):
            count = max(n for n in range(count) if units[n][2]) + 1
        found.append(units[:count])
        units = units[count:]
    return [*found, units]


@pytest.fixture(scope="module", params=["one token ends and pads", "SD 2's pads"])
def with_a_word(request):
    tokenizer = Tokenizer.from_folder(embedded_model_path() / "tokenizer")
    if request.param != "one token ends and pads":
        tokenizer = Tokenizer.clip("!")
        assert tokenizer.pad_id != tokenizer.eos_id
    tokenizer.add_word("zzword", WORD)
    return tokenizer


@settings(max_examples=150, deadline=None)
@given(runs=runs)
def test_chunks_as_their_twin(with_a_word, runs):
    sections = [[]]
    for piece, times in runs:
        for _ in range(times if piece != " BREAK " else 1):
            if PIECES[piece] is None:
                sections.append([])
            else:
                word, weight = PIECES[piece]
                sections[-1].append((with_a_word.encode(word), weight, word == ","))
    wanted = [chunk for section in sections for chunk in chunks_twin(section, 75)]
    if len(wanted) > 1 and not wanted[-1]:
        wanted.pop()  # nothing follows the last BREAK
    text = "".join(piece * (times if piece != " BREAK " else 1) for piece, times in runs)
    chunks = tokenize_prompt(with_a_word, text)
    assert content(with_a_word, chunks) == [[token for ids, *_ in chunk for token in ids] for chunk in wanted]
    for row, chunk in zip(chunks.weights, wanted, strict=True):
        weights = [1.0, *(weight for ids, weight, _ in chunk for _ in ids)]
        np.testing.assert_array_equal(row, np.float32(weights + [1.0] * (77 - len(weights))))


def test_weights_without_end_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"prompt: found weight 1e\+07 of 'fox', expected at most 1,000,000"):
        tokenize_prompt(tokenizer, "(fox:10000000)")
    with pytest.raises(InputError, match="found weight"):
        tokenize_prompt(tokenizer, "((((fox:999):999):999):999)")


# ---- vectors


def encoded(pipe, *texts, **options):
    return encode_prompts(pipe.tokenizer, pipe.text_encoder, texts, **options)


def test_vectors_without_emphasis_are_those_of_the_text_encoder(pipe):
    found = encoded(pipe, "a red fox", "")
    for text in ("a red fox", ""):
        np.testing.assert_array_equal(found[text], pipe.text_encoder(pipe.tokenizer(text))[0])
        np.testing.assert_array_equal(encoded(pipe, text, syntax="plain")[text], found[text])


@pytest.fixture(scope="module", params=["embedded", "sd2"])
def networks(request, pipe, tmp_path_factory):
    if request.param == "embedded":
        return pipe.tokenizer, pipe.text_encoder
    case = next(case for case in CASES if case.name == request.param)
    weights = weights_of(case, "text_encoder")
    folder = TOKENIZERS["sd2"].write(tmp_path_factory.mktemp("sd2"))
    return Tokenizer.from_folder(folder), TextEncoder(weights, TextEncoderConfig.from_dict(case.text_encoder))


@pytest.mark.parametrize("text", ["a (red:1.4) [fox], BREAK (snow:0)", "a " * 60 + "(b:1.2), [c] " * 8])
@pytest.mark.parametrize("skip", [0, 1])
def test_emphasis_multiplies_and_keeps_the_mean(networks, text, skip):
    tokenizer, text_encoder = networks
    found = encode_prompts(tokenizer, text_encoder, [text], clip_skip=skip)[text]
    chunks = tokenize_prompt(tokenizer, text)
    assert found.shape == (154, text_encoder.config.hidden_size) and found.dtype == np.float32
    for part, row, weights in zip(np.split(found, 2), chunks.ids, chunks.weights, strict=True):
        vectors = text_encoder(row[None], skip=skip)[0].astype(np.float64)
        wanted = vectors * weights[:, None]
        wanted *= vectors.mean() / wanted.mean()
        np.testing.assert_allclose(part, wanted, rtol=1e-5, atol=1e-6)
        assert part.mean() == pytest.approx(vectors.mean(), rel=1e-3)


def test_vectors_without_a_mean_to_restore(pipe):
    def nothing(ids, *, skip):
        return np.zeros((*ids.shape, 3), np.float32)

    (found,) = encode_prompts(pipe.tokenizer, nothing, ["a (fox:1.5)"]).values()
    np.testing.assert_array_equal(found, np.zeros((77, 3), np.float32))


def test_a_prompts_vectors_do_not_depend_on_the_others(pipe):
    texts = ["a fox", "a (red:1.3) hen " * 40, "", "snow BREAK snow", *(f"{n} apples" for n in range(12))]
    together = encoded(pipe, *texts)
    for text in texts:
        np.testing.assert_array_equal(encoded(pipe, text)[text], together[text])


def test_plain_prompts_are_cut_and_their_brackets_are_text(pipe):
    long, brackets = "fox " * 200, "a (red:1.3) fox"
    found = encoded(pipe, long, brackets, syntax="plain")
    assert found[long].shape[0] == 77
    np.testing.assert_array_equal(found[brackets], pipe.text_encoder(pipe.tokenizer(brackets))[0])
    assert np.abs(found[brackets] - encoded(pipe, brackets)[brackets]).max() > 0.1


def test_layers_that_are_skipped(pipe):
    ids = pipe.tokenizer("a fox")
    np.testing.assert_array_equal(encoded(pipe, "a fox", clip_skip=1)["a fox"], pipe.text_encoder(ids, skip=1)[0])
    layers = pipe.text_encoder.config.num_hidden_layers
    with pytest.raises(InputError, match=f"clip skip: found {layers}, expected 0 to {layers - 1}"):
        encoded(pipe, "a fox", clip_skip=layers)
    with pytest.raises(InputError, match="prompt syntax: found 'b', expected a1111 or plain"):
        encoded(pipe, "a fox", syntax="b")


# ---- in the pipeline

FEW = {"num_inference_steps": 4, "seed": 1, "output_type": "latent", "width": 64, "height": 64, "guidance_scale": 3}


def test_negative_prompts_of_another_length(pipe):
    long = "blurry, " * 60
    found = pipe("a fox", negative_prompt=long, prompt_syntax="a1111", **FEW).images
    short = pipe("a fox", negative_prompt="blurry", prompt_syntax="a1111", **FEW).images
    assert np.isfinite(found).all() and not np.array_equal(found, short)
    unguided = {**FEW, "guidance_scale": 1}
    np.testing.assert_array_equal(
        pipe("a fox", negative_prompt=long, prompt_syntax="a1111", **unguided).images, pipe("a fox", **unguided).images
    )


def test_texts_that_change(pipe):
    """Until the change the latents are those of the first text, and after it they are not."""
    changing = list(pipe.generate("a [fox:car:2]", prompt_syntax="a1111", **without(FEW)))
    first = list(pipe.generate("a fox", prompt_syntax="a1111", **without(FEW)))
    for step in range(2):
        np.testing.assert_array_equal(changing[step].latents, first[step].latents)
    assert not np.array_equal(changing[2].latents, first[2].latents)


def without(options):
    return {name: value for name, value in options.items() if name != "output_type"}


def test_pictures_of_a_batch_with_prompts_of_several_lengths(pipe):
    prompts = ["a fox", "a fox in the snow, " * 20, "a [fox|hen]"]
    together = pipe(prompts, negative_prompt="blurry " * 100, prompt_syntax="a1111", **FEW).images
    for number, prompt in enumerate(prompts):
        alone = {**FEW, "seed": 1 + number}
        found = pipe(prompt, negative_prompt="blurry " * 100, prompt_syntax="a1111", **alone).images
        np.testing.assert_array_equal(found, together[number : number + 1])
