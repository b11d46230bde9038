"""What the documentation says can be done, is done: commands and scripts run, options exist, the reference is complete.

`.ci/run` runs the commands of the README that make a virtual environment, and builds the site.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

import sd_numba
from bench.make_random_model import write_model
from sd_numba import kernels
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.cli import main
from sd_numba.files.safetensors import read_header
from sd_numba.tools.convert import convert
from tests.families.test_names import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/usage.md", "docs/models.md", "docs/python.md"]
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # of the examples; the embedded one takes its place
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # that the LoRA changes
# Commands of the blocks that are not run here, by how they begin, and why. That their options exist is checked.
NOT_RUN = {
    "python3 -m venv ": "makes an environment: .ci/run runs it",
    "sd-numba download": "fetches gigabytes from the network: tests/checkpoints/test_download.py has a hub of its own",
}
# Sections whose scripts another test runs.
RUN_ELSEWHERE = {"Scripts written for diffusers": "tests/diffusers_api/test_scripts.py"}


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, without those of sections that are run elsewhere."""
    text = (ROOT / page).read_text(encoding="utf-8")
    sections = [s for s in re.split(r"^##+ ", text, flags=re.MULTILINE) if s.split("\n", 1)[0] not in RUN_ELSEWHERE]
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [block for section in sections for block in pattern.findall(section)]


def commands(page: str) -> list[str]:
    """Each command of a page's console blocks, its lines joined, without its comment."""
    text = "".join(blocks(page, "console")).replace("\\\n", " ")
    lines = [re.sub(r"\s+# .*", "", line).strip() for line in text.splitlines()]
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def why_not(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that examples name, made for the embedded model."""
    folder = tmp_path_factory.mktemp("docs")
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((22, 30, 106, 112), fill="white")
    mask.save(folder / "mask.png")
    (folder / "prompts.txt").write_text("a red apple\na fox in the snow\n", encoding="utf-8")
    (unet,) = embedded_model_path().glob("unet/*.safetensors")
    height, width = read_header(unet)[f"{LAYER}.weight"].shape
    pairs = {"lora_up": (height, 4), "lora_down": (4, width)}
    name = f"lora_unet_{LAYER.replace('.', '_')}"
    lora = {f"{name}.{part}.weight": np.full(shape, 0.01, np.float32) for part, shape in pairs.items()}
    save_file(lora, folder / "lcm-lora-sdv1-5.safetensors")
    write_model(folder / "random", FAMILIES["1"])  # the embedded model has no layout of a single file
    list(convert(folder / "random", folder / "model.safetensors"))
    return folder


def run(command: str, folder: Path, page: str) -> None:
    """Run a command in a shell, with this environment's programs; those of `docs/` in two steps, to save time."""
    command = command.replace(MODEL, str(embedded_model_path()))
    if page != "README.md" and " --from " not in command:
        command = command.replace("sd-numba generate", "sd-numba generate --steps 2", 1)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], check=False, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run(page, folder):
    for command in commands(page):
        if why_not(command) is None:
            run(command, folder, page)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_scripts_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    scripts = blocks(page, "python")
    assert scripts
    for script in scripts:
        exec(script, {})


def test_every_reason_is_needed():
    everything = [command for page in PAGES for command in commands(page)]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in everything), start
    for heading, test in RUN_ELSEWHERE.items():
        assert any(f"# {heading}\n" in (ROOT / page).read_text(encoding="utf-8") for page in PAGES), heading
        assert (ROOT / test).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_the_options_of_commands_that_are_not_run_exist(page):
    for command in commands(page):
        if command.startswith("sd-numba") and why_not(command) is not None:
            name, *words = command.removeprefix("sd-numba ").split()
            known = {option for parameter in main.commands[name].params for option in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= known, command


@pytest.mark.parametrize("page", [*PAGES, "docs/performance.md"])
def test_the_options_in_the_text_exist(page):
    known = {option for command in main.commands.values() for parameter in command.params for option in parameter.opts}
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    code = [span for span in re.findall(r"`([^`]+)`", text) if not span.startswith(("python", "pytest", "pip"))]
    found = {option for span in code for option in re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", span)}
    assert found <= known | {"--help"}


def test_the_reference_has_every_public_name():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    named = {
        f"sd_numba.kernels.{name}"
        for line in re.findall(r"^### (`.*)$", pages, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", line)
    }
    named |= set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    public = {f"sd_numba.{name}" for name in sd_numba.__all__ if name != "__version__"}
    assert (public | {f"sd_numba.kernels.{name}" for name in kernels.__all__}) - named == set()


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    assert max(len(line) for line in lines) <= 120
