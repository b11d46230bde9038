"""`sd-numba generate` beyond one picture: pictures to start from, batches, making again, going on, watching."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

from sd_numba import studio
from sd_numba.cli import main, progress
from sd_numba.cli import run as running
from sd_numba.errors import InputError
from sd_numba.generation import state
from sd_numba.recipes import a1111, png

SMALL = ["--steps", "4", "-W", "64", "-H", "64", "-s", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        return CliRunner().invoke(main, ["generate", *map(str, arguments)])

    return invoke


@pytest.fixture
def made(run):
    """Runs a command that has to succeed."""

    def make(*arguments):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        return result

    return make


@pytest.fixture
def inputs(tmp_path):
    """A picture of 64 x 64, and a mask whose right half is white."""
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    ImageDraw.Draw(picture).ellipse((8, 8, 40, 40), fill=(200, 30, 30))
    picture.save(tmp_path / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    return tmp_path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def settings(path):
    return a1111.parse_parameters(png.read_parameters(path)).settings


def error(result):
    """The one line that a command failed with."""
    assert result.exit_code not in {0, 130}, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


# ---- pictures to start from


def test_a_picture_from_a_picture(made, inputs):
    made("a red apple", "-i", "photo.png", *SMALL)
    found = settings("output.png")
    assert found["Denoising strength"] == "0.75" and found["Init image"] == "photo.png" and found["Size"] == "64x64"
    original, strong = pixels("photo.png").astype(float), pixels("output.png").astype(float)
    made("a red apple", "-i", "photo.png", *SMALL, "--strength", "0.25", "-o", "weak.png")
    weak = pixels("weak.png").astype(float)
    assert 0 < np.abs(weak - original).mean() < np.abs(strong - original).mean()


def test_a_batch_opens_its_picture_once_for_planning_and_once_for_making(made, inputs, monkeypatch):
    opened, read = [], studio.open_picture
    monkeypatch.setattr(studio, "open_picture", lambda path: opened.append(path) or read(path))
    made("a red apple", "-i", "photo.png", "--steps", "2", "-s", "1", "-b", "5")
    assert opened == ["photo.png"] * 2
    first = pixels("output-001.png")
    Image.new("RGB", (64, 64)).save(inputs / "photo.png")
    made("a red apple", "-i", "photo.png", "--steps", "2", "-s", "1", "-o", "other.png")
    assert np.abs(pixels("other.png").astype(float) - first).mean() > 10  # not what is remembered of the file before


def test_a_mask_keeps_every_pixel_that_is_black_in_it(made, inputs):
    made("a red apple", "-i", "photo.png", "--mask", "mask.png", *SMALL)
    np.testing.assert_array_equal(pixels("output.png")[:, :32], pixels("photo.png")[:, :32])
    assert np.abs(pixels("output.png")[:, 40:].astype(float) - pixels("photo.png")[:, 40:]).mean() > 5
    assert settings("output.png")["Mask"] == "mask.png"


def test_a_picture_is_expanded_and_stays_as_it_was_inside(made, inputs):
    made("a red apple", "-i", "photo.png", "--expand", "16,0,30,8", "--steps", "4", "-s", "1")
    found = pixels("output.png")
    assert found.shape == (72, 64 + 16 + 32, 3)  # to whole latents
    assert (settings("output.png")["Expand"], settings("output.png")["Size"]) == ("16,0,30,8", "112x72")
    np.testing.assert_array_equal(found[:48, 32:64], pixels("photo.png")[:48, 16:48])


def test_a_picture_of_another_size_and_mode_is_brought_to_the_models(made, tmp_path):
    Image.new("RGBA", (1000, 700), (10, 200, 10, 128)).save(tmp_path / "large.png")
    made("a frog", "-i", "large.png", "--steps", "2", "-s", "1")
    width, height = Image.open(tmp_path / "output.png").size
    assert width % 4 == height % 4 == 0
    assert width / height == pytest.approx(10 / 7, rel=0.05) and width * height == pytest.approx(128**2, rel=0.1)
    made("a frog", "-i", "large.png", "-W", "96", "-H", "64", "--steps", "2", "-s", "1")
    assert Image.open(tmp_path / "output.png").size == (96, 64)


# ---- the same picture again

KINDS = {
    "plain": ["a red apple", "-n", "green"],
    "noisy": ["a red apple", "--sampler", "euler-a", "--rng", "cuda", "--scheduler", "normal"],
    "spaced": ["a red apple", "--sampler", "dpm++2m", "--scheduler", "karras"],
    "ddim": ["a (red:1.2) [apple:pear:0.5] BREAK in the snow", "--sampler", "ddim", "--eta", "0.5", "--clip-skip", "2"],
    "literal": ["a (red:1.2) apple", "--prompt-syntax", "plain"],
    "image": ["a red apple", "-i", "photo.png", "--strength", "0.6"],
    "painted": ["a red apple", "-i", "photo.png", "--mask", "mask.png", "--strength", "1"],
    "expanded": ["a red apple", "-i", "photo.png", "--expand", "0,32,0,0", "-W", "64", "-H", "96"],
    "large": ["a red apple", "--hires", "1.5", "--hires-steps", "6", "--hires-strength", "0.5"],
    "cheap": ["a red apple", "--cfg-interval", "0,0.5", "--cache", "deepcache:2", "--tome", "0.5", "--cfg-scale", "5"],
    "strips": ["a red apple", "--vae-tiling", "on"],
    "bf16": ["a red apple", "--precision", "bf16"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_picture_the_same_picture(made, inputs, kind):
    made(*KINDS[kind][:1], *SMALL, *KINDS[kind][1:], "-t", "2")
    before = (inputs / "output.png").read_bytes()
    result = made("--from", "output.png", "-o", "again.png", "-t", "1")
    assert "Note: output.png" not in result.stderr
    assert (inputs / "again.png").read_bytes() == before


def test_from_a_picture_of_a_batch(made, inputs):
    made("a {red|blue} apple", *SMALL, "-b", "2", "--batch-size", "4", "-o", "x-{n}.png")
    for n in range(1, 5):
        made("--from", f"x-{n}.png", "-o", "again.png")
        assert (inputs / "again.png").read_bytes() == (inputs / f"x-{n}.png").read_bytes()


def test_other_options_change_what_is_made_again(made, tmp_path):
    made("a red apple", *SMALL, "--sampler", "heun")
    made("--from", "output.png", "-p", "a blue car", "--steps", "2", "-s", "9", "-o", "car.png")
    found = a1111.parse_parameters(png.read_parameters("car.png"))
    assert found.prompt == "a blue car"
    assert [found.settings[key] for key in ("Steps", "Seed", "Sampler", "Size")] == ["2", "9", "Heun", "64x64"]


def test_a_picture_of_another_program_is_understood(made, run, tmp_path):
    text = "a (red:1.2) apple\nNegative prompt: dark\nSteps: 5, Sampler: Euler a, CFG scale: 4.5, Seed: 7, Size: 64x96"
    png.save_png(tmp_path / "theirs.png", np.zeros((8, 8, 3), np.uint8), f"{text}, Version: v1.10.1")
    made("--from", "theirs.png")
    wanted = {"Steps": "5", "Sampler": "Euler a", "CFG scale": "4.5", "Seed": "7", "Size": "64x96", "RNG": "NV"}
    assert wanted.items() <= settings("output.png").items()
    assert Image.open(tmp_path / "output.png").size == (64, 96)
    png.save_png(tmp_path / "model.png", np.zeros((8, 8, 3), np.uint8), f"{text}, Model hash: 0123456789, Model: x")
    assert "made with the model x (hash 0123456789)" in error(run("--from", "model.png"))
    png.save_png(tmp_path / "odd.png", np.zeros((8, 8, 3), np.uint8), text.replace("Euler a", "Restart"))
    assert "Sampler 'Restart': not supported, choose with --sampler one of" in error(run("--from", "odd.png"))
    Image.new("RGB", (8, 8)).save(tmp_path / "mute.png")
    assert "mute.png: does not say how it was made" in error(run("--from", "mute.png"))


def test_a_picture_to_start_from_that_has_changed_is_noticed(made, run, inputs):
    made("a red apple", "-i", "photo.png", *SMALL)
    Image.new("RGB", (64, 64)).save(inputs / "photo.png")
    assert "photo.png: has changed since" in error(run("--from", "output.png"))
    made("--from", "output.png", "-i", "photo.png")


# ---- batches


def test_pictures_made_at_the_same_time_are_those_made_one_by_one(made, inputs):
    arguments = ["a {red|green (shiny:1.3), {large|small}} apple", *SMALL, "-n", "dark", "--sampler", "euler-a"]
    made(*arguments, "-o", "one-{n}.png", "-b", "2")
    made(*arguments, "-o", "four-{n}.png", "-b", "2", "--batch-size", "4", "-t", "1")
    for n in range(1, 7):
        assert (inputs / f"one-{n}.png").read_bytes() == (inputs / f"four-{n}.png").read_bytes()


def test_what_is_there_already_is_skipped_unless_it_differs(made, tmp_path):
    arguments = ["a red apple", *SMALL, "-b", "3", "-o", "x-{seed}.png"]
    made(*arguments)
    (tmp_path / "x-2.png").unlink()
    png.save_png(tmp_path / "x-3.png", np.zeros((8, 8, 3), np.uint8), "another\nSteps: 1, Seed: 3, Size: 8x8")
    before = (tmp_path / "x-1.png").stat().st_mtime_ns
    result = made(*arguments)
    assert "x-1.png  exists already; --overwrite remakes it" in result.stdout
    assert "x-2.png  (seed 2)" in result.stdout and "x-3.png  (seed 3)" in result.stdout
    assert (tmp_path / "x-1.png").stat().st_mtime_ns == before
    result = made(*arguments, "--overwrite")
    assert "already" not in result.stdout
    assert (tmp_path / "x-1.png").stat().st_mtime_ns > before
    assert made(*arguments).stdout.count("already") == 3


def test_a_contact_sheet_has_a_row_for_every_prompt(made, tmp_path):
    made("a {red|blue} apple", *SMALL, "-b", "3", "-o", "x.png", "--grid", "sheet.png")
    sheet = pixels("sheet.png")
    assert sheet.shape == (2 * 64 + 4, 3 * 64 + 2 * 4, 3)
    np.testing.assert_array_equal(sheet[68:, :64], pixels("x-004.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png", *(f"x-{n:03}.png" for n in range(1, 7))]


def test_a_file_of_prompts_with_settings(made, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,seed,steps,size,output\na fox,5,,,fox.png\na {cat|dog},6,3,96x64,\n")
    result = made("--prompt-file", "prompts.csv", *SMALL)
    assert result.stdout.splitlines() == ["fox.png  (seed 5)", "output-002.png  (seed 6)", "output-003.png  (seed 6)"]
    assert settings("fox.png")["Steps"] == "4" and settings("output-002.png")["Steps"] == "3"
    assert Image.open("output-003.png").size == (96, 64)
    (tmp_path / "prompts.txt").write_text("# two\na fox\n\na hen\n")
    assert made("--prompt-file", "prompts.txt", *SMALL, "-o", "%02d.png").stdout.count("seed 1") == 2


# ---- stopping and going on


def stop_after(monkeypatch, steps):
    """Press Ctrl-C after so many steps."""
    seen, see = [], progress.Keeper.see

    def press(self, step, expected):
        see(self, step, expected)
        seen.append(step)
        if len(seen) == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.Keeper, "see", press)


STOPS = {
    "plain": (["a red apple"], 2),
    "multistep": (["a red apple", "--sampler", "unipc"], 3),
    "two-calls": (["a red apple", "--sampler", "heun"], 3),
    "noisy": (["a [red|blue] apple", "--sampler", "euler-a", "--rng", "cuda"], 1),
    "many-calls": (["a red apple", "--sampler", "pndm", "--steps", "6"], 4),
    "sde": (["a red apple", "--sampler", "dpm++2m-sde"], 3),
    "last-step": (["a red apple"], 4),
    "batch": (["a {red|blue} apple", "-b", "2", "--batch-size", "2", "-o", "output-{n}.png"], 6),
    "large": (["a red apple", "--hires", "1.5"], 5),
    "painted": (["a red apple", "-i", "photo.png", "--mask", "mask.png", "--strength", "0.8", "--sampler", "lcm"], 2),
    "cheap": (["a red apple", "--cfg-interval", "0,0.6", "--cache", "deepcache:3", "--tome", "0.5"], 2),
}


@pytest.mark.parametrize("kind", STOPS)
def test_a_run_that_was_stopped_goes_on_with_the_same_pixels(made, run, inputs, monkeypatch, kind):
    arguments, steps = STOPS[kind]
    made(arguments[0], *SMALL, *arguments[1:])
    names = sorted(path.name for path in inputs.glob("output*.png"))
    whole = {name: (inputs / name).read_bytes() for name in names}
    for name in names:
        (inputs / name).unlink()
    with monkeypatch.context() as patched:
        stop_after(patched, steps)
        result = run(arguments[0], *SMALL, *arguments[1:])
    kept = f"{names[0]}.state"
    assert result.exit_code == 130
    assert f"stopped by Ctrl-C; continue with: sd-numba generate --resume {kept}" in result.stderr
    with monkeypatch.context() as patched:  # and again
        stop_after(patched, 1)
        assert run("--resume", kept).exit_code == (0 if kind == "last-step" else 130)
    if kind != "last-step":
        made("--resume", kept, "-t", "1")
    assert {name: (inputs / name).read_bytes() for name in names} == whole
    assert not list(inputs.glob("*.state")) and not list(inputs.glob(".*"))


def test_a_run_that_is_stopped_again_before_its_first_step_keeps_what_there_is(made, run, tmp_path, monkeypatch):
    arguments = ["a red apple", *SMALL, "-b", "2"]
    made(*arguments)
    whole = (tmp_path / "output-002.png").read_bytes()
    with monkeypatch.context() as patched:
        stop_after(patched, 7)  # of the second picture's, three
        run(*arguments, "--overwrite")
    kept = tmp_path / "output-001.png.state"

    def press(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(running, "watch", press)
        result = run("--resume", kept)
    assert result.exit_code == 130 and f"continue with: sd-numba generate --resume {kept}" in result.stderr
    tree, about = state.load_state(kept)
    assert (tree["call"], about["done"]) == (3, 1)
    made("--resume", kept)
    assert (tmp_path / "output-002.png").read_bytes() == whole


def test_the_state_is_that_of_the_step_just_made(made, tmp_path, monkeypatch):
    calls, see = [], progress.Keeper.see

    def look(self, step, expected):
        see(self, step, expected)
        tree, about = state.load_state(self.path)
        calls.append((tree["call"], about["done"]))

    monkeypatch.setattr(progress.Keeper, "see", look)
    made("a red apple", *SMALL, "-b", "2", "--state", "run.state")
    assert calls == [(call, done) for done in (0, 1) for call in (1, 2, 3, 4)]
    assert not (tmp_path / "run.state").exists()


def test_work_of_less_than_a_minute_keeps_no_state(made, tmp_path, monkeypatch):
    written, save = [], progress.save_state
    monkeypatch.setattr(progress, "save_state", lambda path, *rest: written.append(path) or save(path, *rest))
    made("a red apple", *SMALL)
    assert written == []
    monkeypatch.setattr(progress, "LONG", 0)
    made("a red apple", *SMALL)
    assert [path.name for path in written] == ["output.png.state"] * 5  # the last one is of the picture being saved
    assert [path.name for path in tmp_path.iterdir()] == ["output.png"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_killed_goes_on(made, inputs, sent):
    arguments = ["a red apple", "--steps", "60", "-s", "3", "--sampler", "dpm++2m-sde"]
    made(*arguments)
    whole = (inputs / "output.png").read_bytes()
    (inputs / "output.png").unlink()
    program = [sys.executable, "-m", "sd_numba", "generate", *arguments, "--state", "run.state"]
    path = os.pathsep.join([os.getcwd(), *sys.path])
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while not (inputs / "run.state").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert "Traceback" not in errors
    if sent != signal.SIGKILL:
        assert "continue with: sd-numba generate --resume run.state" in errors
    assert not (inputs / "output.png").exists()
    made("--resume", "run.state")
    assert (inputs / "output.png").read_bytes() == whole


def test_info_knows_a_state(run, made, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        run("a red apple", *SMALL, "-b", "3")
    result = CliRunner().invoke(main, ["info", "output-001.png.state"])
    assert result.stdout == (
        "state of a run that was stopped: 1 of 3 pictures made; continue it with: "
        "sd-numba generate --resume output-001.png.state\n"
    )
    assert (
        "Note: output-001.png.state holds an unfinished run; continue it with --resume output-001.png.state"
        in made("a fox", *SMALL, "-b", "3").stderr
    )


def test_variants_are_not_for_prompts_that_are_literal(made, tmp_path):
    made("a {red|blue} apple", *SMALL, "--prompt-syntax", "plain")
    assert png.read_parameters("output.png").startswith("a {red|blue} apple\n")


def test_what_cannot_be_gone_on_with(run, made, inputs, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        run("a red apple", "-i", "photo.png", *SMALL)
    kept = "output.png.state"
    assert "--resume: --steps cannot be given as well" in error(run("--resume", kept, "--steps", "9"))
    assert "photo.png: not the state of a run" in error(run("--resume", "photo.png"))
    assert "nothing.state" in error(run("--resume", "nothing.state"))
    tree, about = state.load_state(kept)
    for change, words in [
        ({"kind": "dreaming"}, "the state was written by 'dreaming', not by sd-numba generate"),
        ({"jobs": 7}, "not a state that sd-numba generate can continue: 'int' object"),
        ({"jobs": [{**about["jobs"][0], "recipe": {"prompt": 5}}]}, "prompt: found 5, expected a text"),
        ({"done": 2}, "done: found 2, expected a whole number from 0 to 1"),
        ({"settings": {}}, "not a state that sd-numba generate can continue: 'model' is missing"),
    ]:
        state.save_state("changed.state", tree, {**about, **change})
        assert words in error(run("--resume", "changed.state"))
    for change in ({"x": tree["x"][:, :, :-1]}, {"call": 9}, {"call": -1}):
        state.save_state("changed.state", {**tree, **change}, about)
        result = run("--resume", "changed.state")
        assert result.exit_code == 1 and "Traceback" not in result.stderr
        assert "it belongs to another run" in result.stderr.splitlines()[-1]
    recipe = {**about["jobs"][0]["recipe"], "model_hash": "0123456789"}
    state.save_state("changed.state", tree, {**about, "jobs": [{**about["jobs"][0], "recipe": recipe}]})
    assert "the model emoji-world has changed since" in error(run("--resume", "changed.state"))
    (inputs / "photo.png").write_bytes((inputs / "mask.png").read_bytes())
    assert "photo.png: has changed since" in error(run("--resume", kept))


def test_a_full_disk_stops_neither_the_run_nor_the_picture(made, tmp_path, monkeypatch):
    def fail(path, *rest):
        raise InputError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(progress, "save_state", fail)
    result = made("a red apple", *SMALL, "--state", "run.state")
    assert result.stderr.count("the state of the run cannot be saved: run.state: cannot be written: No space left") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["output.png"]


# ---- watching


def test_previews_show_the_picture_come_about(made, tmp_path, monkeypatch):
    shown, save = [], progress.save_png

    def look(path, picture, **how):
        shown.append(np.asarray(picture).astype(float))
        save(path, picture, **how)

    monkeypatch.setattr(progress, "save_png", look)
    made("a red apple", "--steps", "8", "-s", "1", "--preview", "proj", "--preview-interval", "3")
    assert len(shown) == 3  # after steps 3, 6 and 8
    picture = pixels("output.png").astype(float)
    assert all(preview.shape == picture.shape for preview in shown)
    far = [np.sqrt(np.mean((preview - picture) ** 2)) for preview in shown]
    assert far[-1] < far[0] and far[-1] < 25
    np.testing.assert_array_equal(pixels("preview.png"), shown[-1])


def test_the_preview_of_a_batch_shows_all_of_it(made, tmp_path):
    made("a red apple", *SMALL, "-b", "4", "--batch-size", "4", "--preview", "proj", "--preview-path", "p.png")
    assert Image.open("p.png").size == (2 * 64 + 4, 2 * 64 + 4)


def test_the_pace_is_said_with_the_peak_of_memory(made):
    result = made("a red apple", *SMALL)
    assert re.search(r"^4 steps, \d+\.\d\d s/it, peak memory \d+\.\d\d GB$", result.stderr, re.MULTILINE)


def test_long_times_are_said_in_hours():
    assert progress._pace((100.0, 3 * 3600 + 61.4)).startswith("100.00 s/it, 3:01:01 left")
    assert progress._pace((1.5, 59.6)).startswith("1.50 s/it, 1:00 left")


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "none.png"], "none.png: no such file"),
        (["-i", "text.txt"], "text.txt: not a picture in a known format"),
        (["-i", "."], "is a folder, not a picture"),
        (["--mask", "mask.png"], "--mask needs --init-img as well"),
        (["--strength", "0.5"], "--strength needs --init-img as well"),
        (["--expand", "8,8,8,8"], "--expand needs --init-img as well"),
        (["-i", "photo.png", "--mask", "none.png"], "none.png: no such file"),
        (["-i", "photo.png", "--strength", "1.5"], "--strength: found 1.5, expected a number from 0 to 1"),
        (["-i", "photo.png", "--strength", "nan"], "--strength: found nan, expected a number"),
        (["-i", "photo.png", "--strength", "0.1"], "a strength of 0.1 runs less than one of 4 steps"),
        (["-i", "photo.png", "--expand", "-8,0,0,0"], "--expand: found -8, expected a whole number from 0 to 4096"),
        (["-i", "photo.png", "--expand", "99999,0,0,0"], "--expand: found 99999"),
        (
            ["-i", "photo.png", "--hires", "2"],
            "--hires and -i exclude each other; --width and --height enlarge",
        ),
        (["-W", "66"], "-W: found 66, expected a multiple of 4, such as 64 or 68"),
        (["--hires", "0.5"], "--hires: found 0.5, expected a number from 1 to 16"),
        (["--hires", "nan"], "--hires: found nan"),
        (
            ["--hires", "2", "--hires-steps", "-1"],
            "--hires-steps: found -1, expected a whole number of at",
        ),
        (["--hires", "2", "--hires-strength", "7"], "--hires-strength: found 7.0, expected a number from 0 to 1"),
        (["--cfg-interval", "0.8,0.2"], "--cfg-interval: found (0.8, 0.2), expected the smaller number first"),
        (["--cfg-interval", "0,2"], "--cfg-interval: found 2.0, expected a number from 0 to 1"),
        (["--cache", "deepcache"], "--cache: found 'deepcache', expected deepcache:N"),
        (["--cache", "deepcache:0"], "--cache: found 'deepcache:0'"),
        (["--tome", "0.9"], "--tome: found 0.9, expected a number from 0 to 0.75"),
        (["--clip-skip", "0"], "--clip-skip: found 0, expected a whole number from 1 to"),
        (["--clip-skip", "99"], "--clip-skip: found 99, expected a whole number from 1 to 4"),
        (["-b", "0"], "-b: found 0, expected a whole number from 1 to 10000"),
        (["--batch-size", "0"], "--batch-size: found 0"),
        (["-b", "2", "-o", "x.jpg"], "choose a name that ends in .png"),
        (["--grid", "nowhere/x.png"], "its folder nowhere does not exist"),
        (["--preview", "tae"], "preview tae: found no tiny autoencoder; give one with --taesd"),
        (["--preview", "proj", "--preview-path", "nowhere/x.png"], "its folder nowhere does not exist"),
        (["--preview-interval", "0"], "--preview-interval: found 0"),
        (["--from", "none.png"], "none.png: no such file"),
        (["--resume", "none.state"], "--resume: --steps cannot be given as well"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, inputs, arguments, words):
    (inputs / "text.txt").write_text("a red apple")
    before = sorted(os.listdir(inputs))
    assert words in error(run("a red apple", "--steps", "4", "-s", "1", *arguments))
    assert sorted(os.listdir(inputs)) == before


def test_prompts_that_do_not_fit_together(run, made, tmp_path):
    (tmp_path / "p.txt").write_text("a fox")
    assert "a prompt and --prompt-file exclude each other" in run("a cat", "--prompt-file", "p.txt").stderr
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a fox", "steps": "many"}]))
    assert "p.json: prompt 1: steps: found 'many', expected a whole number" in error(run("--prompt-file", "p.json"))
    (tmp_path / "p.json").write_text(
        json.dumps([{"prompt": "a", "output": "x.png"}, {"prompt": "b", "output": "x.png"}])
    )
    assert "output: two pictures have the same file name x.png" in error(run("--prompt-file", "p.json", *SMALL))
    assert "more than 10,000 pictures" in error(run("{a|b}", *SMALL, "-b", "9000"))


def test_options_that_go_beside_a_stopped_run_exist():
    module = importlib.import_module("sd_numba.cli.generate")
    assert {parameter.name for parameter in module.generate.params} > module.HOW
