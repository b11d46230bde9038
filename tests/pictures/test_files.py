"""Pictures and masks out of files of every kind, and files that are none."""

import functools
import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from sd_numba.errors import InputError
from sd_numba.pictures import files
from sd_numba.pictures.files import ORIENTATION, open_mask, open_picture

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 0, 0], [250, 250, 250]]], np.uint8)


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def read(path):
    picture = open_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.ppm", "a.tga"])
def test_formats(tmp_path, name):
    options = {"lossless": True} if name == "a.webp" else {}
    np.testing.assert_array_equal(read(saved(tmp_path, Image.fromarray(COLOURS), name, **options)), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """Value n says how the stored picture must be turned: the upper left corner is shown where it belongs."""
    upright = Image.fromarray(COLOURS)
    T = Image.Transpose
    stored = {
        1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90,
        7: T.TRANSVERSE, 8: T.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(tmp_path, upright if stored is None else upright.transpose(stored), exif=exif)
    np.testing.assert_array_equal(read(path), COLOURS)


def test_an_orientation_that_is_none_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 99
    np.testing.assert_array_equal(read(saved(tmp_path, Image.fromarray(COLOURS), exif=exif)), COLOURS)


def test_transparency_is_white_in_pictures_and_black_in_masks(tmp_path):
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("RGBA", (200, 10, 10, 0))):
        path = saved(tmp_path, Image.new(mode, (2, 2), colour))
        assert (read(path) == 255).all()
        assert (np.asarray(open_mask(path)) == 0).all()
    path = saved(tmp_path, Image.new("RGBA", (2, 2), (200, 0, 0, 128)))
    np.testing.assert_allclose(read(path)[0, 0], [227, 127, 127], atol=1)
    white = saved(tmp_path, Image.new("LA", (2, 2), (255, 128)))
    np.testing.assert_allclose(np.asarray(open_mask(white)), 128, atol=1)


def test_palettes(tmp_path):
    image = Image.fromarray(COLOURS).quantize(8)
    np.testing.assert_array_equal(read(saved(tmp_path, image)), np.asarray(image.convert("RGB")))
    index = image.getpixel((1, 0))
    found = read(saved(tmp_path, image, transparency=index))
    assert (found[0, 1] == 255).all() and (found[0, 0] == COLOURS[0, 0]).all()
    found = read(saved(tmp_path, image, "a.gif", transparency=index))
    assert (found[0, 1] == 255).all()


def test_a_colour_that_stands_for_transparency(tmp_path):
    found = read(saved(tmp_path, Image.fromarray(COLOURS), transparency=(0, 255, 0)))
    assert (found[0, 1] == 255).all() and (found[0, 0] == COLOURS[0, 0]).all()
    greys = np.array([[0, 64, 128]], np.uint8)
    path = saved(tmp_path, Image.fromarray(greys), transparency=64)
    np.testing.assert_array_equal(read(path)[0, :, 0], [0, 255, 128])
    np.testing.assert_array_equal(np.asarray(open_mask(path)), [[0, 0, 128]])


def test_greys_of_any_depth(tmp_path):
    greys = np.array([[0, 64, 128, 255]], np.uint8)
    wanted = np.repeat(greys[..., None], 3, axis=2)
    np.testing.assert_array_equal(read(saved(tmp_path, Image.fromarray(greys))), wanted)
    np.testing.assert_array_equal(read(saved(tmp_path, Image.fromarray(greys.astype(np.uint16) * 257))), wanted)
    np.testing.assert_array_equal(
        read(saved(tmp_path, Image.fromarray(greys.astype(np.int32) * 257), "a.tiff")), wanted
    )
    wide = Image.fromarray((greys.astype(np.int64) * 8_000_000).astype(np.int32))  # white is then their largest
    np.testing.assert_array_equal(read(saved(tmp_path, wide, "a.tiff")), wanted)
    for scale in (1 / 255, 1):
        floats = Image.fromarray(greys.astype(np.float32) * np.float32(scale))
        np.testing.assert_array_equal(read(saved(tmp_path, floats, "a.tiff")), wanted)
    bits = Image.fromarray(greys > 100)
    np.testing.assert_array_equal(read(saved(tmp_path, bits))[0, :, 0], [0, 0, 255, 255])
    np.testing.assert_array_equal(np.asarray(open_mask(saved(tmp_path, bits))), [[0, 0, 255, 255]])
    path = saved(tmp_path, Image.fromarray(greys.astype(np.uint16) * 257))
    np.testing.assert_array_equal(np.asarray(open_mask(path)), greys)


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = read(saved(tmp_path, image, "a.jpg", quality=95))
    assert found[8, 8, 0] > 200 and found[8, 8, 1:].max() < 60


def test_colour_profiles_are_brought_to_srgb(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(read(saved(tmp_path, Image.fromarray(COLOURS), icc_profile=profile)), COLOURS)
    # The same with its red called blue and its blue red, under another name.
    words = {b"rXYZ": b"-XYZ", b"bXYZ": b"rXYZ", b"-XYZ": b"bXYZ", "sRGB".encode("utf-16-be"): b"\0B\0G\0R\0s"}
    swapped = functools.reduce(lambda content, change: content.replace(*change), words.items(), profile)
    path = saved(tmp_path, Image.fromarray(COLOURS), icc_profile=swapped)
    assert np.abs(read(path).astype(int) - COLOURS[..., ::-1]).max() <= 2
    mask = saved(tmp_path, Image.fromarray(COLOURS), "mask.png", icc_profile=swapped)
    np.testing.assert_array_equal(np.asarray(open_mask(mask)), np.asarray(Image.fromarray(COLOURS).convert("L")))
    muted = COLOURS // 3 + 80
    lab = ImageCms.profileToProfile(
        Image.fromarray(muted), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    found = read(saved(tmp_path, lab, "a.tiff", icc_profile=profile))
    assert np.abs(found.astype(int) - muted).max() <= 6
    damaged = saved(tmp_path, Image.fromarray(COLOURS), icc_profile=b"rubbish")
    np.testing.assert_array_equal(read(damaged), COLOURS)


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert (read(path) == (255, 0, 0)).all()


def test_masks_are_luminance(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[[255, 255, 255], [0, 0, 0], [0, 255, 0]]], np.uint8)))
    mask = open_mask(path)
    assert mask.mode == "L"
    np.testing.assert_array_equal(np.asarray(mask), [[255, 0, 150]])


def refused(path):
    for function in (open_picture, open_mask):
        with pytest.raises(InputError) as caught:
            function(path)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_files_that_are_none(tmp_path, monkeypatch):
    assert "no such file" in refused(tmp_path / "none.png")
    assert "is a folder, not a picture" in refused(tmp_path)
    (tmp_path / "text.png").write_text("a red apple")
    assert "not a picture in a known format, such as PNG" in refused(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    assert "not a picture in a known format" in refused(tmp_path / "empty.png")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert "found EPS, expected a bitmap format" in refused(tmp_path / "a.eps")

    def deny(name):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Image, "open", deny)
    assert "permission denied; make the file readable" in refused(tmp_path / "text.png")


def test_damaged_pictures(tmp_path):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(content, "PNG")
    path = tmp_path / "cut.png"
    path.write_bytes(content.getvalue()[:5000])
    assert "the picture is damaged (" in refused(path)
    changed = bytearray(content.getvalue())
    for place in range(60, len(changed), 7):  # from the first pixels on
        changed[place] ^= 255
    path.write_bytes(changed)
    assert "damaged" in refused(path)
    content = io.BytesIO()
    Image.fromarray(COLOURS).resize((60, 60)).save(content, "JPEG")
    path.write_bytes(content.getvalue()[:700])
    assert "damaged" in refused(path)


def test_a_picture_too_large_for_pillow(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("L", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "found 1600 pixels, expected at most 200; make the picture smaller" in refused(path)
