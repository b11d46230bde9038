"""Files of prompts: text, CSV, JSON and JSON lines."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_numba.errors import InputError
from sd_numba.recipes import prompt_file
from sd_numba.recipes.prompt_file import read_prompt_file


def made(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.txt", "a fox\n\n# no\n  a hen  \r\n", [{"prompt": "a fox"}, {"prompt": "a hen"}]),
        ("a", b"\xef\xbb\xbfa fox", [{"prompt": "a fox"}]),
        ("a.txt", "a, b: c\u2028d", [{"prompt": "a, b: c\u2028d"}]),
        ("a.csv", 'prompt,Steps,size\r\n"a, ""fox""",20,\n\na hen,,64x96\n',
         [{"prompt": 'a, "fox"', "num_inference_steps": 20}, {"prompt": "a hen", "width": 64, "height": 96}]),
        ("a.csv", 'seed,prompt\n1,"two\nlines"\n', [{"seed": 1, "prompt": "two\nlines"}]),
        ("a.CSV", "prompt\na\n", [{"prompt": "a"}]),
        ("a.json", '["a fox", {"prompt": "a hen", "cfg_scale": 4, "output": "hen.png"}]',
         [{"prompt": "a fox"}, {"prompt": "a hen", "guidance_scale": 4.0, "output": "hen.png"}]),
        ("a.json", '{"prompts": ["a fox"], "title": "x"}', [{"prompt": "a fox"}]),
        ("a.jsonl", '"a fox"\n\n{"prompt": "b", "seed": 5}\n', [{"prompt": "a fox"}, {"prompt": "b", "seed": 5}]),
        ("a.ndjson", '{"prompt": "b", "clip_skip": 2}', [{"prompt": "b", "clip_skip": 1}]),
        ("a.jsonl", '{"prompt": "b", "clip_skip": 1, "seed": -1, "steps": null}', [{"prompt": "b", "clip_skip": 0}]),
    ],
)  # fmt: skip
def test_files(tmp_path, name, content, wanted):
    assert read_prompt_file(made(tmp_path, name, content)) == wanted


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "a.txt: no prompt in the file"),
        ("a.txt", "# nothing\n", "a.txt: no prompt in the file"),
        ("a.txt", b"a fox\n\xff\xfe", "line 2: not valid UTF-8; save the file as UTF-8"),
        ("a.csv", "text,seed\na,1\n", "line 1: found the header 'text,seed', expected a column named prompt"),
        ("a.csv", "prompt,Seed,seed\na,1,2\n", "line 1: two columns are named 'seed'; remove one"),
        ("a.csv", "prompt\na,b\n", "line 2: found 2 cells, expected 1, as in the header"),
        ("a.csv", 'prompt,seed\n\n"a\nb",1\nc,many\n', "line 5: seed: found 'many', expected a whole number"),
        ("a.csv", 'prompt\n"a" b\n', r"line 2: not valid CSV \(RFC 4180\): "),
        ("a.csv", "prompt,seed\n,5\n", "line 2: no prompt"),
        ("a.json", "[1]", "prompt 1: found a number, expected a prompt or an object with settings"),
        ("a.json", "{}", r"found an object, expected a list of prompts or \{\"prompts\": \[...\]\}"),
        ("a.json", '["a",\n]', "line 2, column 1: not valid JSON: "),
        ("a.json", "[" * 100_000, "the JSON is nested too deeply"),
        ("a.json", '[{"prompt": "a", "width": "wide"}]', "prompt 1: width: found 'wide', expected a whole number"),
        ("a.json", '[{"prompt": "a", "stepps": 5}]', "prompt 1: stepps: unknown setting"),
        (
            "a.json",
            '[{"prompt": "a", "precision": "f32"}]',
            "prompt 1: precision applies to the whole run; give it as an",
        ),
        ("a.json", '[{"prompt": "a", "model": "x"}]', "prompt 1: model_name applies to the whole run"),
        ("a.json", '[{"prompt": "a", "output": 5}]', "prompt 1: output: found 5, expected a text"),
        ("a.json", '[{"seed": 5}]', "prompt 1: no prompt"),
        ("a.jsonl", '"a"\n{"prompt"\n', "line 2, column 10: not valid JSON: "),
        ("a.jsonl", '"a"\nnull\n', "line 2: found null, expected a prompt"),
    ],
)
def test_files_that_are_wrong(tmp_path, name, content, words):
    path = made(tmp_path, name, content)
    with pytest.raises(InputError, match=words) as caught:
        read_prompt_file(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read: "):
            read_prompt_file(path)
    monkeypatch.setattr(prompt_file, "MAX_BYTES", 1 << 20)
    with pytest.raises(InputError, match="larger than 1 MB; split the file"):
        read_prompt_file(made(tmp_path, "a.txt", "a" * (1 << 20) + "b"))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60) | st.text(st.sampled_from('ab",\n[]{}:05 prompt'), max_size=60).map(str.encode),
       ending=st.sampled_from([".txt", ".csv", ".json", ".jsonl"]))  # fmt: skip
def test_whatever_is_in_a_file(tmp_path_factory, content, ending):
    path = tmp_path_factory.mktemp("prompts") / f"a{ending}"
    path.write_bytes(content)
    try:
        rows = read_prompt_file(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(row["prompt"].strip() for row in rows)


@settings(max_examples=50, deadline=None)
@given(prompts=st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=5))
def test_json_says_any_prompt(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "a.json").write_text(json.dumps(prompts))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    for name in ("a.json", "a.jsonl"):
        assert [row["prompt"] for row in read_prompt_file(folder / name)] == prompts
