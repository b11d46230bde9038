"""Pictures are saved whole or not at all, with the text that other tools read."""

import errno
import hashlib
import os
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from sd_numba.errors import InputError
from sd_numba.files import hashes
from sd_numba.files.hashes import files_hash
from sd_numba.recipes import png
from sd_numba.recipes.a1111 import (
    Parameters,
    format_parameters,
    parse_parameters,
    sampler_title,
)
from sd_numba.recipes.png import EXIF_IFD, USER_COMMENT, check_output, read_parameters, save_png

PICTURE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
SETTINGS = {
    "Steps": "20", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7.5", "Seed": "42",
    "Size": "512x512", "Model hash": "6ce0161689", "Model": "v1-5-pruned-emaonly", "RNG": "CPU",
    "Version": "sd-numba 0.1.0",
}  # fmt: skip
LINE = (
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x512, "
    "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, RNG: CPU, Version: sd-numba 0.1.0"
)


def test_the_text():
    assert format_parameters(Parameters("a cat", "blurry", SETTINGS)) == f"a cat\nNegative prompt: blurry\n{LINE}"
    assert format_parameters(Parameters("a cat", "", SETTINGS)) == f"a cat\n{LINE}"


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "two\nlines", "Steps: 3", "a (red:1.3) cat, 你好 🐱", 'say "hi", \\o/']
)
@pytest.mark.parametrize("negative", ["", "blurry", "two\n\nlines, x: y"])
def test_the_text_is_read_back(prompt, negative):
    settings = {**SETTINGS, "Model": 'my, "odd": model\n2'}
    parameters = Parameters(prompt, negative, settings)
    assert parse_parameters(format_parameters(parameters)) == parameters


@pytest.mark.parametrize("text", ["", "\n", "a cat", "a cat\nSteps: 20", "Negative prompt:", "a: b, c: d"])
def test_texts_without_settings(text):
    assert parse_parameters(text).settings == {}


def test_a_text_of_another_program():
    text = f'a cat\nNegative prompt: bad\n{LINE}, Lora hashes: "a: 1, b: 2", Hires upscale: 2, TI: x, '
    parsed = parse_parameters(text)
    assert (parsed.prompt, parsed.negative_prompt) == ("a cat", "bad")
    assert parsed.settings == {**SETTINGS, "Lora hashes": "a: 1, b: 2", "Hires upscale": "2", "TI": "x"}


def test_parsing_takes_linear_time():
    rng = random.Random(0)
    start = time.perf_counter()
    for text in ("x" * 10**6, " " * 10**6 + "x", "a," * 10**5, 'a:"' * 10**5, ":" * 10**6):
        parse_parameters(text)
    for _ in range(500):
        parse_parameters("".join(rng.choices('ab:, "\\\n-', k=200)))
    assert time.perf_counter() - start < 5


def test_sampler_titles():
    assert sampler_title("dpm++2m-karras") == {"Sampler": "DPM++ 2M", "Schedule type": "Karras"}
    assert sampler_title("dpm++2m-sde-exponential") == {"Sampler": "DPM++ 2M SDE", "Schedule type": "Exponential"}
    assert sampler_title("euler-a") == {"Sampler": "Euler a"}
    # Where the web UI would choose another spacing by itself
    assert sampler_title("dpm++2m") == {"Sampler": "DPM++ 2M", "Schedule type": "Uniform"}
    assert sampler_title("dpm++2m-sde") == {"Sampler": "DPM++ 2M SDE", "Schedule type": "Uniform"}
    assert sampler_title("something-new") == {"Sampler": "something-new"}


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


def test_a_prompt_that_would_be_read_as_another_is_repeated():
    for prompt, negative in [(" a", ""), ("a\nNegative prompt: b", "")]:
        text = format_parameters(Parameters(prompt, negative, SETTINGS))
        assert ", Prompt: " in text
        assert parse_parameters(text) == Parameters(prompt, negative, SETTINGS)
    for parameters in (Parameters("a cat", "blurry", SETTINGS), Parameters("a cat ", "  blurry ", SETTINGS)):
        text = format_parameters(parameters)
        assert ", Prompt: " not in text and parse_parameters(text) == parameters


def test_values_that_are_json_and_lines_behind_the_settings():
    text = (
        f'a cat\n{LINE}, Hashes: {{"vae": "1, 2", "x": {{"y": [3, 4]}}}}, Broken: {{"a", End: 1\nTemplate: a cat\nmore'
    )
    parsed = parse_parameters(text)
    assert parsed.prompt == "a cat"
    assert parsed.settings["Hashes"] == '{"vae": "1, 2", "x": {"y": [3, 4]}}'
    assert parsed.settings["Broken"] == '{"a"' and parsed.settings["End"] == "1"


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


def test_files_hash_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_bytes(b"x" * 3_000_000)
    files[1].write_bytes(b"y")
    first = files_hash(files[:1])
    assert first == hashlib.sha256(b"x" * 3_000_000).hexdigest()[:10]
    both = files_hash(files)
    assert both == hashlib.sha256(b"x" * 3_000_000 + b"y").hexdigest()[:10]
    monkeypatch.setattr(hashes, "_sha256", lambda files: "f" * 64)
    assert (files_hash(files[:1]), files_hash(files)) == (first, both)
    files[0].write_bytes(b"changed")
    assert files_hash(files[:1]) == "f" * 10
    (tmp_path / "cache" / "sd-numba" / "hashes.json").write_text("rubbish")
    assert files_hash(files) == "f" * 10


def test_files_hash_without_a_place_for_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"y")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert files_hash([tmp_path / "file"]) == hashlib.sha256(b"y").hexdigest()[:10]
