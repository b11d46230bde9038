"""The command line as a user meets it: what it prints, what it writes, how it fails."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file

from sd_numba import kernels
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.cli import main
from sd_numba.cli.common import Command
from sd_numba.cli.plan import output_paths
from sd_numba.files.safetensors import read_header
from sd_numba.pipeline import Pipeline
from sd_numba.recipes import a1111, png

SMALL = ["--steps", "2", "-W", "64", "-H", "64", "-s", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


def one_line(result, *words):
    """The command failed with a single line that has these words in it."""
    assert result.exit_code not in {0, 130}
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    return True


def test_generate_writes_a_picture_and_says_so(run, tmp_path):
    result = run("generate", "a red apple", *SMALL)
    assert result.exit_code == 0, result.output
    assert "output.png  (seed 1)" in result.stdout
    assert Image.open(tmp_path / "output.png").size == (64, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["output.png"]


def test_the_picture_says_how_it_was_made(run, tmp_path):
    run("generate", "-p", "a red apple", "-n", "green", *SMALL, "--sampler", "Euler a", "--cfg-scale", "4")
    found = a1111.parse_parameters(png.read_parameters(tmp_path / "output.png"))
    assert (found.prompt, found.negative_prompt) == ("a red apple", "green")
    wanted = {
        "Steps": "2",
        "Sampler": "Euler a",
        "CFG scale": "4",
        "Seed": "1",
        "Size": "64x64",
        "Model": "emoji-world",
    }
    assert wanted.items() <= dict(found.settings).items()
    assert "Sampler: Euler a" in run("info", "output.png").output


def test_a_tiny_autoencoder_that_does_not_fit(run, tmp_path):
    assert one_line(run("generate", "a fox", *SMALL, "--taesd", "none.safetensors"), "none.safetensors: no such file")


def test_tiling_changes_no_small_picture(run, tmp_path):
    for tiling in ("on", "off"):
        assert run("generate", "a fox", *SMALL, "--vae-tiling", tiling, "-o", f"{tiling}.png").exit_code == 0
    assert Image.open(tmp_path / "on.png").tobytes() == Image.open(tmp_path / "off.png").tobytes()


def test_no_metadata(run, tmp_path):
    run("generate", "a red apple", *SMALL, "--no-metadata")
    assert png.read_parameters(tmp_path / "output.png") is None


def test_a_batch_counts_seeds_on(run, tmp_path):
    result = run("generate", "a fox", *SMALL, "-b", "2", "-o", "fox-{seed}.png")
    assert result.stdout.splitlines() == ["fox-1.png  (seed 1)", "fox-2.png  (seed 2)"]
    alone = run("generate", "a fox", "--steps", "2", "-W", "64", "-H", "64", "-s", "2", "-o", "alone.png")
    assert alone.exit_code == 0
    assert Image.open(tmp_path / "alone.png").tobytes() == Image.open(tmp_path / "fox-2.png").tobytes()


def test_output_patterns():
    def names(pattern, seeds):
        return [str(path) for path in output_paths(pattern, seeds)]

    assert names("a.png", [5]) == ["a.png"]
    assert names("a.png", [5, 6]) == ["a-001.png", "a-002.png"]
    assert names("a%02d.png", [5, 6]) == ["a01.png", "a02.png"]
    assert names("x/{seed}.png", [5, 6]) == ["x/5.png", "x/6.png"]
    assert names("%d-%3d.png", [5]) == ["1-  1.png"]
    assert names("%0999999999d.png", [5]) == ["%0999999999d.png"]


def test_verbose_and_profile(run):
    result = run("generate", "a fox", *SMALL, "-v", "--profile")
    for word in ("load", "text", "sampling", "decode", "save", "conv2d 3x3", "GFLOP/s", "of peak", "peak: "):
        assert word in result.stderr


def test_a_long_prompt_is_cut_aloud_where_syntax_is_plain_and_whole_elsewhere(run, caplog):
    long = ["generate", "a fox " * 250, *SMALL, "-n", "red " * 100]
    assert run(*long, "--prompt-syntax", "plain").exit_code == 0
    assert re.search(r"prompt: longer than 75 tokens; this is cut off: 'fox a fox", caplog.text)
    assert re.search(r"prompt: longer than 75 tokens; this is cut off: 'red", caplog.text)
    caplog.clear()
    assert run(*long).exit_code == 0
    assert "cut off" not in caplog.text


def test_outside_a_terminal_the_pace_is_said_once(run):
    result = run("generate", "a fox", *SMALL, "--sampler", "heun")
    assert re.search(r"^sampling\n3 steps, \d+\.\d\d s/it, peak memory \d+\.\d\d GB$", result.stderr, re.MULTILINE)


def test_a_sampler_named_with_its_spacing_may_be_asked_for_it_again(run):
    run("generate", "a fox", *SMALL, "--sampler", "euler-karras", "--scheduler", "karras")
    assert "Sampler: Euler, Schedule type: Karras" in run("info", "output.png").stdout


def test_kernels_compile_after_the_arguments_are_checked_and_before_they_are_needed(run, monkeypatch):
    happened = []
    monkeypatch.setattr(kernels, "warmup", lambda: happened.append("warmup") or iter(()))
    for name in ("run", "prepare"):
        method = getattr(Pipeline, name)
        monkeypatch.setattr(
            Pipeline,
            name,
            lambda *args, name=name, method=method, **options: happened.append(name) or method(*args, **options),
        )
    assert run("generate", "a fox", *SMALL).exit_code == 0
    assert happened == ["run", "warmup", "prepare", "run"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_while_kernels_compile(run, tmp_path, monkeypatch):
    started = []

    def compiling():
        for index, name in enumerate(("one", "two")):
            yield index, 2, name
            started.append(name)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(kernels, "warmup", compiling)
    before = signal.getsignal(signal.SIGINT)
    result = run("generate", "a fox", *SMALL)
    assert result.exit_code == 130
    assert "stopped by Ctrl-C" in result.stderr
    assert started == ["one"]
    assert signal.getsignal(signal.SIGINT) is before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sd_numba", "noise-test"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: output cannot be written: No space left")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "nowhere"], ["nowhere", "does not exist"]),
        (["-W", "65"], ["-W: found 65", "multiple of 4"]),
        (["--steps", "0"], ["--steps: found 0, expected a whole number from 1 to 1000"]),
        (["--sampler", "eulr"], ["eulr", "euler"]),
        (["-W", "0"], ["-W: found 0, expected a whole number"]),
        (["-W", "-8"], ["-W: found -8"]),
        (["--sampler", ""], ["--sampler: found '', expected one of ddpm, ddim"]),
        (
            ["--sampler", "pndm", "--scheduler", "karras"],
            ["pndm does not support the spacing karras", ": euler, heun"],
        ),
        (
            ["--sampler", "euler-karras", "--scheduler", "exponential"],
            ["--scheduler exponential and --sampler euler-karras ask for different spacings"],
        ),
        (["-o", "missing/a.png"], ["missing", "does not exist"]),
        (["-o", "."], ["is a folder"]),
        (["-o", "a.jpg"], [".png"]),
        (["--batch-count", "0"], ["--batch-count: found 0"]),
        (["-b", "100000000000"], ["-b: found 100000000000"]),
        (["--cfg-scale", "nan"], ["--cfg-scale: found nan"]),
        (["--guidance-scale=1e9"], ["--guidance-scale: found 1000000000.0, expected a number from -1000 to 1000"]),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(run, tmp_path, arguments, words):
    assert one_line(run("generate", "a fox", *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_every_command_names_the_flags_that_were_typed(run):
    assert all(isinstance(command, Command) for command in main.commands.values())
    assert one_line(run("diffusion-test", "-W", "65"), "-W: found 65")


def test_no_prompt_shows_how(run):
    result = run("generate")
    assert result.exit_code == 2 and "no prompt; say what to draw" in result.stderr
    assert len(re.findall(r'^  sd-numba generate "[^"]+"', result.stderr, re.MULTILINE)) == 3
    assert 'sd-numba generate "a red apple' in result.stderr


def damaged(tmp_path, component, change):
    model = shutil.copytree(embedded_model_path(), tmp_path / "model")
    file = next((model / component).glob("*.safetensors"))
    change(file)
    return str(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), ["truncated"]),
        (lambda f: f.write_bytes((1 << 60).to_bytes(8, "little") + f.read_bytes()[8:]), ["header"]),
        (lambda f: f.write_bytes(b""), ["empty"]),
        (lambda f: f.unlink(), ["no weights"]),
        (lambda f: f.write_bytes(f.read_bytes().replace(b'"F16"', b'"I16"', 1)), ["I16"]),
        (
            lambda f: f.write_bytes(f.read_bytes().replace(b"conv_in.weight", b"conv_in.wwight", 1)),
            ["missing", "conv_in"],
        ),
    ],
)
def test_damaged_models(run, tmp_path, change, words):
    model = damaged(tmp_path, "unet", change)
    assert one_line(run("generate", "a fox", "-m", model), *words)
    result = run("test", model)
    assert result.exit_code == 1
    assert not (tmp_path / "output.png").exists()


def test_incomplete_models(run, tmp_path):
    model = shutil.copytree(embedded_model_path(), tmp_path / "model")
    shutil.rmtree(model / "vae")
    assert one_line(run("generate", "a fox", "-m", str(model)), "vae")


def test_scheduler_configs_are_checked(run, tmp_path):
    model = shutil.copytree(embedded_model_path(), tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    text = config.read_text()
    config.write_text(text.replace("DPMSolverMultistepScheduler", "DEISMultistepScheduler"))
    assert "scheduler: DEISMultistepScheduler (not supported: choose a sampler): ok" in run("test", str(model)).stdout
    config.write_text(text.replace('"scaled_linear"', '"sigmoid"'))
    result = run("test", str(model))
    assert result.exit_code == 1
    fault = "FAULT: scheduler config: beta_schedule is 'sigmoid'"
    assert f"scheduler: DPMSolverMultistepScheduler: {fault}" in result.stdout


def test_sdxl_is_named(run, tmp_path):
    model = shutil.copytree(embedded_model_path(), tmp_path / "model")
    index = model / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    assert one_line(run("generate", "a fox", "-m", str(model)), "StableDiffusionXLPipeline")


def test_check_commands(run):
    result = run("test")
    assert result.exit_code == 0
    assert result.stdout.count(": ok") == 5
    assert run("clip-test").stdout.count("shape (1, 77, 192)") == 3
    noise = run("noise-test").stdout.splitlines()
    assert len(noise) == 3 * 8
    assert noise[-1].split() == ["999", "0.012", "0.988", "0.0046601"]
    diffusion = run("diffusion-test", "-W", "64", "-H", "64").stdout
    assert "(2, 4, 16, 16) -> (2, 4, 16, 16)" in diffusion
    for width in ("66", "0", "-8"):
        assert one_line(run("diffusion-test", "-W", width, "-H", width), f"-H: found {width}")
    assert "GFLOP/s" in diffusion
    assert "ready" in run("warmup").stdout
    assert "326 tensors" in run("info", str(embedded_model_path() / "unet")).stdout
    assert one_line(run("info", "nowhere.png"), "nowhere.png")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_one_line_and_what_to_go_on_from(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sd_numba",
        "generate",
        "a fox",
        "--steps",
        "500",
        "-o",
        str(tmp_path / "a.png"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"stopped by Ctrl-C; continue with: sd-numba generate --resume {tmp_path / 'a.png.state'}" in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["a.png.state"]


@pytest.fixture
def additions(tmp_path):
    """A folder with a LoRA for the embedded model and an embedding."""
    random, folder = np.random.default_rng(0), tmp_path / "additions"
    folder.mkdir()
    module, c = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 192
    n = read_header(UNET)[f"{module}.weight"].shape[0]
    lora = {
        f"lora_unet_{module.replace('.', '_')}.lora_{part}.weight": random.standard_normal(shape).astype(np.float32)
        for part, shape in (("up", (n, 4)), ("down", (4, c)))
    }
    save_file(lora, folder / "style.safetensors")
    save_file({"emb_params": random.standard_normal((2, c)).astype(np.float32)}, folder / "zzword.safetensors")
    (folder / "old.pt").write_bytes(b"PK\x03\x04")
    return folder


UNET = embedded_model_path() / "unet" / "diffusion_pytorch_model.safetensors"


def test_a_lora_by_option_and_by_tag(run, additions, tmp_path):
    def picture(*arguments):
        assert run("generate", *arguments, *SMALL, "-s", "1").exit_code == 0
        return np.asarray(Image.open(tmp_path / "output.png")), run("info", "output.png").stdout.splitlines()[0]

    plain, _ = picture("a fox")
    file = str(additions / "style.safetensors")
    option, noted = picture("a fox", "--lora", f"{file}:2")
    tag, tagged = picture("a fox <lora:style:2>", "--lora-dir", str(additions))
    assert (option == tag).all() and (option != plain).any()
    assert noted == tagged == "a fox <lora:style:2>"
    assert picture("a fox", "--lora", file, "--lora", f"{file}:1")[1] == "a fox <lora:style:1> <lora:style:1>"
    assert (picture(noted, "--lora-dir", str(additions))[0] == option).all()


def test_loras_that_cannot_be(run, additions, tmp_path):
    for arguments, expected in (
        (["a fox <lora:none>"], "LoRA 'none': no such file; give the folder with --lora-dir"),
        (["a fox", "--lora", str(UNET)], "found UNet, expected LoRA"),
        (["a fox", "--lora", "x:y"], "expected a number"),
        (["a fox", "--embedding-dir", "none"], "no such folder"),
        (["a fox", "--taesd", str(UNET)], "found UNet, expected a tiny autoencoder (TAESD)"),
        (["a fox", "--vae", str(UNET)], "found UNet, expected a VAE"),
        (["a fox", "--vae", str(additions / "style.safetensors")], "found LoRA, expected a VAE; load it with --lora"),
        (["a fox", "--lora", f"{additions / 'style.safetensors'}:1e40"], "expected -1000 to 1000"),
        (["a fox <lora:style"], "expected <lora:NAME:WEIGHT>"),
        (["a fox", "-m", ""], "found an empty name"),
        (["an old fox", "--embedding-dir", str(additions)], "a PyTorch pickle: only safetensors files are read"),
        (["a fox", "-m", "who/what"], "run: sd-numba download who/what"),
    ):
        result = run("generate", *arguments, *SMALL)
        assert result.exit_code == 1 and expected in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_an_embedding_in_a_prompt(run, additions, tmp_path):
    def picture(prompt, *arguments):
        assert run("generate", prompt, *SMALL, "-s", "1", *arguments, "--no-metadata").exit_code == 0
        return (tmp_path / "output.png").read_bytes()

    (additions / "broken.safetensors").write_bytes(b"")  # is not in the prompt, so nobody looks
    folder = ["--embedding-dir", str(additions)]
    assert picture("a zzword", *folder) != picture("a zzword")
    assert picture("a zzwords", *folder) == picture("a zzwords")
    assert picture("a fox", "-n", "zzword", *folder) != picture("a fox", "-n", "zzword")


def test_converting(run, tmp_path):
    result = run("convert", str(UNET), "half.safetensors", "--dtype", "bf16")
    assert result.exit_code == 0 and result.stdout == "half.safetensors\n"
    assert "BF16" in run("info", "half.safetensors").stdout
    assert "exists already" in run("convert", str(UNET), "half.safetensors").stderr
    assert run("test", "half.safetensors").exit_code == 1  # a UNet alone is no model
    assert "FAULT: UNet is not supported" in run("test", "half.safetensors").stdout


def test_a_lora_has_no_folder(run, additions, tmp_path):
    result = run("convert", str(additions / "style.safetensors"), "folder")
    assert "found LoRA, which has no folder; choose a target that ends in .safetensors" in result.stderr


def test_files_of_their_own_are_sound(run, additions):
    for name in ("style", "zzword"):
        result = run("test", str(additions / f"{name}.safetensors"))
        assert result.exit_code == 0 and result.stdout.endswith(": ok\n")


def test_files_cannot_command_the_terminal(run, tmp_path):
    metadata = {"ss_output_name": "\x1b]0;owned\x07nice\nunet: forged"}
    layer = "lora_unet_conv_in.lora_"
    matrices = {f"{layer}down.weight": np.ones((2, 4), np.float32), f"{layer}up.weight": np.ones((8, 2), np.float32)}
    save_file(matrices, tmp_path / "a.safetensors", metadata)
    text = run("info", str(tmp_path / "a.safetensors")).stdout
    assert "\x1b" not in text and "\\x1b]0;owned\\x07nice unet: forged" in text


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_terminated_convert_leaves_nothing(tmp_path):
    code = (
        "import os, signal, sd_numba.files.writing as s; old = s._converted; count = [0]\n"
        "def slow(*a):\n count[0] += 1\n count[0] == 3 and os.kill(os.getpid(), signal.SIGTERM)\n return old(*a)\n"
        "s._converted = slow\nfrom sd_numba.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "convert", str(UNET), str(tmp_path / "a.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 143 and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
