"""What a family of models is: everything about a kind of model that its files do not say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files.tensors import TensorInfo
from ..files.writing import Entry
from ..networks.clip import TextEncoder
from ..networks.unet import EncodedContext, UNet
from ..prompts.encoding import encode_prompts
from ..prompts.tokenizer import Tokenizer
from .shapes import Shapes


@dataclass(frozen=True)
class Conditioning:
    """What a text tells the UNet.

    Attributes
    ----------
    context : float32 array ``(t, d)``
        The vectors that cross-attention attends to.
    pooled : float32 array ``(d,)``, optional
        One vector for the whole text.
    extra : mapping of str to ndarray
        Further vectors, such as the size ids of SDXL.
    """

    context: np.ndarray
    pooled: np.ndarray | None = None
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def finite(self) -> bool:
        """Return whether no value is NaN or infinite."""
        vectors = [self.context, *self.extra.values(), *([] if self.pooled is None else [self.pooled])]
        return all(bool(np.isfinite(values).all()) for values in vectors)


Encoders = Sequence[tuple[Tokenizer, TextEncoder]]  # in the order of a family's text encoders


@dataclass(frozen=True)
class Network:
    """A component of a family that has weights.

    Attributes
    ----------
    network : callable
        Builds the network from a `WeightSource` and its configuration.
    parse : callable
        Turns a parsed ``config.json`` into the configuration.
    classes : tuple of str
        Classes in ``config.json`` that can be run; a converted folder names the first.
    library : str
        Where that class is, as in ``model_index.json``.
    file : str
        Name of the weights' file in a folder.
    prefix : str
        Prefix of the tensors' names in a single file.
    rename : callable
        Tensors of a single file, without the prefix -> the tensors that the network needs, by diffusers' names.
    infer : callable
        Shapes by diffusers' names -> the configuration, as in ``config.json``. Raises ModelError.
    unrename : callable
        Entries by diffusers' names, and the parsed configuration -> entries by a single file's names, without the
        prefix. Raises ModelError.
    described : mapping
        What a converted folder's ``config.json`` says about the class, in place of ``_class_name``.
    """

    network: Callable[..., Any]
    parse: Callable[[Mapping[str, Any]], Any]
    classes: tuple[str, ...]
    library: str
    file: str
    prefix: str
    rename: Callable[[Mapping[str, TensorInfo]], dict[str, TensorInfo]]
    infer: Callable[[Shapes], dict[str, Any]]
    unrename: Callable[[Mapping[str, Entry], Any, Path], dict[str, Entry]]
    described: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, header: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Pick this network's tensors out of a single file, under diffusers' names."""
        prefix = self.prefix
        return self.rename({name[len(prefix) :]: info for name, info in header.items() if name.startswith(prefix)})


def context_width(configs: Mapping[str, Any]) -> int:
    """Return how wide the contexts of a family with one text encoder are, by its networks' parsed configurations."""
    width: int = configs["text_encoder"].hidden_size
    return width


def condition(encoders: Encoders, texts: Sequence[str], syntax: str, clip_skip: int) -> dict[str, Conditioning]:
    """Encode texts for a family with one text encoder, whose UNet takes no more than its last vectors.

    Parameters
    ----------
    encoders
        The tokenizer and the text encoder.
    texts
        Prompts as they are at some step.
    syntax, clip_skip
        As `sd_numba.prompts.encoding.encode_prompts` takes them.

    Raises
    ------
    InputError
        A text is not valid, or no layer is left.
    """
    ((tokenizer, text_encoder),) = encoders
    vectors = encode_prompts(tokenizer, text_encoder, texts, syntax=syntax, clip_skip=clip_skip)
    return {text: Conditioning(context) for text, context in vectors.items()}


def encode_context(unet: UNet, conditionings: Sequence[Conditioning]) -> EncodedContext:
    """Prepare the UNet's cross-attention for a batch whose contexts have one length."""
    return unet.encode_context(np.stack([one.context for one in conditionings]))


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes
    ----------
    name : str
        A short key.
    title : str
        As messages say it: the line of models, a space, the version.
    pipeline : str
        The class in ``model_index.json``.
    networks : mapping of str to Network
        By component, that is by folder and in the order of reports.
    padding : mapping of str to str
        Text encoder -> the token that pads its texts in models of a single file, which holds no tokenizer.
    text_width : int
        Values of a token's vector in the family's published models, by which LoRAs and embeddings are told apart.
    scheduler : mapping
        What single files do not say of ``scheduler_config.json``; ``prediction_type`` comes from `prediction`.
    velocity_size : int, optional
        Latent pixels a side of models that predict velocity, where that is not what the UNet's configuration says.
    preview_factors : tuple
        A row of red, green and blue for each latent channel, and one that is added, as `LatentProjection` takes them.
    recognises_file : callable
        Whether a single file with these tensors' names holds such a model.
    recognises_folder : callable
        Whether the configurations of a folder, by component, describe such a model; called only for folders that
        name `pipeline` or no pipeline.
    prediction : callable
        Names of tensors and metadata of a single file -> ``prediction_type``, or None if they do not tell.
    architecture : callable
        ``prediction_type`` -> the name of the architecture in ModelSpec's metadata.
    probe : callable, optional
        Asks a UNet for its ``prediction_type``, where `prediction` returned None.
    context_width : callable
        Parsed configurations by component -> values of a token's vector that the UNet must expect; see
        `context_width`.
    condition : callable
        Turns texts into `Conditioning`; see `condition`.
    encode_context : callable
        Turns a batch of them into what the UNet takes; see `encode_context`.
    """

    name: str
    title: str
    pipeline: str
    networks: Mapping[str, Network]
    padding: Mapping[str, str]
    text_width: int
    scheduler: Mapping[str, Any]
    preview_factors: tuple[tuple[float, ...], ...]
    recognises_file: Callable[[Collection[str]], bool]
    recognises_folder: Callable[[Mapping[str, Mapping[str, Any]]], bool]
    prediction: Callable[[Collection[str], Mapping[str, str]], str | None]
    architecture: Callable[[str | None], str]
    velocity_size: int | None = None
    probe: Callable[[UNet], str] | None = None
    context_width: Callable[[Mapping[str, Any]], int] = context_width
    condition: Callable[[Encoders, Sequence[str], str, int], dict[str, Conditioning]] = condition
    encode_context: Callable[[UNet, Sequence[Conditioning]], EncodedContext] = encode_context

    @property
    def components(self) -> tuple[str, ...]:
        """The folders of a model in diffusers layout."""
        return (*self.tokenizers.values(), *self.networks, "scheduler")

    @property
    def tokenizers(self) -> dict[str, str]:
        """Text encoder -> its tokenizer: ``text_encoder_2`` has ``tokenizer_2``."""
        return {encoder: encoder.replace("text_encoder", "tokenizer") for encoder in self.padding}

    @property
    def line(self) -> str:
        """The title without the version, such as Stable Diffusion."""
        return self.title.rpartition(" ")[0]

    @property
    def version(self) -> str:
        """The last word of the title, such as 1.x."""
        return self.title.rpartition(" ")[2]
