"""Damaged, hostile and foreign model files, by the thousand: nothing may crash, hang or take memory without end.

``tests/test_fuzz.py`` tries some in every run of the suite; for many more, from the repository's root:

    python -m tests.fuzz --cases 100000 [--seed 0]

A case is a file of a small corpus (real headers over tensors of zeros) with a few mutations, and everything that reads
files looks at it. The only exception that may come is the error meant for users, of one line.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd_numba.checkpoints.embedding import read_embedding
from sd_numba.checkpoints.lora import Modules, read_lora
from sd_numba.checkpoints.opening import open_model, open_taesd, open_vae
from sd_numba.errors import SdNumbaError
from sd_numba.families.names import unet_names
from sd_numba.files.safetensors import read_header, read_metadata
from sd_numba.tools.check import check_model
from sd_numba.tools.convert import convert
from sd_numba.tools.info import describe

SECONDS, WAIT = 2.0, 60.0  # limits for one case: CPU time, and wall time
MEMORY = 100_000  # KB that a long run may add, mostly for modules imported on the way
ITEM = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "I64": 8}
GGML = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q8_0": (8, 32, 34)}
HOSTILE: list[Any] = [
    0, -1, 1, 7, 1 << 31, 1 << 56, 1 << 63, 1 << 64, 10**40, 1e308, float("nan"), True, None, "", "x" * 300, "F32",
    "F64", "F8_E4M3", "Q8_0", [], [[]], {}, [0, 0], [-1, 5], [1 << 62, 1 << 62], [1] * 40, "\ud800", "\n",
    "model.diffusion_model.",
]  # fmt: skip

Tensors = dict[str, tuple[str, list[int]]]


def corpus() -> dict[str, Tensors]:
    """Return headers like those of real files, with small sizes."""
    unet, vae, text = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
    checkpoint: Tensors = {
        f"{unet}input_blocks.0.0.weight": ("F32", [32, 4, 3, 3]),
        f"{unet}input_blocks.1.0.in_layers.2.weight": ("F32", [32, 32, 3, 3]),
        f"{unet}input_blocks.1.1.norm.weight": ("F32", [32]),
        f"{unet}input_blocks.1.1.proj_in.weight": ("F16", [32, 32, 1, 1]),
        f"{unet}middle_block.1.proj_in.weight": ("F16", [32, 32, 1, 1]),
        f"{unet}middle_block.1.transformer_blocks.0.attn2.to_k.weight": ("F16", [32, 64]),
        f"{unet}out.2.weight": ("F32", [4, 32, 3, 3]),
        f"{vae}encoder.conv_in.weight": ("F32", [32, 3, 3, 3]),
        f"{vae}encoder.down.0.block.0.conv1.weight": ("F32", [32, 32, 3, 3]),
        f"{vae}decoder.up.0.block.0.conv1.weight": ("F32", [32, 32, 3, 3]),
        f"{vae}decoder.conv_in.weight": ("F32", [32, 4, 3, 3]),
        f"{vae}decoder.conv_out.weight": ("F32", [3, 32, 3, 3]),
        f"{text}embeddings.token_embedding.weight": ("F16", [99, 64]),
        f"{text}embeddings.position_embedding.weight": ("F16", [77, 64]),
        f"{text}embeddings.position_ids": ("I64", [1, 77]),
        f"{text}encoder.layers.0.mlp.fc1.weight": ("BF16", [128, 64]),
        "model_ema.decay": ("F32", []),
    }
    openclip = {name: value for name, value in checkpoint.items() if text not in name} | {
        "cond_stage_model.model.token_embedding.weight": ("F16", [99, 64]),
        "cond_stage_model.model.positional_embedding": ("F16", [77, 64]),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": ("F16", [192, 64]),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": ("F16", [192]),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": ("F16", [128, 64]),
    }
    lora: Tensors = {}
    for module in ("lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        lora[f"{module}.lora_down.weight"] = ("F16", [4, 32])
        lora[f"{module}.lora_up.weight"] = ("F16", [32, 4])
        lora[f"{module}.alpha"] = ("F16", [])
    peft: Tensors = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": ("F32", [4, 32, 1, 1]),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": ("F32", [32, 4, 1, 1]),
        "unet.conv_in.lora_up.weight": ("F32", [32, 4, 1, 1]),
        "unet.conv_in.lora_mid.weight": ("F32", [4, 4, 3, 3]),
        "unet.conv_in.lora_down.weight": ("F32", [4, 4, 1, 1]),
    }
    eighths: Tensors = {}
    for name, (dtype, shape) in checkpoint.items():
        rounded = dtype == "F16" and "embedding" not in name
        eighths |= {name: ("I8", shape), f"{name}_scale": ("F32", [shape[0], 1])} if rounded else {name: (dtype, shape)}
    autoencoder = {name.removeprefix(vae): value for name, value in checkpoint.items() if name.startswith(vae)}
    taesd: Tensors = {"decoder.layers.0.weight": ("F8_E4M3", [64, 4, 3, 3]), "encoder.layers.0.bias": ("F32", [64])}
    return {
        "checkpoint": checkpoint, "openclip": openclip, "lora": lora, "peft": peft, "vae": autoencoder, "taesd": taesd,
        "embedding": {"emb_params": ("F32", [8, 64])}, "sdxl": {"conditioner.embedders.0.x": ("F16", [3])},
        "int8": eighths,
    }  # fmt: skip


def safetensors_header(tensors: Tensors) -> tuple[dict[str, Any], int]:
    """Return the JSON of a header, and the size of the data."""
    header: dict[str, Any] = {"__metadata__": {"ss_output_name": "x", "lora_adapter_metadata": '{"unet.r": 4}'}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin = end
        end += ITEM[dtype] * product(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header, end


def product(shape: list[int]) -> int:
    """Return the number of values."""
    count = 1
    for size in shape:
        count *= size
    return count


def gguf_text(text: str) -> bytes:
    """Return a text as GGUF stores it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_header(tensors: Tensors) -> tuple[bytes, int]:
    """Return the header of a GGUF file of version 3, and the size of the data; its dtypes are those of `GGML`."""
    settings = [
        gguf_text("general.name") + struct.pack("<I", 8) + gguf_text("x"),
        gguf_text("numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
        gguf_text("words") + struct.pack("<IIQ", 9, 8, 2) + gguf_text("a") + gguf_text("bc"),
        gguf_text("general.alignment") + struct.pack("<II", 4, 64),
    ]
    records, end = [], 0
    for name, (dtype, shape) in tensors.items():
        kind, block, nbytes = GGML.get(dtype, GGML["F16"])
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        records.append(gguf_text(name) + sizes + struct.pack("<IQ", kind, end))
        end += -(-product(shape) // block * nbytes // 64) * 64
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings)) + b"".join(settings + records)
    return head + bytes(-len(head) % 64), end


def mutate_json(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Change something in a header."""
    names = list(header)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        name = rng.choice(names)
        entry = header.get(name)
        kind = rng.randrange(5)
        if kind == 0:
            header.pop(name, None)
        elif kind == 1:
            header[str(rng.choice(HOSTILE)) + name[rng.randrange(len(name)) :]] = header.get(name)
        elif kind == 2:
            header[name] = rng.choice(HOSTILE)
        elif isinstance(entry, dict) and entry:
            key = rng.choice(list(entry))
            value = entry[key]
            if isinstance(value, list) and value and kind == 3:
                value = list(value)
                value[rng.randrange(len(value))] = rng.choice(HOSTILE)
                header[name] = {**entry, key: value}
            else:
                header[name] = {**entry, key: rng.choice(HOSTILE)}
    return header


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or insert a few bytes."""
    result = bytearray(data)
    for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2, 5))):
        at = rng.randrange(len(result) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[at : at + rng.choice((1, 8, 100))]
        elif kind == 2:
            result[at:at] = result[at : at + rng.choice((1, 8, 100))]
        else:
            result[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 1 << 20, 1 << 40, (1 << 64) - 1)))
    return bytes(result)


def make_file(path: Path, rng: random.Random) -> None:
    """Write one case; the tensors' data is a hole in the file."""
    tensors = dict(rng.choice(list(corpus().values())))
    if rng.random() < 0.3:
        kinds = {name: (rng.choice(list(GGML)), shape) for name, (_, shape) in tensors.items()}
        head, size = gguf_header(kinds)
    else:
        header, size = safetensors_header(tensors)
        text = json.dumps(mutate_json(header, rng)).encode("utf-8", "surrogatepass")
        head = struct.pack("<Q", len(text)) + text
    head = mutate_bytes(head, rng)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(max(0, len(head) + size + rng.choice((*(0,) * 12, -1, 1, 8, -size))))


def modules() -> Modules:
    """Return the layers of a small model, for LoRAs."""
    unet = {"mid_block.attentions.0.proj_in.weight": (32, 32, 1, 1), "conv_in.weight": (32, 4, 3, 3)}
    text = {"text_model.encoder.layers.0.mlp.fc1.weight": (32, 32)}
    return Modules({"unet": unet, "text_encoder": text}, unet_names([1, 1], [True, False]))


def convert_and_remove(path: Path) -> None:
    """Write the file in another dtype; the result is never much larger."""
    target = path.with_name("converted.safetensors")
    try:
        for _ in convert(path, target, "f32"):
            pass
        assert target.stat().st_size <= 4 * path.stat().st_size + 1000
    finally:
        target.unlink(missing_ok=True)


READERS: dict[str, Callable[[Path], Any]] = {
    "header": read_header,
    "metadata": read_metadata,
    "info": describe,
    "test": lambda path: list(check_model(path)),
    "model": open_model,
    "vae": open_vae,
    "lora": lambda path: read_lora(path, modules()),
    "embedding": read_embedding,
    "taesd": open_taesd,
    "convert": convert_and_remove,
}


def try_file(path: Path) -> Counter[str]:
    """Run every reader on a file and count the outcomes. Fails on anything but an error meant for users."""
    ends: Counter[str] = Counter()
    start, computing = time.perf_counter(), time.process_time()
    for name, reader in READERS.items():
        try:
            str(reader(path)).encode()  # as if it were printed
            ends[f"{name}: read"] += 1
        except SdNumbaError as error:
            assert "\n" not in str(error) and len(str(error).encode()) < 1500, f"{name}: {error!s}"
            ends[f"{name}: refused"] += 1
    seconds, waited = time.process_time() - computing, time.perf_counter() - start
    slowed = tracemalloc.is_tracing()  # by a factor
    assert (slowed or seconds < SECONDS) and waited < WAIT, f"took {seconds:.1f} s of computing, {waited:.1f} s in all"
    return ends


def run(folder: Path, cases: int, seed: int) -> Counter[str]:
    """Try `count` cases; the last file stays in the folder if one fails."""
    path, ends = folder / "case.safetensors", Counter[str]()
    for case in range(cases):
        make_file(path, random.Random(f"{seed}-{case}"))
        try:
            ends += try_file(path)
        except BaseException as error:
            error.add_note(f"case {case} of seed {seed}")
            raise
    return ends


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ends = run(Path(folder), arguments.cases, arguments.seed)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = time.perf_counter() - start
    print(f"{arguments.cases:,} cases in {seconds:.0f} s, resident memory grew by {grown / 1e3:.1f} MB")
    for end, count in sorted(ends.items()):
        print(f"{end:20}{count:9,}")
    assert grown < MEMORY, "took too much memory"


if __name__ == "__main__":
    main()
