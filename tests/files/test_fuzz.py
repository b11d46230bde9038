"""Readers of files against damaged, hostile and foreign files; ``python -m tests.fuzz`` tries many more."""

import csv
import io
import json
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_numba.errors import InputError, SdNumbaError
from sd_numba.files.safetensors import read_header
from sd_numba.generation.settings import Settings, settings_of
from sd_numba.pictures.files import open_mask, open_picture
from sd_numba.recipes.a1111 import parse_parameters
from sd_numba.recipes.infotext import recipe_from_parameters
from sd_numba.recipes.png import read_parameters
from sd_numba.recipes.prompt_file import OUTPUT, read_prompt_file
from sd_numba.recipes.recipe import Recipe
from sd_numba.tools.info import describe
from tests.fuzz import HOSTILE, make_file, mutate_bytes, mutate_json, run, safetensors_header, try_file

OWN = 20 << 20  # bytes that every file may take: mostly CLIP's vocabulary, which comes with the package


def test_mutated_headers(tmp_path):
    ends = run(tmp_path, 1500, seed=1)
    for reader in ("header", "info", "test", "model", "vae", "lora", "embedding"):
        assert min(ends[f"{reader}: read"], ends[f"{reader}: refused"]) > 10, ends


def test_memory_stays_below_the_size_of_the_file(tmp_path):
    """But for a fixed amount."""
    path = tmp_path / "case.safetensors"
    make_file(path, random.Random(0))
    try_file(path)  # what is imported and cached on the way
    for case in range(150):
        make_file(path, random.Random(f"memory-{case}"))
        tracemalloc.start()
        try:
            try_file(path)
            assert tracemalloc.get_traced_memory()[1] < path.stat().st_size + OWN
        finally:
            tracemalloc.stop()
        try_file(path)  # untraced, for its time


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"GGUF\x03\0\0\0", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\x80\x02"]),
)
def test_any_bytes(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(start + data)
    try_file(path)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=20),
        st.tuples(st.sampled_from(["F32", "F16", "I64"]), st.lists(st.integers(0, 9), max_size=4)),
        max_size=8,
    )
)
def test_any_sound_header_is_read_back(tmp_path_factory, tensors):

    header, size = safetensors_header(tensors)
    header.pop("__metadata__")
    text = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "sound.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    if "__metadata__" not in tensors:
        assert {name: (info.dtype, [*info.shape]) for name, info in read_header(path).items()} == tensors


def read_text(text):
    """As `generate --from` does; whatever is said of it can be printed."""
    recipe, notes = recipe_from_parameters(parse_parameters(text))
    "\n".join(notes).encode()
    assert not any("\n" in note or len(note) > 600 for note in notes)
    for name, about in settings_of(Recipe).items():
        value = getattr(recipe, name)
        assert value is None or about.kind.read(value) == value, name
    return recipe, notes


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400))
def test_any_text_in_a_picture(text):
    read_text(text)


TEXTS = [
    "a cat\nNegative prompt: bad\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, "
    "Size: 512x768, Model hash: 6ce0161689, Model: v1-5, Denoising strength: 0.4, Clip skip: 2, Eta: 0.5, RNG: NV, "
    'Hires resize: 1024x1536, Hires steps: 3, Hires upscaler: Latent, Lora hashes: "a: 12, b: 34", Version: v1.10.1',
    "a cat\nSteps: 20, CFG scale: 7.000000, Guidance: 3.5, Eta: inf, Seed: 42, Size: 512x512, Model: sd.gguf, "
    "RNG: cuda, Sampler RNG: cuda, Sampler: euler karras, Version: stable-diffusion.cpp, SDCPP: "
    '{"loras": [{"name": "x", "multiplier": 0.7}], "hires": {"enabled": true, "scale": 1.5, "steps": 8}}',
    'a cat\nSteps: 5, Sampler: DDIM, CFG scale: 1, Seed: 1, Width: 64, Height: 64, Init image: "a, b.png", '
    'Init image hash: 0123456789, Expand: "0,1,2,3", RNG: CPU, Eta DDIM: 0.5, Hires upscale: 2, CFG interval: 0-0.8, '
    'Cache: "deepcache:3", VAE tiling: on, Prompt: " a cat", Negative prompt: "x\\ny", Version: sd-numba 0.1.0',
]


def test_damaged_texts():
    rng, complaints = random.Random(3), 0
    for _ in range(3000):
        damaged = mutate_bytes(rng.choice(TEXTS).encode(), rng)
        for _ in range(rng.choice((0, 1, 3))):
            at = damaged.find(b": ", rng.randrange(len(damaged) + 1)) + 2
            damaged = damaged[:at] + str(rng.choice(HOSTILE)).encode("utf-8", "replace") + damaged[at:]
        _, notes = read_text(damaged.decode("utf-8", "replace"))
        complaints += bool(notes)
    assert 500 < complaints < 2900


PROMPTS = [
    {"prompt": "a cat", "steps": 5, "cfg_scale": "7.5", "size": "64x96", "sampler": "euler", "schedule": "karras"},
    {"prompt": "a hen", "seed": 2**64 - 1, "expand": [0, 1, 2, 3], "cfg_interval": "0,0.8", "output": "hen.png"},
    {"prompt": "a fox", "init_img": "a.png", "strength": 0.5, "hr_scale": 2, "hires_steps": 3, "clip_skip": 2},
]


def prompt_files(rng):
    """The same pictures in each kind of file, some with hostile settings."""
    rows = [mutate_json(dict(row), rng) for row in rng.sample(PROMPTS, 2)]
    yield "a.json", json.dumps(rows)
    yield "a.jsonl", "\n".join(map(json.dumps, rows))
    yield "a.txt", "\n".join(str(row.get("prompt")) for row in rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    yield "a.csv", table.getvalue()


def test_damaged_prompt_files(tmp_path):
    rng, ends = random.Random(4), Counter()
    for _ in range(400):
        for name, content in prompt_files(rng):
            path = tmp_path / name
            path.write_bytes(mutate_bytes(content.encode("utf-8", "replace"), rng))
            try:
                rows = read_prompt_file(path)
            except InputError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error).encode()) < 1500
                ends[f"{name}: refused"] += 1
            else:
                for row in rows:
                    assert row.keys() <= {*settings_of(Settings), OUTPUT} and row["prompt"].strip()
                    Recipe(**{key: value for key, value in row.items() if key != OUTPUT})
                ends[f"{name}: read"] += 1
    assert min(ends.values()) > 25 and len(ends) == 8, ends


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures(tmp_path):
    """Whatever Pillow runs into, one line comes of it."""
    rng = random.Random(2)
    image = Image.effect_noise((24, 16), 90).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat\nSteps: 5, Seed: 1, Size: 8x8".encode("utf-16-be")
    ends = Counter()
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.tiff", "a.bmp", "a.ico", "a.tga", "a.ppm"):
        path = tmp_path / name
        (image.quantize(8) if name == "a.gif" else image).save(path, exif=exif.tobytes())
        content = path.read_bytes()
        for _ in range(60):
            changed = bytearray(content)
            for _ in range(rng.choice([1, 1, 3, 20])):
                changed[min(int(rng.expovariate(1 / 60)), len(changed) - 1)] = rng.choice(
                    [0, 1, 127, 255, rng.randrange(256)]
                )
            path.write_bytes(changed[: rng.choice([len(changed)] * 3 + [rng.randrange(len(changed))])])
            for reader in (open_picture, open_mask, lambda path: read_text(read_parameters(path) or ""), describe):
                try:
                    reader(path)
                    ends["read"] += 1
                except SdNumbaError as error:
                    assert "\n" not in str(error) and str(error).startswith(str(path))
                    ends["refused"] += 1
    assert min(ends.values()) > 300, ends


def test_pickles_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was run",))

    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Trap()))
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Trap()))
    for name in ("a.ckpt", "b.pt"):
        ends = try_file(tmp_path / name)
        assert not any(end.endswith("read") for end in ends)
        with pytest.raises(SdNumbaError, match="a PyTorch pickle: only safetensors files are read"):
            read_header(tmp_path / name)


@pytest.mark.parametrize("part", [".", "lora_", ".processor.to_", "model.diffusion_model.", "decoder.up.", "a.lora_A."])
def test_names_without_end_take_no_time(tmp_path, part):
    """``try_file`` fails if they do."""
    names = [prefix + part * 30_000 + "weight" for prefix in ("", "model.diffusion_model.input_blocks.1.")]
    header, size = safetensors_header({name: ("F32", [2]) for name in names})
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    ends = try_file(tmp_path / "a.safetensors")
    assert ends["header: refused"] == 1
