"""Pictures and masks as arrays, at the sizes that a model takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_numba.errors import InputError
from sd_numba.pictures.arrays import (
    OVERLAP,
    SOFT_EDGE,
    as_masks,
    as_pictures,
    cover,
    expand,
    fit_size,
    latent_masks,
    paste_back,
    resize_masks,
    resize_pictures,
)

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (5, 7, 3), np.uint8)


def picture(width, height):
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), np.uint8))


def test_pictures_in_every_form(tmp_path):
    wanted = BYTES[None].astype(np.float32) / 255
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    forms = [
        BYTES, BYTES[None], wanted[0], wanted, wanted.astype(np.float64), Image.fromarray(BYTES), tmp_path / "a.png",
        str(tmp_path / "a.png"), [BYTES], [Image.fromarray(BYTES)], (tmp_path / "a.png",),
    ]  # fmt: skip
    for form in forms:
        found = as_pictures(form, "image")
        assert found.dtype == np.float32 and found.shape == (1, 5, 7, 3)
        np.testing.assert_allclose(found, wanted, atol=1e-7)
    mixed = as_pictures([BYTES, Image.fromarray(BYTES), str(tmp_path / "a.png")], "image")
    np.testing.assert_allclose(mixed, np.repeat(wanted, 3, axis=0), atol=1e-7)


def test_masks_in_every_form(tmp_path):
    bits = RANDOM.random((5, 7)) < 0.5
    greys = (bits * 255).astype(np.uint8)
    Image.fromarray(greys).save(tmp_path / "a.png")
    forms = [
        bits, greys, bits.astype(np.float32), bits[None], bits[..., None], greys[None, ..., None],
        Image.fromarray(greys), Image.fromarray(bits), str(tmp_path / "a.png"), [tmp_path / "a.png"],
    ]  # fmt: skip
    for form in forms:
        found = as_masks(form, "mask")
        assert found.dtype == np.float32 and found.shape == (1, 5, 7)
        np.testing.assert_array_equal(found[0], bits)


def test_images_of_pil_are_treated_as_files_are():
    """White shows through transparent pictures, black through transparent masks."""
    clear = Image.new("RGBA", (3, 2), (200, 0, 0, 0))
    assert (as_pictures(clear, "image") == 1).all() and (as_masks(clear, "mask") == 0).all()
    grey = Image.new("L", (3, 2), 51)
    np.testing.assert_allclose(as_pictures(grey, "image"), np.full((1, 2, 3, 3), 0.2), atol=1e-7)
    assert clear.mode == "RGBA" and clear.size == (3, 2)


def test_values_of_callers_are_not_changed():
    values = np.full((4, 4, 3), 1 + 5e-4, np.float32)
    assert as_pictures(values, "image").max() == 1
    assert values.max() > 1


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        (as_pictures, None, "found NoneType, expected a PIL image, an array, a path, or a list of such"),
        (as_pictures, 5, "found int"),
        (as_pictures, [], "found an empty list"),
        (as_pictures, [np.zeros((4, 4, 3)), np.zeros((4, 5, 3))], "found 4x4 and 5x4, expected pictures of one size"),
        (as_pictures, np.zeros((4, 4)), r"found shape \(4, 4\), expected \(h, w, 3\)"),
        (as_pictures, np.zeros((0, 4, 3)), "found shape"),
        (as_pictures, np.zeros((4, 4, 3), bool), "found bool, expected uint8 or float"),
        (as_pictures, np.zeros((4, 4, 3), np.int64), "found int64, expected uint8 or float"),
        (as_pictures, np.full((4, 4, 3), 2.0), "found values from 2 to 2, expected floats from 0 to 1, or uint8"),
        (as_pictures, np.full((4, 4, 3), -1.0), "found values from -1 to -1"),
        (as_pictures, np.full((4, 4, 3), np.nan), "found values from nan to nan"),
        (as_masks, np.zeros((1, 4, 4, 3)), "found shape"),
        (as_masks, np.zeros(4), "found shape"),
        (as_masks, np.zeros((4, 5, 3), np.uint8), r"found shape \(4, 5, 3\), expected \(h, w\), "),
        (as_masks, np.full((4, 4), np.inf), "found values from inf to inf"),
    ],
)
def test_what_is_none(function, value, words):
    with pytest.raises(InputError, match=words) as caught:
        function(value, "image")
    assert str(caught.value).startswith("image: ") and "\n" not in str(caught.value)


def test_pictures_are_resized_in_eight_bits_by_lanczos():
    found = resize_pictures(as_pictures(BYTES, "image"), 8, 12)
    wanted = np.asarray(Image.fromarray(BYTES).resize((12, 8), Image.Resampling.LANCZOS), np.float32) / 255
    np.testing.assert_array_equal(found[0], wanted)
    np.testing.assert_array_equal(resize_pictures(np.full((1, 4, 4, 3), 0.7 / 255), 8, 8), np.float32(1) / 255)
    floats = RANDOM.random((1, 4, 4, 3), np.float32)
    assert resize_pictures(floats, 4, 4) is floats


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 20), st.integers(1, 20)), to=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_any_size_is_resized_as_pil_does_it(size, to):
    images = [picture(*size) for _ in range(2)]
    pictures, masks = as_pictures(images, "image"), as_masks(images, "mask")
    for i, image in enumerate(images):
        wanted = np.asarray(image.resize(to, Image.Resampling.LANCZOS), np.float32) / 255
        np.testing.assert_array_equal(resize_pictures(pictures, to[1], to[0])[i], wanted)
        grey = np.asarray(image.convert("L").resize(to, Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(resize_masks(masks, to[1], to[0])[i], grey >= 128)


def test_masks_are_resized_and_made_black_and_white():
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, :, 4:] = 1
    found = resize_masks(mask, 4, 6)
    assert set(np.unique(found)) == {0, 1} and found.dtype == np.float32
    np.testing.assert_array_equal(found[0, 0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(resize_masks(np.array([[[0.49, 0.5]]], np.float32), 1, 2), [[[0, 1]]])


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), h=st.integers(1, 12), w=st.integers(1, 12))
def test_masks_at_the_size_of_latents(height, width, h, w):
    """As torch's interpolate, mode nearest: the pixel at the rounded-down place."""
    mask = (np.random.default_rng(height * width).random((2, height, width)) < 0.5).astype(np.float32)
    wanted = [[[mask[b, i * height // h, j * width // w] for j in range(w)] for i in range(h)] for b in range(2)]
    np.testing.assert_array_equal(latent_masks(mask, h, w), np.array(wanted)[:, None])
    np.testing.assert_array_equal(latent_masks(mask / 2, h, w), np.array(wanted)[:, None])  # from a half on


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 9000), width=st.integers(1, 9000), factor=st.sampled_from([2, 4, 8]),
    area=st.sampled_from([128**2, 512**2, 768**2]),
)  # fmt: skip
def test_the_size_to_work_at(height, width, factor, area):
    h, w = fit_size(height, width, factor, area)
    assert h >= factor and w >= factor and h % factor == w % factor == 0
    if height * width <= 2.25 * area:
        assert (h, w) == (max(height // factor, 1) * factor, max(width // factor, 1) * factor)
    elif max(height, width) < 8 * min(height, width):
        assert h * w == pytest.approx(area, rel=0.4)
        assert h / w == pytest.approx(height / width, rel=0.4)


def test_usual_sizes_to_work_at():
    assert fit_size(512, 768, 8, 512**2) == (512, 768)
    assert fit_size(513, 519, 8, 512**2) == (512, 512)
    assert fit_size(3000, 4000, 8, 512**2) == (440, 592)
    assert fit_size(1, 1, 8, 512**2) == (8, 8)


def test_cover_keeps_the_middle():
    image = Image.new("RGB", (300, 100), "white")
    image.paste("red", (100, 0, 200, 100))
    found = np.asarray(cover(image, 50, 50))
    assert found.shape == (50, 50, 3) and (found[:, 3:-3] == (255, 0, 0)).all()
    assert cover(image, 100, 300) is image


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 40), height=st.integers(1, 40), sides=st.tuples(*[st.sampled_from([0, 0, 3, 16, 40])] * 4),
    masked=st.booleans(),
)  # fmt: skip
def test_expanding(width, height, sides, masked):
    left, top, right, bottom = sides
    image = picture(width, height)
    mask = Image.new("L", (width, height), 255) if masked else None
    found, area = expand(image, mask, left, top, right, bottom)
    assert found.size == area.size == (width + left + right, height + top + bottom)
    inside = (left, top, left + width, top + height)
    np.testing.assert_array_equal(np.asarray(found.crop(inside)), np.asarray(image))
    white = np.asarray(area) == 255
    outside = np.ones(white.shape, bool)
    outside[top : top + height, left : left + width] = False
    assert white[outside].all()
    kept = np.asarray(area.crop(inside))
    if masked:
        assert (kept == 255).all()
    else:
        rows, columns = min(OVERLAP, height // 4), min(OVERLAP, width // 4)
        wanted = np.zeros((height, width), bool)
        wanted[: rows if top else 0] = True
        wanted[height - (rows if bottom else 0) :] = True
        wanted[:, : columns if left else 0] = True
        wanted[:, width - (columns if right else 0) :] = True
        np.testing.assert_array_equal(kept == 255, wanted)


def test_new_borders_have_the_colours_of_the_edge():
    image = Image.new("RGB", (32, 32), "blue")
    image.paste("red", (0, 0, 32, 16))
    found = np.asarray(expand(image, None, 64, 0, 0, 0)[0])
    assert (found[2, :64] == (255, 0, 0)).all() and (found[29, :64] == (0, 0, 255)).all()
    assert 0 < found[16, 10, 0] < 255  # they run into each other


def test_what_cannot_be_expanded():
    for value in (-1, 9000, 1.5, True):
        with pytest.raises(InputError, match="right: found"):
            expand(picture(4, 4), None, 0, 0, value, 0)
    with pytest.raises(InputError, match="mask: found 5x4 pixels, expected 4x4"):
        expand(picture(4, 4), Image.new("L", (5, 4)), 0, 0, 8, 0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 30), height=st.integers(1, 30))
def test_outside_the_mask_every_pixel_is_the_original(seed, width, height):
    random = np.random.default_rng(seed)
    original, painted = picture(width, height), picture(width, height)
    mask = np.kron(random.integers(0, 256, (6, 6), np.uint8), np.ones((5, 5), np.uint8))[:height, :width]
    found = np.asarray(paste_back(original, painted, Image.fromarray(np.ascontiguousarray(mask))))
    kept = mask < 128
    np.testing.assert_array_equal(found[kept], np.asarray(original)[kept])
    low, high = np.minimum(original, painted), np.maximum(original, painted)
    assert ((found >= low) & (found <= high)).all()


def test_a_mask_begins_at_128():
    mask = Image.fromarray(np.array([[127, 128]], np.uint8))
    found = paste_back(Image.new("RGB", (2, 1), "black"), Image.new("RGB", (2, 1), "white"), mask)
    np.testing.assert_array_equal(np.asarray(found)[0, :, 0], [0, 255])


def test_the_painted_part_fades_in():
    original, painted = Image.new("RGB", (40, 40), "black"), Image.new("RGB", (40, 40), "white")
    mask = Image.new("L", (40, 40))
    mask.paste(255, (10, 0, 40, 40))
    line = np.asarray(paste_back(original, painted, mask))[20, :, 0].astype(int)
    assert (line[:10] == 0).all() and (line[10 + SOFT_EDGE : 40] == 255).all()
    assert (np.diff(line[9 : 11 + SOFT_EDGE]) >= 0).all() and 0 < line[10] < 255
    thin = Image.new("L", (40, 40))
    thin.paste(255, (10, 0, 12, 40))
    line = np.asarray(paste_back(original, painted, thin))[20, :, 0]
    assert (line[10:12] == 255).all()  # too thin to fade
    with pytest.raises(InputError, match="painted: found 4x4 pixels, expected 40x40"):
        paste_back(original, picture(4, 4), mask)
