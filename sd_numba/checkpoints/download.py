"""Which files of a model on the Hugging Face hub are needed, where they go, and finding them again without network."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ..errors import InputError, ModelError, argument
from ..families import FAMILIES, Family, pipelines, titles
from ..files.folders import PICKLE_FOLDER_ADVICE, find_weights, read_json
from ..files.hub import DEFAULT_MODEL, Place, Repository, cache_folder, choose_place, fetch_missing, list_repository

HUB_ID = re.compile(r"[a-zA-Z0-9][\w.-]*/[a-zA-Z0-9][\w.-]*", re.ASCII)

INDEX = "model_index.json"
# How the weights of each variant end: one file, or the index of several.
VARIANTS = {
    "fp16": (".fp16.safetensors", ".fp16.safetensors.index.json", ".safetensors.index.fp16.json"),
    "fp32": (".safetensors", ".safetensors.index.json"),
}
SYNONYMS = {"f16": "fp16", "f32": "fp32"}

logger = logging.getLogger(__name__)


# --- what is needed ---------------------------------------------------------------------------------------------------


def select_files(names: Iterable[str], variant: str = "fp16") -> list[str]:
    """The files of a model in diffusers layout that are needed; of weights in shards, only the index.

    Parameters
    ----------
    names
        All files of the repository.
    variant
        ``fp16`` or ``fp32``: diffusers' name for the weights with and without ``.fp16`` in their name. A component
        that has no such weights is taken in the other variant, with a warning in the log.

    Raises
    ------
    ModelError
        A component is missing, or there are only pickles of it.
    """
    names = set(names)
    family = _family_with({name.split("/")[0] for name in names})
    chosen = sorted(name for name in names if _is_config(name, family))
    missing = [part for part in family.components if not any(name.startswith(f"{part}/") for name in chosen)]
    if missing:
        raise ModelError(f"not a whole Stable Diffusion model: found no files of {', '.join(missing)}")
    others = []
    for component in family.networks:
        for tried in sorted(VARIANTS, key=variant.__ne__):  # the requested one first
            stems = (f"{component}/diffusion_pytorch_model", f"{component}/model")
            found = [stem + end for stem in stems for end in VARIANTS[tried] if stem + end in names]
            if found:
                break
        else:
            pickled = any(name.startswith(f"{component}/") and name.endswith(".bin") for name in names)
            raise ModelError(
                f"{component}: found no safetensors weights" + (f": {PICKLE_FOLDER_ADVICE}" if pickled else "")
            )
        chosen.append(found[0])
        if tried != variant:
            others.append(component)
    if others:
        logger.warning("The repository has no %s weights of %s; the others are taken.", variant, ", ".join(others))
    return chosen


def _is_config(name: str, family: Family) -> bool:
    """Whether a file of a folder in diffusers layout says what a component is."""
    folder, _, file = name.rpartition("/")
    if folder in family.networks:
        return file == "config.json"
    if folder in family.tokenizers.values():
        return file.endswith((".json", ".txt"))
    return name == INDEX or (folder == "scheduler" and file.endswith(".json"))


def select_single_file(names: Iterable[str], file: str | None = None) -> str:
    """The one safetensors file at the root of a repository that holds whole models in one file each.

    Raises
    ------
    ModelError
        There is none.
    InputError
        There are several and none was chosen, or the `file` that was chosen is not among them.
    """
    names = list(names)
    found = sorted(name for name in names if re.fullmatch(r"[^/]+\.safetensors", name))
    if file is not None and file not in found:
        raise InputError(
            f"{argument('file')}: found {file}, expected one of {', '.join(found) or 'none: there is no such file'}"
        )
    if file is None and len(found) > 1:
        raise InputError(f"found several models, {', '.join(found)}; choose one with {argument('file')}")
    if not found:
        pickled = any(name.endswith((".ckpt", ".bin", ".pt")) for name in names)
        advice = f": {PICKLE_FOLDER_ADVICE}" if pickled else ""
        raise ModelError(f"found neither the folders of a diffusers model nor a safetensors file{advice}")
    return file or found[0]


def _shards(index: Path) -> list[str]:
    """The files that an index of shards names.

    Raises
    ------
    ModelError
        The index names none, or files in other folders.
    """
    weight_map = read_json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any("/" in name for name in names):
        raise ModelError(f"{index}: does not name the files that hold the tensors; download it again")
    return names


# --- fetching ---------------------------------------------------------------------------------------------------------


def download_model(
    model: str = DEFAULT_MODEL,
    *,
    variant: str = "fp16",
    file: str | None = None,
    to: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> Path:
    """Fetch a model, or what is missing of it, and check every file's checksum.

    ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_CACHE`` and ``HF_HUB_OFFLINE`` hold as for every program that
    uses the hub.

    Parameters
    ----------
    model
        Id on the hub, such as ``stable-diffusion-v1-5/stable-diffusion-v1-5``.
    variant
        ``fp16`` (half the size) or ``fp32``, or their synonyms ``f16`` and ``f32``.
    file
        One safetensors file at the repository's root, instead of the folders.
    to
        A plain folder; None is the hub's cache.
    revision
        Branch, tag or commit; None is ``main``.

    Returns
    -------
    Path
        The model's folder, or its single file.

    Raises
    ------
    DownloadError
        It cannot be fetched. What has arrived is kept, and the next call continues from there.
    ModelError, InputError
        The repository holds no model that can be used, or an argument cannot be used.
    """
    variant = SYNONYMS.get(variant, variant)
    if variant not in VARIANTS:
        raise InputError(f"variant: found {variant}, expected one of {', '.join((*VARIANTS, *SYNONYMS))}")
    if not HUB_ID.fullmatch(model):
        raise InputError(f"model: found {model!r}, expected an id of the hub (OWNER/NAME), such as {DEFAULT_MODEL}")
    repository = list_repository(model, revision)
    place = choose_place(repository, to)
    single = file is not None or not any(name.startswith("unet/") for name in repository.files)
    try:
        names = [select_single_file(repository.files, file)] if single else select_files(repository.files, variant)
    except (ModelError, InputError) as error:
        raise type(error)(f"{model}: {error.spelled(argument)}") from None
    if not single:
        names += _look_inside(repository, place, names)
    size = sum(repository.files[name].size for name in names) / 1e9
    logger.info("%s: %d files, %.2f GB, into %s", model, len(names), size, place.folder)
    fetch_missing(repository, place, names)
    if place.in_cache and repository.revision != repository.commit:
        reference = place.store.parent / "refs" / repository.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(repository.commit)
    elif not place.in_cache:
        with contextlib.suppress(OSError):  # not empty: another download still writes there
            place.store.rmdir()
    return place.folder / names[0] if single else place.folder


def _look_inside(repository: Repository, place: Place, names: list[str]) -> list[str]:
    """Fetch the small files that say whether this is a model for us and what shards it has; returns the shards."""
    indexes = [name for name in names if ".index." in name]
    fetch_missing(repository, place, [*indexes, *(name for name in names if name == INDEX)])
    if INDEX in names:
        found = read_json(place.folder / INDEX).get("_class_name")
        if found not in (None, *pipelines()):
            raise ModelError(
                f"{repository.model}: found {found!s:.80}, supported is {' or '.join(pipelines())} ({titles()})"
            )
    shards = [f"{index.split('/')[0]}/{shard}" for index in indexes for shard in _shards(place.folder / index)]
    missing = [shard for shard in shards if shard not in repository.files]
    if missing:
        raise ModelError(f"{repository.model}: incomplete: an index names {missing[0]}, which is not there")
    return shards


# --- what was downloaded ----------------------------------------------------------------------------------------------


def resolve_model(name: str) -> Path | None:
    """Find a model of the hub that was downloaded, without using the network.

    Parameters
    ----------
    name
        Id on the hub; anything else, and the name of a path that exists, is not looked for.

    Returns
    -------
    Path or None
        Its folder in the hub's cache, or the single file in that; None if nothing was downloaded under this id.

    Raises
    ------
    ModelError
        It was downloaded in part only, or there are several single files to choose from.
    """
    if not HUB_ID.fullmatch(name) or os.path.exists(name):
        return None
    from huggingface_hub import constants  # noqa: PLC0415  # light: without what uses the network

    folder = cache_folder(constants.HF_HUB_CACHE, name)
    snapshots = folder / "snapshots"
    main = folder / "refs" / constants.DEFAULT_REVISION
    snapshot = snapshots / (main.read_text(errors="replace").strip() if main.is_file() else ".")
    if snapshot == snapshots or not snapshot.is_dir():
        snapshot = max(snapshots.glob("*"), key=lambda path: path.stat().st_mtime, default=snapshots)
    if not snapshot.is_dir():
        return None
    if _is_whole(snapshot):
        return snapshot
    files = sorted(path for path in snapshot.glob("*.safetensors") if path.is_file())
    if len(files) > 1:
        listed = ", ".join(path.name for path in files)
        raise ModelError(f"{name}: found several models, {listed}; give the path of one in {snapshot}")
    if not files:
        raise ModelError(f"{name}: the download is incomplete; run: sd-numba download {name}")
    return files[0]


def shortest_name(model: str, path: Path) -> str:
    """What to call a downloaded model: its id if that leads to this path, else the path."""
    try:
        return model if resolve_model(model) == path else str(path)
    except ModelError:  # several single files
        return str(path)


def _family_with(folders: Collection[str]) -> Family:
    """Return the family of the most components that are all among these folders, or else the first."""
    whole = [family for family in FAMILIES if all(part in folders for part in family.components)]
    return max(whole, key=lambda family: len(family.components), default=FAMILIES[0])


def _is_whole(folder: Path) -> bool:
    """Whether no file of a model in diffusers layout is missing."""
    family = _family_with({path.name for path in folder.iterdir()} if folder.is_dir() else set())
    networks = family.networks
    needed = [folder / "scheduler" / "scheduler_config.json", *(folder / name / "config.json" for name in networks)]
    for tokenizer in (folder / name for name in family.tokenizers.values()):
        if not (tokenizer / "tokenizer.json").is_file():
            needed += [tokenizer / "vocab.json", tokenizer / "merges.txt"]
    try:
        for component in networks:
            weights = find_weights(folder / component)
            if weights.suffix == ".json":
                needed += [weights.with_name(shard) for shard in _shards(weights)]
    except ModelError:
        return False
    return all(path.is_file() for path in needed)
