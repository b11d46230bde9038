"""Pictures are saved whole or not at all, with the text that other tools read."""

import errno
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sd_numba.errors import InputError
from sd_numba.recipes import png
from sd_numba.recipes.a1111 import Parameters
from sd_numba.recipes.png import EXIF_IFD, USER_COMMENT, check_output, read_parameters, save_png

PICTURE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
SETTINGS = {"Steps": "20", "Sampler": "DPM++ 2M", "Seed": "42", "Size": "512x512"}
LINE = "Steps: 20, Sampler: DPM++ 2M, Seed: 42, Size: 512x512"


@pytest.mark.parametrize("prompt", ["a cat", "café", "你好 🐱"])
def test_a_saved_picture(tmp_path, prompt):
    path = tmp_path / "out.png"
    save_png(path, PICTURE, Parameters(prompt, "", SETTINGS))
    assert os.listdir(tmp_path) == ["out.png"]
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), PICTURE)
    assert read_parameters(path) == f"{prompt}\n{LINE}"
    latin = prompt != "你好 🐱"
    assert (b"tEXtparameters\0" in path.read_bytes()) == latin
    assert (b"iTXtparameters\0" in path.read_bytes()) != latin
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_picture_is_replaced_and_needs_no_text(tmp_path):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")
    save_png(str(path), Image.fromarray(PICTURE))
    assert read_parameters(path) is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch, error, step):
    path = tmp_path / "out.png"
    save_png(path, PICTURE)
    old = path.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(os, step, fail)
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        save_png(path, PICTURE + 1)
    if expected is InputError:
        assert str(caught.value) == f"{path}: cannot be written: No space left on device"
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["out.png"]


def refuse(**_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_output_paths_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, expected in [
        (tmp_path / "no" / "out.png", "does not exist"),
        (tmp_path / "file" / "out.png", "Not a directory"),
        (tmp_path, "is a folder"),
        (tmp_path / "out.jpg", "as PNG"),
        (tmp_path / "null\0.png", "cannot be written"),
        (tmp_path / ("x" * 300 + ".png"), "File name too long"),
    ]:
        with pytest.raises(InputError, match=expected):
            save_png(path, PICTURE)
    if os.path.isdir("/proc"):  # where not even root can create a file
        with pytest.raises(InputError, match="its folder /proc is not writable"):
            check_output("/proc/out.png")
    monkeypatch.setattr(png.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="not writable"):
        check_output(tmp_path / "out.png")
    assert os.listdir(tmp_path) == ["file"]


def test_a_device_is_written_to_and_not_replaced():
    save_png("/dev/null", PICTURE)
    assert not os.path.isfile("/dev/null")


def test_pictures_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_parameters(tmp_path / "none.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(InputError, match="cannot be read"):
        read_parameters(tmp_path / "bad.png")


TEXT = f"a cat, 你好\n{LINE}"


def exif(comment):
    image = Image.Exif()
    image.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
    return image.tobytes()


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"),
        b"UNICODE\0" + TEXT.encode(),
        b"ASCII\0\0\0" + TEXT.encode(),
        bytes(8) + TEXT.encode() + b"\0",
        TEXT.encode(),
    ],
)
def test_text_in_exif_data(tmp_path, name, comment):
    Image.fromarray(PICTURE).save(tmp_path / name, exif=exif(comment))
    assert read_parameters(tmp_path / name) == TEXT


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png"])
@pytest.mark.parametrize("data", [b"MM\0*\0\0\0\x08\xff\xff" + b"\x87\x69" * 20, b"rubbish, rubbish", b"MM", bytes(40)])
def test_damaged_exif_data_are_none(tmp_path, name, data):
    Image.fromarray(PICTURE).save(tmp_path / name, exif=b"Exif\0\0" + data)
    assert read_parameters(tmp_path / name) is None


def test_text_of_stable_diffusion_cpp_in_webp(tmp_path):
    xmp = "<x:xmpmeta><sdcpp:parameters>a cat &lt;lora:x:1&gt; &amp; more\nSteps: 5</sdcpp:parameters></x:xmpmeta>"
    Image.fromarray(PICTURE).save(tmp_path / "a.webp", xmp=xmp.encode())
    assert read_parameters(tmp_path / "a.webp") == "a cat <lora:x:1> & more\nSteps: 5"


def test_text_behind_the_pixels(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(path)
    content = path.read_bytes()
    chunk = b"tEXtparameters\0" + LINE.encode()
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:-12] + chunk + content[-12:])
    assert read_parameters(path) == LINE


def test_compression_changes_no_pixel(tmp_path):
    save_png(tmp_path / "a.png", PICTURE, level=1)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), PICTURE)


def test_half_a_pair_of_surrogates_stops_no_saving(tmp_path):
    save_png(tmp_path / "a.png", PICTURE, "a \ud800 cat")
    assert read_parameters(tmp_path / "a.png") == "a ? cat"
