"""Train the autoencoder: ``python -m training.autoencoder [--out training/data/model]``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from .art import SIZE, Art
from .compose import Composer
from .dataset import Dataset
from .loop import Plan, train
from .networks import CHANNELS, FACTOR, SCALING_FACTOR, make_autoencoder, save_network
from .options import add_inputs

NOISE = 0.1  # most noise on latents, as a share of their deviation: the decoder learns to tolerate the UNet's errors
KL_WEIGHT = 5e-4
MEASURED = 4096  # pictures, for the statistics of latents


def autoencoder_loss(
    autoencoder: AutoencoderKL, pictures: torch.Tensor, eps: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Return the loss of reconstructed pictures: the differences of pixels, of edges and of half-size copies.

    Parameters
    ----------
    autoencoder
        The network.
    pictures
        ``(n, 3, h, w)`` in -1 to 1.
    eps
        Normally distributed, of the latents' shape.
    noise
        ``(n,)``: how much noise to add to the latents, as a share of their deviation.
    """
    mean, log_variance = autoencoder.quant_conv(autoencoder.encoder(pictures)).float().chunk(2, 1)
    log_variance = log_variance.clamp(-20, 10)
    added = noise.view(-1, 1, 1, 1) * mean.detach().std((0, 2, 3), keepdim=True)
    latents = mean + eps * (log_variance.exp() + added**2).sqrt()
    difference = autoencoder.decoder(autoencoder.post_quant_conv(latents)).float() - pictures
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    halves = functional.avg_pool2d(difference, 2).abs().mean()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    own = difference.abs().mean() + 2 * (difference**2).mean()
    return own + 0.5 * edges + 0.5 * halves + KL_WEIGHT * kl


@torch.no_grad()
def normalise_latents(autoencoder: AutoencoderKL, pictures: list[torch.Tensor]) -> None:
    """Give every channel of the latents mean 0 and, times the scaling factor, deviation 1, without other changes.

    The statistics are of the pictures in batches; they go into the 1x1 convolutions around the bottleneck.
    """
    latents = torch.cat([encode(autoencoder, batch) for batch in pictures])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    scale = 1 / (SCALING_FACTOR * deviation)
    inward, outward = autoencoder.quant_conv, autoencoder.post_quant_conv
    inward.weight[:CHANNELS] *= scale.view(-1, 1, 1, 1)
    inward.bias[:CHANNELS] = (inward.bias[:CHANNELS] - mean) * scale
    inward.bias[CHANNELS:] += 2 * scale.log()
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight /= scale.view(1, -1, 1, 1)


def encode(autoencoder: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Return the means of latents, unscaled."""
    return autoencoder.quant_conv(autoencoder.encoder(pictures))[:, :CHANNELS].float()


def psnr(autoencoder: AutoencoderKL, pictures: list[torch.Tensor]) -> float:
    """Return the mean PSNR in dB of reconstructed pictures."""
    values = []
    for batch in pictures:
        decoded = autoencoder.decoder(autoencoder.post_quant_conv(encode(autoencoder, batch))).clamp(-1, 1)
        values.append(-10 * torch.log10(((decoded - batch) / 2).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


def train_autoencoder(
    composer: Composer, dataset: Dataset, plan: Plan, batch: int, device: torch.device
) -> AutoencoderKL:
    """Train the autoencoder from scratch."""
    autoencoder = make_autoencoder().to(device, memory_format=torch.channels_last)
    items, backgrounds = (torch.from_numpy(rows).to(device) for rows in (dataset.items, dataset.backgrounds))
    side = SIZE // FACTOR
    inputs = {
        "pictures": torch.zeros(batch, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last),
        "eps": torch.zeros(batch, CHANNELS, side, side, device=device),
        "noise": torch.zeros(batch, device=device),
    }

    def feed() -> None:
        rows = torch.randint(len(items), (batch,), device=device)
        inputs["pictures"].copy_(composer(items[rows], backgrounds[rows]))
        inputs["eps"].normal_()
        inputs["noise"].uniform_(0, NOISE)

    def loss(**values: torch.Tensor) -> torch.Tensor:
        return autoencoder_loss(autoencoder, **values)

    for _ in train(loss, inputs, feed, {"vae": autoencoder}, plan):
        pass
    count = min(MEASURED, len(items))
    starts = range(0, count, batch)
    pictures = [composer(items[s : s + batch], backgrounds[s : s + batch]) for s in starts]
    normalise_latents(autoencoder, pictures)
    with torch.no_grad():
        print(f"PSNR {psnr(autoencoder, pictures):.2f} dB", flush=True)
    return autoencoder


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train the autoencoder.")
    add_inputs(parser, "--art", "--dataset")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=60.0, help="at most")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rate", type=float, default=1.2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("training/data/model"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    plan = Plan(arguments.steps, arguments.minutes, arguments.rate, floor=0.0, warmup=200, average=0.999, muon=False)
    device = torch.device(arguments.device)
    composer, dataset = Composer(Art.load(arguments.art), device), Dataset.load(arguments.dataset)
    save_network(train_autoencoder(composer, dataset, plan, arguments.batch, device), arguments.out / "vae")


if __name__ == "__main__":
    main()
