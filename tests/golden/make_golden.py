"""Make the golden files of the networks, the tokenizer and whole pictures with diffusers and transformers.

For developers only; the tests need neither. From the repository's root, in an environment of its own:

    pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 tokenizers numpy safetensors
    python tests/golden/make_golden.py [CASE ...]

Networks run in float64 (over weights rounded to float32), so that what is stored is exact to the last float32 digit
and a test measures the error of our side alone. Samplers run as diffusers runs them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# After transformers: it would take our ``kernels`` for the package of that name on PyPI, and import it to make sure,
# which fails where Numba is not installed.
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.make_random_model import random_tensor, write_tokenizer  # noqa: E402
from tests.golden.cases import (  # noqa: E402
    CASES,
    EMBEDDED,
    GOLDEN,
    IMAGE_CASES,
    IMAGES,
    INPAINTING_MODEL,
    PROMPTS,
    SAMPLERS,
    STOCHASTIC,
    TINY,
    TOKENIZERS,
    Case,
    ImageCase,
)

PIPELINES = {
    "txt2img": diffusers.StableDiffusionPipeline,
    "img2img": diffusers.StableDiffusionImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionInpaintPipeline,
}


def fill(module: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
    """Give a module the random weights of its tensors' names, in float64."""
    state = {
        name: torch.from_numpy(random_tensor(prefix + name, tuple(tensor.shape))).double()
        for name, tensor in module.state_dict().items()
        if not name.endswith("position_ids")
    }
    module.double().load_state_dict(state)
    return module.eval()


def networks(case: Case) -> dict[str, Any]:
    """The three random networks of a case."""
    text_encoder = CLIPTextModel(CLIPTextConfig(**case.text_encoder))
    # Newer versions of transformers leave the prefix out.
    prefix = "" if next(iter(text_encoder.state_dict())).startswith("text_model.") else "text_model."
    return {
        "text_encoder": fill(text_encoder, prefix),
        "unet": fill(diffusers.UNet2DConditionModel.from_config(case.unet)),
        "vae": fill(diffusers.AutoencoderKL.from_config(case.vae)),
    }


def run_networks(case: Case, parts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each network makes of the case's inputs."""
    text_encoder, unet, vae = parts["text_encoder"], parts["unet"], parts["vae"]
    sample, context = torch.from_numpy(case.sample()).double(), torch.from_numpy(case.context()).double()
    moments = vae.encode(torch.from_numpy(case.image()).double()).latent_dist
    results = {
        "text_encoder": text_encoder(torch.from_numpy(case.ids())).last_hidden_state,
        "vae_decode": vae.decode(torch.from_numpy(case.latents()).double()).sample,
        "vae_encode": moments.mean,
        "vae_encode_std": moments.std,
    }
    for timestep in case.timesteps:
        results[f"unet_{timestep}"] = unet(sample, torch.tensor(timestep), context).sample
    return results


def pipeline(
    parts: dict[str, Any], tokenizer: Any, scheduler_config: dict[str, Any], sampler: str, kind: str = "txt2img"
) -> Any:
    """A pipeline of diffusers with the scheduler of that name."""
    name, options = (SAMPLERS | STOCHASTIC)[sampler]
    scheduler = getattr(diffusers, name).from_config(scheduler_config, **options)
    written = dict(scheduler.config)
    pipe = PIPELINES[kind](
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # The pipeline changes a steps_offset of 0 to 1, and clip_sample to false; here, what is written holds.
    scheduler.register_to_config(**written)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents to pictures ``(b, h, w, 3)`` in [0, 1], as the pipeline does it."""
    image = vae.decode(latents / vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def run_pipelines(case: Case, parts: dict[str, Any], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Final latents of every sampler of a case, and the pictures of the first."""
    results = {}
    for sampler in case.samplers:
        results[f"latents_{sampler}"] = pipeline(parts, tokenizer, case.scheduler, sampler)(
            list(case.prompts),
            negative_prompt=[case.negative_prompt] * len(case.prompts),
            latents=torch.from_numpy(case.noise()).double(),
            num_inference_steps=case.steps,
            guidance_scale=case.guidance_scale,
            output_type="latent",
        ).images
    results["images"] = decode(parts["vae"], results[f"latents_{case.samplers[0]}"])
    return results


def make_case(case: Case) -> None:
    """Write the golden file of a miniature model."""
    parts = networks(case)
    save(case.path, run_networks(case, parts) | run_pipelines(case, parts, tokenizer_of(case)))


def tokenizer_of(case: Case) -> CLIPTokenizer:
    """The made-up tokenizer of a case."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "tokenizer", case.text_encoder["vocab_size"], case.pad_token)
        return CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")


def open_embedded() -> tuple[dict[str, Any], CLIPTokenizer, dict[str, Any]]:
    """Networks, tokenizer and scheduler config of the embedded model."""
    folder = EMBEDDED.folder
    parts = {
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder").double().eval(),
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").double().eval(),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae").double().eval(),
    }
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return parts, CLIPTokenizer.from_pretrained(folder / "tokenizer"), config


def make_embedded() -> None:
    """Write the golden file of the embedded model: torch's own noise, its own tokenizer."""
    parts, tokenizer, config = open_embedded()
    size = parts["unet"].config.sample_size
    ids = tokenizer([EMBEDDED.prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
    encoded = parts["text_encoder"](ids, output_hidden_states=True)
    results = {
        "text_encoder": encoded.last_hidden_state,
        "text_encoder_skip": parts["text_encoder"].final_layer_norm(encoded.hidden_states[-2]),  # diffusers' clip_skip
    }
    for sampler in EMBEDDED.samplers:
        # In float32, as a float64 generator draws other numbers.
        noise = torch.randn((1, 4, size, size), generator=torch.Generator().manual_seed(EMBEDDED.seed))
        results[f"latents_{sampler}"] = pipeline(parts, tokenizer, config, sampler)(
            EMBEDDED.prompt,
            negative_prompt=EMBEDDED.negative_prompt,
            latents=noise.double(),
            num_inference_steps=EMBEDDED.steps,
            guidance_scale=EMBEDDED.guidance_scale,
            output_type="latent",
        ).images
    results["images"] = decode(parts["vae"], results[f"latents_{EMBEDDED.samplers[0]}"])
    save(EMBEDDED.path, results)


def run_image_case(case: ImageCase, parts: dict[str, Any], tokenizer: Any, config: dict[str, Any]) -> torch.Tensor:
    """Final latents of a picture made from a picture."""
    height, width = case.size
    painting = {"mask_image": case.mask(), "height": height, "width": width} if case.kind == "inpaint" else {}
    randn = torch.randn

    def float32_randn(*args: Any, dtype: torch.dtype, **kwargs: Any) -> torch.Tensor:
        return randn(*args, **kwargs).to(dtype)  # a float64 generator draws other numbers

    with mock.patch.object(torch, "randn", float32_randn):
        return pipeline(parts, tokenizer, config, case.sampler, case.kind)(
            list(case.prompts),
            negative_prompt=[case.negative_prompt] * len(case.prompts),
            image=case.image(),
            strength=case.strength,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance_scale,
            generator=[torch.Generator().manual_seed(case.seed + i) for i in range(len(case.prompts))],
            output_type="latent",
            **painting,
        ).images


def make_img2img() -> None:
    """Write the golden file of pictures from pictures."""
    models = {"embedded": open_embedded()}
    for model in (*CASES, INPAINTING_MODEL):
        if any(case.model == model.name for case in IMAGE_CASES):
            models[model.name] = networks(model), tokenizer_of(model), model.scheduler
    save(IMAGES, {case.name: run_image_case(case, *models[case.model]) for case in IMAGE_CASES})


def make_taesd() -> None:
    """Write the golden file of the tiny autoencoder."""
    vae = fill(diffusers.AutoencoderTiny.from_config(TINY.config))
    results = {
        "decode": vae.decode(torch.from_numpy(TINY.latents()).double()).sample,
        "encode": vae.encode(torch.from_numpy(TINY.image()).double()).latents,
    }
    save(TINY.path, results)


def make_tokenizer() -> None:
    """Write the ids of all prompts by every tokenizer."""
    results = {}
    for name, tokenizer in TOKENIZERS.items():
        with tempfile.TemporaryDirectory() as scratch:
            reference = CLIPTokenizer.from_pretrained(tokenizer.write(Path(scratch)))
        ids = reference(list(PROMPTS), padding="max_length", truncation=True, max_length=77).input_ids
        results[name] = np.array(ids, np.uint16)
    path = GOLDEN / "tokenizer.npz"
    np.savez_compressed(path, **results)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def save(path: Path, results: dict[str, torch.Tensor]) -> None:
    """Write arrays in float32."""
    for name, value in results.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path.stem}: {name} is not finite")
        print(f"{path.stem:14} {name:28} {tuple(value.shape)!s:20} rms {value.square().mean().sqrt():.3f}")
    np.savez_compressed(path, **{name: value.float().numpy() for name, value in results.items()})
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Make the files named on the command line, or all."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # diffusers finds the models too small
    makers = {case.name: lambda case=case: make_case(case) for case in CASES}
    makers |= {"embedded": make_embedded, "img2img": make_img2img, "taesd": make_taesd, "tokenizer": make_tokenizer}
    for name in sys.argv[1:] or makers:
        makers[name]()


if __name__ == "__main__":
    main()
