"""How LoRAs are named on the command line and in prompts."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from sd_numba.checkpoints.embedding import find_embeddings
from sd_numba.checkpoints.finding import find_lora, find_tagged
from sd_numba.errors import InputError, SdNumbaError
from sd_numba.prompts.tags import split_tags, split_weight


def test_tags():
    assert split_tags("a cat <lora:style:0.8> on a beach<lora:other>") == (
        "a cat  on a beach", [("style", (0.8, 0.8)), ("other", (1.0, 1.0))],
    )  # fmt: skip
    assert split_tags("a cat <LoRA:style:-1.5>")[1] == [("style", (-1.5, -1.5))]
    assert split_tags("<lora:style:0.2:0.7>") == ("", [("style", (0.7, 0.2))])
    assert split_tags("<b> no tag") == ("<b> no tag", [])


@pytest.mark.parametrize(
    "tag", ["<lora:style:big>", "<lora:style:nan>", "<lora:style:1:x>", "<lora::1>", "<lora:style"]
)
def test_tags_that_are_none(tag):
    with pytest.raises(InputError, match="expected"):
        split_tags(f"a cat {tag}")


def test_weights(tmp_path):
    assert split_weight("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert split_weight("a.safetensors") == ("a.safetensors", 1.0)
    with pytest.raises(InputError, match="expected a number"):
        split_weight("a.safetensors:x")
    (tmp_path / "odd:1").write_bytes(b"")
    assert split_weight(str(tmp_path / "odd:1")) == (str(tmp_path / "odd:1"), 1.0)


def test_files(tmp_path, monkeypatch):
    folder = tmp_path / "loras"
    (folder / "sub").mkdir(parents=True)
    style = folder / "sub" / "style v1.2.safetensors"
    style.write_bytes(b"")
    (folder / "peft").mkdir()
    adapter = folder / "peft" / "adapter_model.safetensors"
    adapter.write_bytes(b"")
    for name in ("style v1.2", "style v1.2.safetensors", "sub/style v1.2"):
        assert find_tagged(name, str(folder)) == find_lora(name, str(folder)) == style
    assert find_lora(str(style), None) == style
    assert find_lora(str(folder / "peft"), None) == adapter
    monkeypatch.chdir(folder / "sub")
    (folder / "sub" / "style v1.2").write_bytes(b"")  # a tag does not mean files of the working folder
    assert find_tagged("style v1.2", str(folder)) == style
    for arguments, message in (
        (("none", str(folder)), "none of that name"),
        (("none", None), "give the folder with lora_dir"),
        (("none", str(folder / "none")), "no such folder"),
        ((str(folder), None), "a folder without"),
    ):
        with pytest.raises(SdNumbaError, match=message):
            find_lora(*arguments)


def test_embeddings(tmp_path):
    (tmp_path / "sub").mkdir()
    vectors = np.ones((1, 4), np.float32)
    paths = [tmp_path / "a b.safetensors", tmp_path / "sub" / "c.safetensors", tmp_path / "old.pt"]
    save_file({"emb_params": vectors}, paths[0])
    save_file({"<cat-toy>": vectors}, paths[1])
    paths[2].write_bytes(b"PK\x03\x04")
    (tmp_path / "broken.safetensors").write_bytes(b"")
    assert find_embeddings(tmp_path) == {
        "a b": paths[0], "c": paths[1], "<cat-toy>": paths[1], "old": paths[2],
        "broken": tmp_path / "broken.safetensors",
    }  # fmt: skip
