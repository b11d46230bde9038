"""Examples of editing a picture with the embedded model, as one image: ``python -m bench.make_examples OUT.jpg``."""

import argparse
import os
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sd_numba.cli import main as sd_numba

HOUSE = "a house in the snow"
# Files, the command lines that make them, and the captions below the pictures.
COMMANDS = {
    "house.png": ([HOUSE, "-s", "3"], f'"{HOUSE}"'),
    "castle.png": (
        ["a castle in the snow", "-i", "house.png", "--strength", "0.7", "-s", "1"],
        "-i house.png\n\"a castle ...\"",
    ),
    "desert.png": (["a house in the desert", "-i", "house.png", "-s", "1"], "-i house.png\n\"... in the desert\""),
    "penguin.png": (
        ["a penguin in the snow", "-i", "house.png", "--mask", "mask.png", "--strength", "1", "-s", "1"],
        "-i house.png --mask\nmask.png \"a penguin ...\"",
    ),
    "street.png": (
        ["houses in the snow", "-i", "house.png", "--expand", "64,0,64,0", "--strength", "1", "-s", "1"],
        "-i house.png --expand 64,0,64,0\n\"houses in the snow\"",
    ),
    "colours.png": (
        ["a {red|green|blue} {car|apple|house}", "-s", "5", "-o", "car.png", "--grid", "colours.png"],
        "\"a {red|green|blue}\n{car|apple|house}\" --grid",
    ),
}  # fmt: skip
SIZE, GAP, TEXT = 160, 10, 40  # pixels


def run(file: str, arguments: list[str]) -> None:
    """Make a picture with the command line."""
    output = [] if "-o" in arguments else ["-o", file]
    sd_numba(["generate", *arguments, *output], standalone_mode=False)


def tile(picture: Image.Image, text: str) -> Image.Image:
    """Return a picture with a caption below it."""
    picture = picture.resize((picture.width * SIZE // picture.height, SIZE), Image.Resampling.LANCZOS)
    found = Image.new("RGB", (picture.width, SIZE + TEXT), "white")
    found.paste(picture, (0, 0))
    ImageDraw.Draw(found).multiline_text((0, SIZE + 4), text, fill="black", font=ImageFont.load_default(12))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What can be done to a picture, as a picture.")
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        mask = Image.new("L", (128, 128))
        ImageDraw.Draw(mask).rectangle((22, 30, 106, 112), fill="white")
        mask.save("mask.png")
        tiles = []
        for file, (arguments, text) in COMMANDS.items():
            run(file, arguments)
            tiles.append(tile(Image.open(file).convert("RGB"), text))
        os.chdir("/")
    sheet = Image.new("RGB", (sum(one.width + GAP for one in tiles) - GAP, SIZE + TEXT), "white")
    left = 0
    for one in tiles:
        sheet.paste(one, (left, 0))
        left += one.width + GAP
    sheet.save(output, optimize=True, quality=90)


if __name__ == "__main__":
    main()
