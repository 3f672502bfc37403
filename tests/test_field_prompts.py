"""A path is read as prompts or refused, and never drawn as words."""

import codecs

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import save_file

from foreseer.integration.pipelines.pipeline_call import first_samples, samples
from foreseer.trajectories.prompts import asked_items

pytestmark = pytest.mark.fault
LINES = ["slice of pizza", "red heart"]
WORDS = [
    "a photo of a cat",
    "cat",
    "a photo of a cat.",
    "Two cats. One dog",
    "a black/white photo of a street",
    "a sign that says 'www.cats.example', at night",
    "f/2.8, 35 mm, bokeh",
    "an AI-generated image, v1.5 style",
    "1.5",
    "wow...",
    "a 3.5",
    "a file called prompts.csv on a screen",
]
PATHS = [
    "prompts.csv",
    "prompts.jsonl",
    "prompts.text",
    "my prompts.csv",
    "data/prompts",
    "./my prompts",
    "../prompts",
    "~/my prompts",
    "/srv/my prompts",
    "C:\\my prompts",
    "data\\prompts",
    " prompts.csv ",
]


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 6)


def drawn(pipe, prompts):
    return [sample["prompt"] for sample in samples(pipe, prompts)]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("name", ["prompts.csv", "prompts.jsonl", "prompts", "my prompts.md"])
def test_field_prompts_a_file_of_another_kind_is_refused(pipe, tmp_path, name, exists):
    if exists:
        (tmp_path / name).write_text("prompt\nslice of pizza\n")
    elif name == "prompts":
        assert drawn(pipe, name) == [name]  # a word like any other
        return
    with pytest.raises(ValueError, match="expected words, or a file that ends in .txt"):
        samples(pipe, name)
    with pytest.raises(ValueError, match="is or looks like a path"):
        first_samples(pipe, name)
    with pytest.raises(ValueError, match="end them with a full stop"):
        asked_items(pipe, name, 2, 0)
    with pytest.raises(ValueError, match="an entry of a list of prompts"):
        samples(pipe, ["a cat", name])


@pytest.mark.parametrize("found", [3, None, b"a cat", ["a cat"]])
def test_field_prompts_an_entry_that_is_no_string_is_refused(pipe, found):
    with pytest.raises(ValueError, match=f"a {type(found).__name__}; expected words"):
        samples(pipe, ["a cat", found])


@pytest.mark.parametrize("path", PATHS)
def test_field_prompts_what_looks_like_a_path_is_not_drawn(pipe, path):
    with pytest.raises(ValueError, match="looks like a path"):
        samples(pipe, path)


def test_field_prompts_a_folder_is_not_drawn(pipe, tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match="looks like a folder"):
        samples(pipe, "cats")
    assert drawn(pipe, "cats.") == ["cats."]


@pytest.mark.parametrize("words", WORDS)
def test_field_prompts_words_are_drawn_as_they_are(pipe, words):
    assert drawn(pipe, words) == drawn(pipe, [words]) == [words]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.TXT", "my prompts.Txt"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
def test_field_prompts_text_files_are_read_however_they_were_saved(
    pipe, tmp_path, name, ending, mark, encoding
):
    text = ending.join([LINES[0], "", f" {LINES[1]} ", "naïve\u2028one", ""])
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    assert drawn(pipe, name) == drawn(pipe, tmp_path / name) == [*LINES, "naïve\u2028one"]


def test_field_prompts_text_in_another_encoding_is_refused(pipe, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="no text in UTF-8.*Save it as UTF-8"):
        samples(pipe, "prompts.txt")
    (tmp_path / "prompts.txt").write_bytes(codecs.BOM_UTF8 + b"\n\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        samples(pipe, "prompts.txt")


@pytest.mark.parametrize("name", ["missing.txt", "missing.safetensors", "a/missing.TXT"])
def test_field_prompts_a_file_that_is_missing_is_said_to_be(pipe, name):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        samples(pipe, name)


def test_field_prompts_embeddings_are_read_whatever_the_case_of_the_ending(pipe, tmp_path):
    save_file({"prompt_embeds": torch.ones(2, 3, 12)}, tmp_path / "words.SAFETENSORS")
    assert len(samples(pipe, "words.SAFETENSORS")) == 2
