"""Train text encoder and UNet together: ``python -m training.denoiser [--out training/data/model]``.

Method: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, section 3;
with the velocity as target: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models",
arXiv:2202.00512, appendix D; without a caption now and then, for guidance: Ho and Salimans, "Classifier-Free Diffusion
Guidance", arXiv:2207.12598.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPTextModel

from sd_numba.prompts.tokenizer import Tokenizer
from sd_numba.samplers.schedule import NoiseSchedule

from .art import Art
from .autoencoder import encode
from .compose import Composer
from .dataset import Dataset
from .loop import Plan, train
from .networks import SCHEDULE, STEPS, make_text_encoder, make_unet, save_network, save_settings
from .options import add_inputs

DROPPED = 0.12  # share of captions that are dropped
ENCODED_AT_ONCE = 512
SAVE_EVERY = 240.0  # seconds


class Diffusion:
    """The loss of text encoder and UNet."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, empty: torch.Tensor):
        self.text_encoder, self.unet, self.empty = text_encoder, unet, empty
        alphas = torch.tensor(NoiseSchedule.from_config(SCHEDULE).alphas_cumprod, dtype=torch.float32)
        self._signal, self._noise = (level.sqrt().to(empty.device) for level in (alphas, 1 - alphas))

    def loss(
        self, latents: torch.Tensor, ids: torch.Tensor, steps: torch.Tensor, eps: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean square error of the velocity.

        Parameters
        ----------
        latents, eps
            What was encoded, and normally distributed noise: ``(n, 4, h, w)``.
        ids
            Captions ``(n, 77)``.
        steps
            Of the noise schedule, ``(n,)``.
        dropped
            ``(n,)``: whether to leave out the caption.
        """
        context = self.text_encoder(input_ids=torch.where(dropped[:, None], self.empty, ids).long())[0]
        signal, noise = (level[steps].view(-1, 1, 1, 1) for level in (self._signal, self._noise))
        latents = latents.float()
        noisy = (signal * latents + noise * eps).contiguous(memory_format=torch.channels_last)
        velocity = self.unet(noisy, steps, context, return_dict=False)[0]
        return functional.mse_loss(velocity.float(), signal * eps - noise * latents)


@torch.no_grad()
def encode_dataset(
    autoencoder: AutoencoderKL, composer: Composer, dataset: Dataset, device: torch.device
) -> torch.Tensor:
    """Paint and encode all compositions: scaled latents ``(n, 4, h, w)`` in bfloat16, on the device."""
    on_gpu = device.type == "cuda"
    encoder = torch.compile(encode, dynamic=False) if on_gpu else encode
    scale, parts = autoencoder.config.scaling_factor, []
    for start in range(0, len(dataset.items), ENCODED_AT_ONCE):
        some = slice(start, start + ENCODED_AT_ONCE)
        items, backgrounds = (torch.from_numpy(rows[some]).to(device) for rows in (dataset.items, dataset.backgrounds))
        pictures = composer(items, backgrounds).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            whole = len(pictures) == ENCODED_AT_ONCE
            parts.append((scale * (encoder if whole else encode)(autoencoder, pictures)).bfloat16())
    return torch.cat(parts)


class Batches:
    """Fills the inputs of the loss: every composition once in each epoch, in a new order each time."""

    def __init__(self, latents: torch.Tensor, ids: np.ndarray, size: int):
        device = latents.device
        self._latents, self._ids, self._size = latents, torch.from_numpy(ids).to(device), size
        self._order, self._next = torch.empty(0, dtype=torch.long), 0
        self.inputs = {
            "latents": torch.zeros_like(latents[:size]),
            "ids": torch.zeros_like(self._ids[:size]),
            "steps": torch.zeros(size, dtype=torch.long, device=device),
            "eps": torch.zeros(latents[:size].shape, device=device),
            "dropped": torch.zeros(size, dtype=torch.bool, device=device),
        }

    def feed(self) -> None:
        """Load the next batch, with timesteps spread evenly over the schedule."""
        if self._next + self._size > len(self._order):
            self._order, self._next = torch.randperm(len(self._latents), device=self._latents.device), 0
        rows = self._order[self._next : self._next + self._size]
        self._next += self._size
        inputs, size = self.inputs, self._size
        inputs["latents"].copy_(self._latents[rows])
        inputs["ids"].copy_(self._ids[rows])
        inputs["eps"].normal_()
        places = torch.arange(size, device=rows.device) + torch.rand(size, device=rows.device)
        inputs["steps"].copy_((places * (STEPS / size)).long().clamp_(max=STEPS - 1))
        inputs["dropped"].copy_(torch.rand(size, device=rows.device) < DROPPED)


def train_denoiser(
    latents: torch.Tensor,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    plan: Plan,
    size: int,
    save: Callable[[CLIPTextModel, UNet2DConditionModel], None],
    report_every: int = 500,
) -> None:
    """Train both networks from scratch, in batches of `size`, and save them from time to time."""
    device = latents.device
    text_encoder = make_text_encoder(tokenizer.vocab_size).to(device)
    unet = make_unet().to(device, memory_format=torch.channels_last)
    diffusion = Diffusion(text_encoder, unet, torch.from_numpy(tokenizer("").astype(np.int16)).to(device))
    batches = Batches(latents, ids, size)
    modules = {"text_encoder": text_encoder, "unet": unet}
    saved = time.perf_counter()
    for _ in train(diffusion.loss, batches.inputs, batches.feed, modules, plan, report_every):
        if time.perf_counter() - saved > SAVE_EVERY:
            save(text_encoder, unet)
            saved = time.perf_counter()
    save(text_encoder, unet)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train text encoder and UNet; the autoencoder must be there.")
    add_inputs(parser, "--art", "--tokenizer", "--dataset")
    parser.add_argument("--steps", type=int, default=25_680)
    parser.add_argument("--minutes", type=float, default=600.0, help="at most")
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="for matrices")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("training/data/model"), help="with the autoencoder in vae/")
    arguments = parser.parse_args()
    if not (arguments.out / "vae").exists():
        parser.error(f"{arguments.out / 'vae'}: not there; python -m training.autoencoder makes it")
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    device, out = torch.device(arguments.device), arguments.out
    autoencoder = AutoencoderKL.from_pretrained(out / "vae").to(device, memory_format=torch.channels_last)
    dataset = Dataset.load(arguments.dataset)
    start = time.perf_counter()
    latents = encode_dataset(autoencoder, Composer(Art.load(arguments.art), device), dataset, device)
    taken, deviation = time.perf_counter() - start, latents[:4096].float().std().item()
    print(f"encoded {len(latents)} pictures in {taken:.0f} s, deviation {deviation:.3f}", flush=True)
    plan = Plan(arguments.steps, arguments.minutes, arguments.rate, muon=arguments.optimizer == "muon")

    def save(text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        save_network(text_encoder, out / "text_encoder")
        save_network(unet, out / "unet")
        save_settings(out, arguments.tokenizer)

    train_denoiser(latents, dataset.ids, Tokenizer.from_folder(arguments.tokenizer), plan, arguments.batch, save)


if __name__ == "__main__":
    main()
