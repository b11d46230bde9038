"""Fit the colours of `sd_numba.pictures.preview` to a model: ``python -m bench.fit_preview [MODEL] [--count 72]``.

MODEL, by default the embedded one, draws prompts of the embedded model's list. Decoded pictures, averaged over the
pixels of each latent pixel, are fitted by least squares as a linear function of the latents, smoothed as previews are.
Prints the rows for ``_latent_rgb_factors`` in the ``config.json`` of the model's VAE, and how much of the variance of
the colours they explain: those fitted to every other picture, in the rest of them, also without smoothing.
"""

from __future__ import annotations

import argparse

import numpy as np

from sd_numba import StableDiffusionPipeline
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.pictures.preview import smooth


def draw(pipe: StableDiffusionPipeline, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents ``(b, h, w, c)`` of pictures of these prompts, and their colours ``(b, h, w, 3)``."""
    latents = np.concatenate([pipe(prompt, seed=0, output_type="latent").images for prompt in prompts])
    pictures = np.concatenate([pipe.decode(latents[i : i + 1]) for i in range(len(latents))])
    b, _, h, w = latents.shape
    cells = pictures.reshape(b, h, pipe.vae.factor, w, pipe.vae.factor, 3)
    return np.moveaxis(latents, 1, -1), cells.mean((2, 4))


def fit(latents: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return the least-squares factors, a row for each channel and the bias."""
    return np.linalg.lstsq(_with_one(latents).reshape(-1, latents.shape[-1] + 1), colours.reshape(-1, 3), rcond=None)[0]


def explained(latents: np.ndarray, colours: np.ndarray, factors: np.ndarray) -> float:
    """Return the share of the colours' variance that the factors explain (R^2)."""
    left = np.square(colours - _with_one(latents) @ factors).sum()
    return 1 - left / np.square(colours - colours.mean((0, 1, 2))).sum()


def _with_one(latents: np.ndarray) -> np.ndarray:
    return np.concatenate([latents, np.ones_like(latents[..., :1])], axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit the colours of previews to a model.")
    parser.add_argument("model", nargs="?", help="by default the embedded one")
    parser.add_argument("--count", type=int, default=72, help="how many prompts of the embedded model's list")
    arguments = parser.parse_args()

    prompts = (embedded_model_path() / "prompts.txt").read_text(encoding="utf-8").splitlines()[: arguments.count]
    latents, colours = draw(StableDiffusionPipeline.from_pretrained(arguments.model), prompts)
    smoothed = smooth(latents)
    for name, x in (("plain", latents), ("smoothed", smoothed)):
        print(f"R^2, {name}: {explained(x[1::2], colours[1::2], fit(x[::2], colours[::2])):.3f}")
    for row in fit(smoothed, colours).tolist():
        print([round(value, 4) for value in row])


if __name__ == "__main__":
    main()
