"""Downloads from a server on loopback that behaves like the hub, or worse; and that no other command uses a network."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import constants, file_download

from sd_numba.checkpoints.download import DEFAULT_MODEL, resolve_model, select_files, select_single_file
from sd_numba.checkpoints.opening import embedded_model_path, open_model
from sd_numba.cli import main
from sd_numba.errors import InputError, ModelError
from tests.fake_hub import COMMIT, FakeHub

ID = "painter/small-model"
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
BIG = np.random.default_rng(0).bytes(2 << 20)
CONFIGS = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/merges.txt": b"#version: 0.2\n",
    "tokenizer/vocab.json": b"{}",
    "text_encoder/config.json": b"{}",
    "unet/config.json": b"{}",
    "vae/config.json": b"{}",
}
HALF = {
    "text_encoder/model.fp16.safetensors": b"text, half" * 100,
    UNET: BIG,
    "vae/diffusion_pytorch_model.fp16.safetensors": b"vae, half" * 100,
}
FULL = {name.replace(".fp16", ""): content + b", full" for name, content in HALF.items()}
OTHERS = {
    "README.md": b"a model",
    "v1-5-pruned.safetensors": b"single file",
    "v1-5-pruned.ckpt": b"pickle",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"other",
    "text_encoder/flax_model.msgpack": b"other",
    "safety_checker/config.json": b"{}",
    "safety_checker/model.safetensors": b"other",
    "feature_extractor/preprocessor_config.json": b"{}",
    "vae/onnx/config.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = FakeHub(ID, {**CONFIGS, **HALF, **FULL, **OTHERS})
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # before version 1
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what an interruption loses; normally 10 MB
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)  # between attempts
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield hub
    hub.close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "models--painter--small-model"


def download(*arguments):
    return CliRunner().invoke(main, ["download", *arguments])


def fails(result, *words):
    """The command failed, and its last line has these words in it; there is no other but those of progress bars."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and result.stderr.endswith(lines[0] + "\n")
    assert "Traceback" not in result.output and result.stdout == ""
    for word in words:
        assert word in lines[0]
    return True


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is fetched, and where it goes -------------------------------------------------------------------------------


def test_into_the_hubs_cache(hub, cache):
    result = download(ID)
    assert result.exit_code == 0, result.output
    snapshot = cache / "snapshots" / COMMIT
    assert contents(snapshot) == {**CONFIGS, **HALF}
    assert (snapshot / UNET).readlink() == Path("../../../blobs") / hashlib.sha256(BIG).hexdigest()
    assert (cache / "refs" / "main").read_text() == COMMIT
    assert not list(cache.rglob("*.incomplete"))
    assert result.stdout.splitlines()[0] == f"{ID} is in {snapshot}"
    assert result.stdout.splitlines()[1].endswith(f"--model {ID}")
    assert resolve_model(ID) == snapshot
    for name in (UNET, "model_index.json"):  # other programs find them
        assert huggingface_hub.try_to_load_from_cache(ID, name) == str(snapshot / name)
    assert huggingface_hub.hf_hub_download(ID, UNET, local_files_only=True) == str(snapshot / UNET)


def test_what_is_there_is_not_fetched_again(hub, cache):
    download(ID)
    hub.revive()
    assert download(ID).exit_code == 0
    assert [kind for kind, *_ in hub.requests] == ["api"]
    assert download(ID, "--variant", "f32").exit_code == 0
    assert sorted(hub.asked("resolve")) == sorted(FULL)
    assert contents(cache / "snapshots" / COMMIT) == {**CONFIGS, **HALF, **FULL}


def test_into_a_plain_folder(hub, tmp_path, cache):
    folder = tmp_path / "my model"
    result = download(ID, "--to", str(folder), "--variant", "fp32")
    assert result.exit_code == 0, result.output
    assert contents(folder) == {**CONFIGS, **FULL}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert sorted(path.name for path in folder.iterdir()) == sorted({name.split("/")[0] for name in CONFIGS})
    assert result.stdout.endswith(f"--model '{folder}'\n")
    assert not cache.exists()
    (folder / "vae" / "config.json").write_text("changed")
    assert download(ID, "--to", str(folder)).exit_code == 0
    assert contents(folder) == {**CONFIGS, **FULL, **HALF}


def test_a_model_that_runs(hub, tmp_path):
    model = embedded_model_path()
    hub.files = contents(model)
    assert download(ID).exit_code == 0
    found = open_model(ID)
    assert found.configs == open_model().configs and found.path == resolve_model(ID)
    assert found.name == ID.split("/")[1]
    assert (found.path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size == 17_519_824
    assert not (found.path / "README.md").exists()


def test_a_revision(hub, cache):
    result = download(ID, "--revision", "refs/pr/1")
    assert hub.asked("api") == ["refs/pr/1"]
    assert (cache / "refs/refs/pr/1").read_text() == COMMIT
    assert resolve_model(ID) == cache / "snapshots" / COMMIT  # the only one that there is
    assert result.exit_code == 0
    assert download(ID, "--revision", COMMIT).exit_code == 0
    assert not (cache / "refs" / COMMIT).exists()


def test_weights_in_shards(hub, cache):
    del hub.files[UNET]
    shards = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": Path(shards[0]).name, "b": Path(shards[1]).name, "c": Path(shards[1]).name}}
    hub.files["unet/diffusion_pytorch_model.safetensors.index.fp16.json"] = json.dumps(index).encode()
    assert fails(download(ID), "incomplete", shards[0])
    hub.files |= {shards[0]: b"first", shards[1]: b"second"}
    assert download(ID).exit_code == 0
    snapshot = resolve_model(ID)
    assert (snapshot / shards[1]).read_bytes() == b"second"
    (snapshot / shards[0]).unlink()
    with pytest.raises(ModelError, match=f"incomplete; run: sd-numba download {ID}"):
        resolve_model(ID)
    hub.files["unet/diffusion_pytorch_model.safetensors.index.fp16.json"] = b'{"weight_map": {"a": "../../../a"}}'
    assert fails(download(ID), "does not name the files")


def test_a_repository_without_the_variant(hub, caplog):
    for name in list(HALF)[:2]:
        del hub.files[name]
    assert download(ID).exit_code == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["The repository has no fp16 weights of text_encoder, unet; the others are taken."]
    assert sorted(hub.asked("cdn")) == sorted([*list(FULL)[:2], "vae/diffusion_pytorch_model.fp16.safetensors"])


def test_select_files():
    names = [*CONFIGS, *HALF, *FULL, *OTHERS]
    assert sorted(select_files(names, "fp16")) == sorted([*CONFIGS, *HALF])
    assert sorted(select_files(names, "fp32")) == sorted([*CONFIGS, *FULL])
    assert sorted(select_files([*CONFIGS, *HALF], "fp32")) == sorted([*CONFIGS, *HALF])
    with pytest.raises(ModelError, match="no files of tokenizer, scheduler"):
        select_files([name for name in names if not name.startswith(("tokenizer", "scheduler"))])
    with pytest.raises(ModelError, match="unet: found no safetensors weights: only safetensors files are read"):
        select_files([*CONFIGS, *OTHERS, *(name for name in HALF if name != UNET)])


def test_models_in_a_single_file(hub, cache):
    hub.files = {"one.safetensors": b"1", "README.md": b""}
    result = download(ID)
    assert result.exit_code == 0, result.output
    snapshot = cache / "snapshots" / COMMIT
    assert contents(snapshot) == {"one.safetensors": b"1"}
    assert resolve_model(ID) == snapshot / "one.safetensors"
    assert result.stdout.endswith(f"--model {ID}\n")
    hub.files["two.safetensors"] = b"2"
    assert fails(download(ID), ID, "one.safetensors, two.safetensors; choose one with --file")
    assert fails(download(ID, "--file", "three.safetensors"), "found three.safetensors, expected one of one.")
    result = download(ID, "--file", "two.safetensors")
    assert result.stdout.endswith(f"--model {snapshot / 'two.safetensors'}\n")
    with pytest.raises(ModelError, match=r"several models, one.safetensors, two.safetensors; give the path"):
        resolve_model(ID)


def test_one_file_of_a_model_that_has_folders(hub, cache):
    assert download(ID, "--file", "v1-5-pruned.safetensors").exit_code == 0
    assert contents(cache / "snapshots" / COMMIT) == {"v1-5-pruned.safetensors": b"single file"}


def test_select_single_file():
    with pytest.raises(ModelError, match="only safetensors files are read"):
        select_single_file(["model.ckpt"])
    with pytest.raises(InputError, match="there is no such file"):
        select_single_file(["model.ckpt"], "model.ckpt")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_cut_connection_is_resumed(hub, cache, tmp_path):
    for arguments in ([ID], [ID, "--to", str(tmp_path / "folder")]):
        hub.cut[UNET] = 3 << 19
        assert fails(download(*arguments), UNET, "lost the connection to", "run the same command again")
        (partial,) = tmp_path.rglob("*.incomplete/*" if "--to" in arguments else "*.incomplete")
        kept = partial.read_bytes()
        assert BIG.startswith(kept) and len(kept) > 1 << 20
        hub.revive()
        assert download(*arguments).exit_code == 0
        (headers,) = [headers for kind, name, headers in hub.requests if (kind, name) == ("cdn", UNET)]
        assert headers["range"] == f"bytes={len(kept)}-"
        assert hub.bytes_sent[UNET] == len(BIG) - len(kept)
        assert "text_encoder/model.fp16.safetensors" not in hub.asked("cdn")
        assert not list(tmp_path.rglob("*.incomplete"))
    assert (cache / "snapshots" / COMMIT / UNET).read_bytes() == (tmp_path / "folder" / UNET).read_bytes() == BIG
    hub.revive()


def test_a_partial_file_that_is_longer_than_the_whole(hub, cache):
    partial = cache / "blobs" / f"{hashlib.sha256(BIG).hexdigest()}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(BIG + b"more")
    assert download(ID).exit_code == 0
    assert (resolve_model(ID) / UNET).read_bytes() == BIG


@pytest.mark.parametrize("name", [UNET, "unet/config.json"])
def test_a_wrong_checksum(hub, cache, name):
    content = hub.files[name]
    hub.sent[name] = bytes([content[0] ^ 1]) + content[1:]
    assert fails(download(ID), name, "wrong checksum", "removed", "run the same command again")
    assert not os.path.lexists(cache / "snapshots" / COMMIT / name)
    assert not list(cache.rglob("*.incomplete"))
    assert hub.sent[name] not in contents(cache).values()
    with pytest.raises(ModelError, match="incomplete"):
        resolve_model(ID)
    hub.sent.clear()
    assert download(ID).exit_code == 0
    assert (resolve_model(ID) / name).read_bytes() == content


def test_a_damaged_file_in_the_cache_is_replaced(hub, cache, caplog):
    download(ID)
    path = resolve_model(ID) / UNET
    path.resolve().write_bytes(b"\0" * len(BIG))
    hub.revive()
    hub.refused["cdn"] = 503, {}
    assert fails(download(ID), "answered with HTTP 503")
    assert "differs from the hub's file; downloading it again" in caplog.text
    assert not os.path.lexists(path)
    del hub.refused["cdn"]
    assert download(ID).exit_code == 0
    assert path.read_bytes() == BIG
    assert set(hub.asked("cdn")) == {UNET}


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {"X-Error-Message": "Invalid username or password."}, ["no access", "HF_TOKEN", "licence"]),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, ["no access", "HF_TOKEN"]),
        (403, {"X-Error-Code": "GatedRepo"}, ["no access", "gated", "licence", f"/{ID} "]),
        (404, {"X-Error-Code": "RepoNotFound"}, [ID, "not found", "check the name"]),
        (404, {"X-Error-Code": "RevisionNotFound"}, [ID, "no revision v9"]),
        (500, {}, ["HTTP 500", "again"]),
        (200, {}, ["does not answer like a Hugging Face hub", "HF_ENDPOINT"]),
    ],
)
def test_refusals(hub, status, headers, words):
    hub.refused["api"] = status, headers
    assert fails(download(ID, "--revision", "v9"), *words)


def test_the_model_that_has_moved_is_named(hub):
    for status in (401, 404):
        hub.model = "runwayml/stable-diffusion-v1-5"
        hub.refused["api"] = status, {"X-Error-Code": "RepoNotFound"}
        assert fails(download(hub.model), f"has moved to {DEFAULT_MODEL}")


def test_answers_without_checksums(hub, monkeypatch):
    monkeypatch.setattr(hub, "listing", lambda: json.dumps({"sha": COMMIT, "siblings": [{"rfilename": "a"}]}).encode())
    hub.model = ID
    assert fails(download(ID), "does not answer like a Hugging Face hub")
    monkeypatch.setattr(hub, "listing", lambda: json.dumps({"id": ID, "sha": COMMIT, "siblings": []}).encode())
    assert fails(download(ID), "neither the folders of a diffusers model nor a safetensors file")


@pytest.mark.parametrize("model", ["model", "a/b/c", "../model", "https://example.org/a/b", "a--b/c..d", "", "a/b?c"])
def test_names_that_are_no_ids(hub, model):
    assert fails(download(model), "expected an id of the hub")
    assert not hub.requests


def test_another_kind_of_model_is_refused_before_its_weights(hub):
    hub.files["model_index.json"] = b'{"_class_name": "StableDiffusionXLPipeline"}'
    assert fails(download(ID), ID, "found StableDiffusionXLPipeline")
    assert hub.asked("resolve") == ["model_index.json"]


def test_the_token_is_sent_to_the_hub_only(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert download(ID).exit_code == 0
    for kind, _, headers in hub.requests:
        assert headers.get("authorization") == (None if kind == "cdn" else "Bearer hf_secret")
    assert {"api", "resolve", "cdn"} == {kind for kind, *_ in hub.requests}


def test_no_network(hub, monkeypatch):
    hub.close()
    assert fails(download(ID), "cannot connect to", hub.url, "check the network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fails(download(ID), "HF_HUB_OFFLINE is set")


def test_no_room(hub, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 << 20, 0, 2 << 20))
    assert fails(download(ID), "not enough disk space", "0.00 GB needed")
    assert hub.asked("resolve") == ["model_index.json"]
    partial = cache / "blobs" / f"{hashlib.sha256(BIG).hexdigest()}.incomplete"
    partial.write_bytes(BIG[: 1 << 19])  # for which there need not be room any more
    assert download(ID).exit_code == 0


def test_a_full_disk(hub, cache):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        result = download(ID)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fails(result, UNET, "the disk is full", "run the same command again")
    assert not (cache / "snapshots" / COMMIT / UNET).exists()
    hub.revive()
    assert download(ID).exit_code == 0
    assert hub.bytes_sent[UNET] == len(BIG) - (1 << 20)


def test_a_folder_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("")
    assert fails(download(ID, "--to", str(tmp_path / "file" / "folder")), "file")


def test_two_downloads_of_one_file(hub, cache):
    fcntl = pytest.importorskip("fcntl")
    partial = cache / "blobs" / f"{hashlib.sha256(BIG).hexdigest()}.incomplete"
    partial.parent.mkdir(parents=True)
    with partial.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert fails(download(ID), UNET, "another download")
    assert download(ID).exit_code == 0


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_and_the_settings_of_the_environment(hub, tmp_path):
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-m", "sd_numba", "download", ID]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
    big = BIG * 12  # arrives in pieces of 10 MB
    hub.files[UNET] = big
    hub.stall = UNET
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(60)
    partial = tmp_path / "home/hub/models--painter--small-model/blobs" / f"{hashlib.sha256(big).hexdigest()}.incomplete"
    while partial.stat().st_size < 10 << 20:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("stopped by Ctrl-C; run the same command again to continue where it stopped\n")
    assert "Traceback" not in errors
    assert hub.requests[0][2]["authorization"] == "Bearer hf_secret"
    assert {kind for kind, *_ in hub.requests} == {"api", "resolve", "cdn"}  # no telemetry
    hub.revive()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"{ID}: 10 files, 0.03 GB, into {tmp_path}/home/hub" in result.stderr
    assert hub.bytes_sent[UNET] == len(big) - (10 << 20)


# --- without the network ----------------------------------------------------------------------------------------------


def test_models_that_were_not_downloaded(hub, cache, tmp_path, monkeypatch):
    for name in ("somebody/else", "model", "/a/b", "a/b/c", "../model", "", "x" * 5000, "a/\0"):
        assert resolve_model(name) is None
    monkeypatch.chdir(tmp_path)
    download(ID)
    assert resolve_model(ID) is not None
    (tmp_path / ID).mkdir(parents=True)
    assert resolve_model(ID) is None  # a folder of this name is meant


@pytest.mark.parametrize("name", [*CONFIGS, *HALF])
def test_an_incomplete_model_is_not_taken(hub, name):
    download(ID)
    path = resolve_model(ID) / name
    path.resolve().unlink()
    if name == "model_index.json":  # which is not needed
        assert resolve_model(ID) is not None
        return
    with pytest.raises(ModelError, match=f"^{ID}: the download is incomplete; run: sd-numba download {ID}$"):
        resolve_model(ID)


GUARDED = """
import os, sys

def refuse(event, args):
    network = event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
    if network or event == "socket.__new__" and args[1].name in ("AF_INET", "AF_INET6"):
        os.write(2, f"network: {event} {args}".encode())
        os._exit(77)

sys.addaudithook(refuse)
from sd_numba.cli import main
from sd_numba.checkpoints.download import resolve_model

main(sys.argv[1:], standalone_mode=False)
parts = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet", "http.client", "ssl")
print("loaded:", [name for name in parts if name in sys.modules])
print("found:", resolve_model("painter/small-model"))
parts = ("huggingface_hub.hf_api", "huggingface_hub.file_download", *parts[1:])
print("loaded then:", [name for name in parts if name in sys.modules])
"""


def test_nothing_but_download_uses_the_network(hub, tmp_path):
    download(ID)
    environment = os.environ | {"HF_HUB_CACHE": constants.HF_HUB_CACHE}

    def run(*arguments):
        command = [sys.executable, "-c", GUARDED, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    result = run("generate", "a fox", "--steps", "1", "-W", "64", "-H", "64", "-o", str(tmp_path / "fox.png"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "fox.png").is_file()
    lines = result.stdout.splitlines()
    assert lines[-3:] == ["loaded: []", f"found: {resolve_model(ID)}", "loaded then: []"]
    result = run("download", ID)  # the guard itself works
    assert result.returncode == 77 and result.stderr.startswith("network: socket.")
