"""The miniature models and inputs of the golden tests, as plain data: needs neither torch nor our own networks.

Every model follows from its configs (as in a diffusers folder) and from ``bench.make_random_model.random_tensor``, so
that only the outputs of diffusers and transformers are stored, in ``<case>.npz``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.make_random_model import SD15, SPECIAL_TOKENS, Config, random_noise, write_json, write_model, write_tokenizer

GOLDEN = Path(__file__).parent

# Our name -> (class in diffusers, what its from_config gets beside the model's own scheduler config).
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun-karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lms-karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m-exponential": ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
}
STOCHASTIC: dict[str, tuple[str, dict[str, Any]]] = {"euler-a": ("EulerAncestralDiscreteScheduler", {})}


@dataclass(frozen=True)
class Case:
    """One miniature model and the sizes that it is tried with.

    Attributes
    ----------
    name : str
        Also the stem of the golden file.
    text_encoder, unet, vae, scheduler : dict
        The config files.
    unet_size, vae_size : tuple
        Batch, height and width of the latents that these two are tried with.
    pipeline_size : tuple
        Height and width of the latents of whole pictures.
    timesteps : tuple
        Those that the UNet is tried with.
    pad_token : str
        The tokenizer's.
    samplers : tuple of str
        Those whose 20 steps are compared; the picture is that of the first.
    prompts : tuple of str
        A batch of as many pictures.
    negative_prompt : str
        The same for all of them.
    """

    name: str
    text_encoder: Config
    unet: Config
    vae: Config
    scheduler: Config
    unet_size: tuple[int, int, int]
    vae_size: tuple[int, int, int]
    pipeline_size: tuple[int, int]
    timesteps: tuple[float, ...] = (999, 500.0, 261.7, 1, 0)
    pad_token: str = "<|endoftext|>"
    samplers: tuple[str, ...] = ("dpm++2m", "ddim", "pndm", "euler")
    prompts: tuple[str, ...] = ("A red fox, in the snow!",)
    negative_prompt: str = ""
    guidance_scale: float = 7.5
    steps: int = field(default=20)

    @property
    def configs(self) -> dict[str, Config]:
        """The config files by component."""
        return {
            "text_encoder": self.text_encoder,
            "unet": self.unet,
            "vae": self.vae,
            "scheduler": self.scheduler,
        }

    @property
    def path(self) -> Path:
        """The golden file."""
        return GOLDEN / f"{self.name}.npz"

    def write(self, folder: Path) -> Path:
        """Write the whole model, unless it is there; returns its folder."""
        folder = folder / self.name
        if not folder.exists():
            write_model(folder, self.configs, pad_token=self.pad_token)
        return folder

    # Inputs, the same on both sides.

    def ids(self) -> np.ndarray:
        """Token ids ``(3, 77)``: short, full and of random length, padded as the tokenizer would."""
        vocabulary = self.text_encoder["vocab_size"]
        start, end = vocabulary - 2, vocabulary - 1
        pad = 0 if self.pad_token == "!" else end
        random = np.random.RandomState(1).randint(1, start, (3, 77))
        ids = np.full((3, 77), pad, np.int64)
        for row, length in enumerate((5, 75, 31)):
            ids[row, : length + 2] = [start, *random[row, :length], end]
        return ids

    def sample(self) -> np.ndarray:
        """The UNet's noisy latents."""
        batch, height, width = self.unet_size
        return random_noise("sample", (batch, self.unet["in_channels"], height, width))

    def context(self) -> np.ndarray:
        """The UNet's text, as if from an encoder."""
        return random_noise("context", (self.unet_size[0], 77, self.unet["cross_attention_dim"]))

    def latents(self) -> np.ndarray:
        """The VAE decoder's input."""
        batch, height, width = self.vae_size
        return random_noise("latents", (batch, self.vae["latent_channels"], height, width))

    def image(self) -> np.ndarray:
        """The VAE encoder's input, in [-1, 1]."""
        batch, height, width = self.vae_size
        factor = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return np.tanh(random_noise("image", (batch, 3, factor * height, factor * width)))

    def noise(self) -> np.ndarray:
        """The initial latents of whole pictures."""
        return random_noise("noise", (len(self.prompts), self.unet["in_channels"], *self.pipeline_size))


def text_config(**changes: Any) -> Config:
    """SD 1.5's text encoder, smaller."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": 1000,
    }
    return SD15["text_encoder"] | small | changes


def unet_config(**changes: Any) -> Config:
    """SD 1.5's UNet, smaller."""
    small = {
        "attention_head_dim": 4,
        "block_out_channels": [16, 32, 48, 48],
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    return SD15["unet"] | small | changes


def vae_config(**changes: Any) -> Config:
    """SD 1.5's VAE, smaller."""
    small = {"block_out_channels": [16, 24, 32, 32], "norm_num_groups": 8, "sample_size": 128}
    return SD15["vae"] | small | changes


def levels(count: int, layers: int) -> tuple[Config, Config]:
    """What a UNet's and a VAE's config say of `count` levels with `layers` layers a block."""
    unet = {
        "down_block_types": ["CrossAttnDownBlock2D"] * (count - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (count - 1),
        "layers_per_block": layers,
    }
    vae = {
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "layers_per_block": layers,
    }
    return unet, vae


SD2_SCHEDULER: Config = SD15["scheduler"] | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
THREE_UNET, THREE_VAE = levels(3, 1)

CASES: tuple[Case, ...] = (
    Case(
        "sd1",
        text_config(),
        unet_config(),
        vae_config(),
        SD15["scheduler"],
        unet_size=(1, 16, 16),
        vae_size=(1, 8, 8),
        pipeline_size=(16, 16),
        samplers=tuple(SAMPLERS),
    ),
    Case(
        "sd2",
        text_config(hidden_act="gelu", num_hidden_layers=2, hidden_size=48, num_attention_heads=3),
        unet_config(
            attention_head_dim=[1, 2, 4, 2],
            block_out_channels=[16, 32, 64, 64],
            cross_attention_dim=48,
            dual_cross_attention=False,
            num_class_embeds=None,
            only_cross_attention=False,
            upcast_attention=True,
            use_linear_projection=True,
        ),
        vae_config(scaling_factor=0.18215, block_out_channels=[8, 16, 16, 24]),
        SD2_SCHEDULER,
        unet_size=(3, 8, 16),
        vae_size=(2, 4, 8),
        pipeline_size=(8, 8),
        pad_token="!",
        samplers=tuple(SAMPLERS),
        prompts=("A red fox, in the snow!", "Two (small) owls & 17 pears"),
        negative_prompt="blurry, ugly",
    ),
    Case(
        "odd_widths",
        text_config(hidden_size=40, num_attention_heads=5, intermediate_size=104, num_hidden_layers=2),
        unet_config(attention_head_dim=8, block_out_channels=[24, 40, 56, 72], cross_attention_dim=40),
        vae_config(block_out_channels=[24, 40, 56, 72]),
        SD15["scheduler"],
        unet_size=(1, 16, 8),
        vae_size=(1, 8, 4),
        pipeline_size=(16, 8),
    ),
    Case(
        "three_levels",
        text_config(num_hidden_layers=1, hidden_size=24, num_attention_heads=2, intermediate_size=72),
        unet_config(
            attention_head_dim=2,
            block_out_channels=[16, 24, 32],
            cross_attention_dim=24,
            norm_num_groups=4,
            norm_eps=1e-6,
            downsample_padding=0,
            **THREE_UNET,
        ),
        vae_config(block_out_channels=[16, 16, 32], norm_num_groups=4, scaling_factor=0.5, **THREE_VAE),
        SD15["scheduler"] | {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps_offset": 0},
        unet_size=(3, 12, 8),
        vae_size=(3, 6, 8),
        pipeline_size=(12, 20),
        samplers=("euler", "ddim", "pndm", "dpm++2m"),
    ),
    # Latents that three halvings do not divide, three layers a block, attention at other levels, several transformer
    # blocks in one, both settings of the timestep's sinusoids turned round.
    Case(
        "odd_sizes",
        text_config(num_hidden_layers=1),
        unet_config(
            block_out_channels=[16, 16, 24, 24],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            attention_head_dim=[2, 4, 3, 6],
            layers_per_block=3,
            transformer_layers_per_block=[1, 2, 1, 3],
            flip_sin_to_cos=False,
            freq_shift=1,
        ),
        vae_config(block_out_channels=[8, 8, 16, 16], norm_num_groups=4, layers_per_block=1),
        SD15["scheduler"] | {"timestep_spacing": "trailing"},
        unet_size=(2, 9, 13),
        vae_size=(1, 5, 7),
        pipeline_size=(9, 13),
        samplers=("ddim", "euler", "dpm++2m"),
    ),
)

SD2 = CASES[1]

# ---- the tiny autoencoder


@dataclass(frozen=True)
class TinyCase:
    """A miniature of TAESD and its inputs, whose sizes three halvings do not divide."""

    path: Path = GOLDEN / "taesd.npz"
    latent_size: tuple[int, int, int] = (2, 3, 5)
    image_size: tuple[int, int, int] = (2, 21, 39)

    @property
    def config(self) -> Config:
        """As in diffusers' ``config.json``."""
        return {
            "_class_name": "AutoencoderTiny",
            "encoder_block_out_channels": [8] * 4,
            "decoder_block_out_channels": [12] * 4,
            "num_encoder_blocks": [1, 2, 1, 1],
            "num_decoder_blocks": [2, 1, 3, 1],
        }

    def latents(self) -> np.ndarray:
        """The decoder's input."""
        batch, height, width = self.latent_size
        return 2 * random_noise("latents", (batch, 4, height, width))

    def image(self) -> np.ndarray:
        """The encoder's input, in [-1, 1]."""
        batch, height, width = self.image_size
        return np.tanh(random_noise("image", (batch, 3, height, width)))


TINY = TinyCase()

# ---- the tokenizer

PROMPTS: tuple[str, ...] = (
    "",
    " ",
    "\t\n  \r\n",
    "a",
    "a cat on a beach",
    "A Photograph of an ASTRONAUT riding a horse",
    "  leading and   trailing\tspace \n",
    "it's, don't, we're, I've, I'm, they'll, he'd; o'clock rock'n'roll",
    "IT'S DON'T WE'RE I'VE I'M THEY'LL HE'D",
    "it\u2019s a curly apostrophe",
    "'s 't 're 've 'm 'll 'd 'x ''",
    "1234567890 3.14159 1,000,000 2nd 4k 8K 35mm f/1.8",
    "\u0661\u0662\u0663 \u00bd \u00b2 \u2167 \u2460",
    "hello,world!!! (what?) [yes] {no} <maybe> #tag @you $5 100% a&b c*d e+f g=h i/j k\\l m|n ~o `p` ^q",
    "...,,,---___***",
    "snake_case_words and __dunder__ and kebab-case-words",
    "caf\u00e9 na\u00efve \u00fcber \u00c5ngstr\u00f6m",
    "cafe\u0301 nai\u0308ve u\u0308ber A\u030angstro\u0308m",
    "\u212bngstr\u00f6m \u2126hm \u212a",
    "\ufb01re \ufb02y \uff26\uff35\uff2c\uff2c",
    "e\u0301\u0302\u0303 z\u0351\u036b\u0343a\u0300l\u0324g\u0317o",
    "\u0130stanbul \u0131s\u0131k STRASSE stra\u00dfe \u1e9e",
    "\u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3 \u03c3\u03c2",
    "\u041a\u043e\u0448\u043a\u0430 \u043d\u0430 \u043f\u043b\u044f\u0436\u0435",
    "\u4e00\u53ea\u732b\u5728\u6d77\u6ee9\u4e0a",
    "\u4e00\u53ea\u732b cat \u5728\u6d77\u6ee9\u4e0a, 4k\u3002",
    "\u6d5c\u8fba\u306e\u732b \u30ab\u30bf\u30ab\u30ca \u306b\u3083\u3093",
    "\ud574\ubcc0\uc758 \uace0\uc591\uc774",
    "\u1112\u1162\u1107\u1167\u11ab",
    "\u0642\u0637\u0629 \u0639\u0644\u0649 \u0627\u0644\u0634\u0627\u0637\u0626",
    "\u05d7\u05ea\u05d5\u05dc \u05e2\u05dc \u05d4\u05d7\u05d5\u05e3",
    "\u0e41\u0e21\u0e27\u0e1a\u0e19\u0e0a\u0e32\u0e22\u0e2b\u0e32\u0e14",
    "\u0938\u092e\u0941\u0926\u094d\u0930 \u0924\u091f \u092a\u0930 \u092c\u093f\u0932\u094d\u0932\u0940",
    "\U0001f431",
    "a \U0001f431 on a \U0001f3d6\ufe0f with \U0001f468\u200d\U0001f469\u200d\U0001f467 and \U0001f44d\U0001f3fd",
    "\U0001f1ec\U0001f1e7\U0001f1eb\U0001f1f7 flags",
    "\U00010400 \U0001d49c \U0001d7d8",
    "zero\u200bwidth\u200cjoin\u200ders\ufeff and soft\u00adhyphen",
    "no\u00a0break\u2003em\u3000ideographic\u2028line\u2029para\u0085next",
    "\x1c\x1d\x1e\x1f unit separators \x0b \x0c",
    "nul\x00byte \x07 bell \x7f delete \x1b[31m",
    "\ufffd replacement \ue000 private \ufdd0",
    "&amp; &lt;b&gt; &quot;x&quot; &#39; &eacute; <br/> &nbsp;",
    "<|startoftext|>",
    "<|endoftext|>",
    "a cat<|endoftext|>a dog",
    "a cat <|startoftext|> a dog <|ENDOFTEXT|>",
    "<|endoftext|",
    "a</w> b</w>c </w>",
    "!",
    "wow! wow!! wow!!! !wow ! !",
    "\"double\" 'single' \u201ccurly\u201d \u00abguillemets\u00bb",
    "https://example.com/a/b?c=d&e=f#g user@example.com C:\\path\\file.txt",
    "(red:1.3) ((big)) [small] {a|b} <lora:x:0.8> BREAK AND",
    "\u2190\u2191\u2192\u2193 \u2200x\u2203y \u221e \u2260 \u00b1 \u00d7 \u00f7 \u00b0C \u20ac \u00a3 \u2122",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x" * 300,
    "ab" * 200,
    " ".join(["word"] * 75),
    " ".join(["a"] * 75),
    " ".join(["a"] * 76),
    " ".join(f"{i}" for i in range(200)),
    ", ".join(["masterpiece, best quality, 8k, \U0001f431"] * 20),
)


@dataclass(frozen=True)
class TokenizerCase:
    """A tokenizer: a folder, or how to make one up.

    Attributes
    ----------
    folder : Path, optional
        One that is there.
    size : int
        Entries of a made-up vocabulary.
    pad_token : str
        In both config files.
    published : bool
        Config files as published with SD 1.5 and 2.x: special tokens are objects, of which some are looked for in
        the lower-cased text and some are not, and ``tokenizer_config.json`` says ``<|endoftext|>`` of the padding
        whatever ``special_tokens_map.json`` says.
    """

    folder: Path | None = None
    size: int = 0
    pad_token: str = "<|endoftext|>"
    published: bool = False

    def write(self, scratch: Path) -> Path:
        """The tokenizer's folder; a made-up one is written below `scratch`."""
        if self.folder:
            return self.folder
        folder = scratch / "tokenizer"
        write_tokenizer(folder, self.size, self.pad_token)
        if self.published:
            flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
            start, end = ({"content": token, **flags} for token in SPECIAL_TOKENS)
            special = {"bos_token": start, "eos_token": end, "pad_token": self.pad_token, "unk_token": end}
            write_json(folder / "special_tokens_map.json", special)
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            typed = {key: {"__type": "AddedToken", **value} for key, value in special.items() if key != "pad_token"}
            config |= typed | {"pad_token": "<|endoftext|>", "special_tokens_map_file": "./special_tokens_map.json"}
            write_json(folder / "tokenizer_config.json", config)
        return folder


EMBEDDED_FOLDER = GOLDEN.parents[1] / "sd_numba" / "models" / "emoji-world"

TOKENIZERS: dict[str, TokenizerCase] = {
    "embedded": TokenizerCase(EMBEDDED_FOLDER / "tokenizer"),
    "full_size": TokenizerCase(size=SD15["text_encoder"]["vocab_size"]),
    "sd2": TokenizerCase(size=1000, pad_token="!"),
    "published_sd1": TokenizerCase(size=1000, published=True),
    "published_sd2": TokenizerCase(size=1000, pad_token="!", published=True),
}

# ---- the embedded model


@dataclass(frozen=True)
class EmbeddedCase:
    """A picture of the embedded model."""

    folder: Path = EMBEDDED_FOLDER
    path: Path = GOLDEN / "embedded.npz"
    prompt: str = "a red apple on a blue background"
    negative_prompt: str = "a dog"
    seed: int = 42
    steps: int = 20
    guidance_scale: float = 4.0
    samplers: tuple[str, ...] = ("dpm++2m", "pndm")


EMBEDDED = EmbeddedCase()

# ---- pictures from pictures


# A UNet for inpainting: latents, the mask, and the latents of what the mask leaves.
INPAINTING_MODEL = replace(CASES[0], name="inpainting", unet=unet_config(in_channels=9), samplers=())


@dataclass(frozen=True)
class ImageCase:
    """A picture made from another one, or from parts of one, by diffusers.

    Each picture draws from a generator of its own, seeded with `seed`, `seed` + 1 and so on, float32 ``(1, 4, h, w)``
    a time, in this order:

    - img2img: the sample of the picture's latents (``mean + std * draw``), the noise, what the sampler draws;
    - inpaint, UNet of 4 channels: the sample of the picture's latents (also at strength 1), the noise, the sample of
      the masked picture's latents (which is of no use, but drawn), what the sampler draws;
    - inpaint, UNet of 9 channels: as with 4, but at strength 1 without the sample of the picture's latents.

    The noise is drawn once: with 4 channels, it is also what the kept parts are noised with after each call.

    Attributes
    ----------
    name : str
        Key of the final latents in the golden file.
    model : str
        Name of a case, or ``embedded``, whose picture is then that of its golden file.
    kind : {"img2img", "inpaint"}
    sampler : str
    strength : float
    size : tuple
        Height and width of the picture in pixels.
    prompts : tuple of str
        A batch of as many pictures.
    seed : int
        Of the first one.
    """

    name: str
    model: str
    kind: str
    sampler: str
    strength: float
    size: tuple[int, int]
    prompts: tuple[str, ...] = ("A red fox, in the snow!",)
    negative_prompt: str = "blurry, ugly"
    guidance_scale: float = 7.5
    steps: int = 20
    seed: int = 42

    def image(self) -> np.ndarray:
        """The pictures to start from: float32 ``(b, h, w, 3)``, eight bits in [0, 1]."""
        if self.model == "embedded":
            with np.load(EMBEDDED.path) as file:
                image = file["images"]
        else:
            image = np.tanh(random_noise("picture", (len(self.prompts), *self.size, 3))) / 2 + 0.5
        return np.round(image * 255).astype(np.float32) / 255

    def mask(self) -> np.ndarray:
        """What to paint, one mask a picture: float32 ``(b, h, w)``, not in step with the latents, grey at its edge."""
        height, width = self.size
        mask = np.zeros((len(self.prompts), height, width), np.float32)
        for i, one in enumerate(mask):
            rows, columns = slice(11 + 5 * i, height - 21), slice(width // 3 + 2, width - 13 - 9 * i)
            one[rows, columns] = 1
            one[rows.start - 3 : rows.start, columns] = 0.6
            one[rows.stop : rows.stop + 7, columns] = 0.4
        return mask


def image_cases() -> Iterator[ImageCase]:
    """Every deterministic sampler from a picture; masks with those that differ in how they noise the kept parts."""
    tall, wide, batch = (128, 96), (96, 128), (64, 96)
    for sampler in ("ddim", "pndm", "euler", "heun", "dpm++2m", "dpm++2m-karras", "unipc", "euler-a"):
        yield ImageCase(f"sd1_{sampler}", "sd1", "img2img", sampler, 0.6, wide)
    yield ImageCase("sd1_full", "sd1", "img2img", "euler", 1.0, tall)
    yield ImageCase("sd1_unguided", "sd1", "img2img", "dpm++2m", 0.35, tall, guidance_scale=1.0)
    two = SD2.prompts
    for sampler in ("ddim", "euler", "heun", "dpm++2m", "unipc"):
        yield ImageCase(f"sd2_{sampler}", "sd2", "img2img", sampler, 0.6, batch, two)
    for sampler in ("ddim", "pndm", "euler", "heun", "dpm++2m-karras", "unipc", "euler-a"):
        yield ImageCase(f"sd1_inpaint_{sampler}", "sd1", "inpaint", sampler, 0.75, tall)
    for sampler in ("ddim", "euler", "pndm"):
        yield ImageCase(f"sd1_inpaint_full_{sampler}", "sd1", "inpaint", sampler, 1.0, wide)
    for sampler in ("ddim", "dpm++2m"):
        yield ImageCase(f"sd2_inpaint_{sampler}", "sd2", "inpaint", sampler, 0.75, batch, two)
    for sampler in ("ddim", "euler-a", "dpm++2m"):
        yield ImageCase(f"inpainting_full_{sampler}", "inpainting", "inpaint", sampler, 1.0, wide)
    for sampler in ("euler", "euler-a", "unipc"):
        yield ImageCase(f"inpainting_{sampler}", "inpainting", "inpaint", sampler, 0.6, tall)
    yield ImageCase("inpainting_batch", "inpainting", "inpaint", "dpm++2m", 0.6, batch, two, "", 1.0)
    apple = {"size": (128, 128), "negative_prompt": EMBEDDED.negative_prompt, "guidance_scale": 4.0}
    for kind in ("img2img", "inpaint"):
        for sampler in ("dpm++2m", "ddim"):
            name = f"embedded_{kind}_{sampler}"
            yield ImageCase(name, "embedded", kind, sampler, 0.6, prompts=("a green pear on a table",), **apple)


IMAGE_CASES = tuple(image_cases())
IMAGES = GOLDEN / "img2img.npz"


# Stable Diffusion 1.5 and 2.1, whose single files have names of their own.
SINGLE_FILES: dict[str, dict[str, Config]] = {
    "1": SD15,
    "2": SD15
    | {
        "text_encoder": SD15["text_encoder"]
        | {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
        },
        "unet": SD15["unet"]
        | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    },
}
