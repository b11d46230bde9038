"""Make a grid of pictures by the embedded model, one for each of its prompts: ``python -m bench.make_grid OUT.jpg``."""

import argparse
from pathlib import Path

from PIL import Image

from sd_numba import StableDiffusionPipeline
from sd_numba.checkpoints.opening import embedded_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description="A grid of the pictures that the embedded model makes.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=72, help="how many of the prompts")
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="the same for all")
    arguments = parser.parse_args()

    prompts = (embedded_model_path() / "prompts.txt").read_text(encoding="utf-8").splitlines()[: arguments.count]
    pipe = StableDiffusionPipeline.from_pretrained()
    height, width = pipe.default_size
    rows = -(-len(prompts) // arguments.columns)
    grid = Image.new("RGB", (width * arguments.columns, height * rows), "white")
    for index, prompt in enumerate(prompts):
        picture = pipe(prompt, seed=arguments.seed).images[0]
        grid.paste(picture, (index % arguments.columns * width, index // arguments.columns * height))
    grid.save(arguments.output, optimize=True, quality=90)


if __name__ == "__main__":
    main()
