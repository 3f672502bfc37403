"""The text teacher's data, recipe, export and judge, on a package of a few drawn pictures."""

import copy
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from emoji import CaptionedEmoji, Picture, has_two_sides, read_pictures, split
from export_teacher import export_teacher
from grid_teacher import GridTeacherModule
from PIL import Image
from text_judge import content_words, judge_text_teacher, retrieval, sharing
from text_teacher import TextTeacherModule, zeroed_layers

from foreseer.cli import main
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.sentence_encoder import SentenceEncoder, encode, plain

CONFIGS = Path(__file__).parents[1] / "examples" / "bundled_models"
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "flag", "heart", "cat", "dog", "fish", "tree", "star", "book", "cup")


def png(colour: str, place: int) -> bytes:
    """A colour on a transparent ground; the opaque part tells pictures apart."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste(colour, (0, 0, 20 + 4 * place, 32))
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """44 pictures in the form of the npm package."""
    return write_archive(tmp_path_factory.mktemp("package") / "package.tgz")


def write_archive(path: Path) -> Path:
    """Write them."""
    named = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    entries, files = [], {}
    for i, (colour, shape) in enumerate(named):
        short = f"{shape}_{colour}"
        entry = {"name": f"{colour} {shape}".upper(), "short_name": short, "image": f"{i}.png"}
        entries.append(entry | {"category": "Symbols"})
        files[f"package/img/google/64/{i}.png"] = png(colour, i % len(SHAPES))
    files["package/emoji.json"] = json.dumps(entries).encode()
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


def test_pictures_lie_on_white_with_both_names(archive):
    pictures = read_pictures(archive, 32)
    assert len(pictures) == 44 and pictures[0].captions == ("blue book", "book blue")
    circle = next(p for p in pictures if p.captions[0] == "red circle")
    assert circle.image.shape == (3, 32, 32)
    assert circle.image[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert circle.image[:, 31, 31].tolist() == [1.0, 1.0, 1.0]


def test_one_picture_in_twenty_is_kept_from_training_with_all_its_names(archive):
    data = CaptionedEmoji(str(archive), batch_size=4)
    data.setup("fit")
    train, held_out = split(read_pictures(archive, 32))
    assert [len(train), len(held_out)] == [41, 3]
    assert len(data.train) == 82 and len(data.test) == 6
    names = {caption for picture in train for caption in picture.captions}
    assert not names & {caption for picture in held_out for caption in picture.captions}
    image, embeds, pooled = data.train[1]
    assert torch.equal(image, train[0].image)
    expected = encode([train[0].captions[1]])
    torch.testing.assert_close(embeds, expected[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, expected[1][0], rtol=1e-4, atol=1e-5)


def test_a_mirrored_epoch_holds_every_caption_twice_and_turns_what_has_two_sides(archive):
    plain_data = CaptionedEmoji(str(archive))
    mirrored = CaptionedEmoji(str(archive), mirror=True)
    for data in (plain_data, mirrored):
        data.setup("fit")
    count = len(plain_data.train)
    assert len(mirrored.train) == 2 * count and len(mirrored.test) == len(plain_data.test)
    mirrored.train.two_sided[0] = True  # the package's pictures are all symbols
    for index in range(count):
        expected = plain_data.train[index]
        turned = expected[0].flip(-1) if index < 2 else expected[0]  # both captions of the first
        for got, wanted in zip(mirrored.train[index], expected, strict=True):
            assert torch.equal(got, wanted)
        again = mirrored.train[count + index]
        assert torch.equal(again[0], turned) and torch.equal(again[1], expected[1])
        assert torch.equal(again[2], expected[2])
    assert not torch.equal(mirrored.train[0][0], mirrored.train[count][0])


@pytest.mark.parametrize(
    ("captions", "category", "expected"),
    [
        (("slice of pizza", "pizza"), "Food & Drink", True),
        (("left-facing fist", "left facing fist"), "People & Body", False),
        (("clock face eight oclock", "clock8"), "Travel & Places", False),
        (("chart with downwards trend", "chart"), "Objects", False),
        (("chad flag", "flag td"), "Flags", False),
        (("heavy dollar sign", "heavy dollar sign"), "Symbols", False),
    ],
)
def test_flags_signs_clocks_and_sides_are_not_mirrored(captions, category, expected):
    assert has_two_sides(Picture(captions, category, torch.zeros(3, 4, 4))) is expected


def test_sigma_stays_exact_under_autocast():
    module = TextTeacherModule(1, 1, 1, sample_size=16)
    module.setup("fit")
    seen = []
    module.transformer.time_text_embed.register_forward_pre_hook(lambda _, args: seen.append(args))
    sigma, words = torch.tensor([0.7031, 0.9812]), encode(["a cat", "a dog"])
    with torch.autocast("cpu", torch.bfloat16):
        module.velocity(torch.randn(2, 3, 16, 16), sigma, list(words), torch.zeros(2).bool())
    assert torch.equal(seen[0][0], 1000 * sigma)


def test_prompts_end_in_zeros_and_their_mean_counts_words_only():
    embeds, pooled = encode(["a cat", "a very small brown dog on a red chair"])
    used = embeds.abs().sum(-1) > 0
    assert used.sum(1).tolist() == [4, 11]  # with the encoder's two marks
    torch.testing.assert_close(pooled[0], embeds[0, :4].mean(0))
    unit = torch.nn.functional.normalize(encode(["grinning face", "smiling face", "a lorry"])[1])
    assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.2


def test_known_prompts_are_what_the_encoder_makes_of_them():
    encoder = SentenceEncoder.knowing(["A  Cat ", "a dog"])
    assert list(encoder.known) == ["", "a cat", "a dog"]
    mixed = encoder(["a dog", "a cow", "A DOG"])
    assert torch.equal(mixed[0][0], mixed[0][2])
    torch.testing.assert_close(mixed[0], encode(["a dog", "a cow", "a dog"])[0])
    assert plain("  A\n Cat") == "a cat"


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_package_that_cannot_be_read_is_named(archive, tmp_path, damage):
    path = tmp_path / "package.tgz"
    if damage == "cut":
        path.write_bytes(archive.read_bytes()[:-2000])
    if damage == "other":
        with tarfile.open(path, "w:gz") as package:
            package.addfile(tarfile.TarInfo("package/readme"))
    error = FileNotFoundError if damage == "missing" else ValueError
    with pytest.raises(error, match="emoji-datasource-google"):
        read_pictures(path, 32)


def test_a_dropped_caption_is_the_empty_one():
    module = TextTeacherModule(1, 1, 1, sample_size=16)
    module.setup("fit")
    for layer in zeroed_layers(module.transformer):
        torch.nn.init.normal_(layer.weight, std=0.1)
    x_t, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.3])
    words = encode(["a cat", "a cat"])
    null = module.text_encoder[0](["", ""])
    dropped = module.velocity(x_t, sigma, list(words), torch.tensor([True, False]))
    without = module.velocity(x_t, sigma, list(null), torch.tensor([False, False]))
    assert torch.equal(dropped[0], without[0]) and not torch.allclose(dropped[1], without[1])


def test_training_starts_at_zero_velocity():
    module = TextTeacherModule(1, 2, 1, sample_size=16)
    module.setup("fit")
    assert float(module.velocity(
        torch.randn(1, 3, 16, 16), torch.rand(1), list(encode(["a cat"])), torch.tensor([False])
    ).abs().max()) == 0.0  # fmt: skip


def test_blocks_are_compiled_for_training_only_and_their_average_is_plain(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # inductor asks for a compiler
    counts = {}
    for stage in ("fit", "export"):
        module = TextTeacherModule(2, 3, 1, sample_size=16, compile_blocks=True)
        names = set(module.state_dict())
        module.setup(stage)
        blocks = [
            *module.transformer.transformer_blocks,
            *module.transformer.single_transformer_blocks,
        ]
        counts[stage] = sum(block._compiled_call_impl is not None for block in blocks)
        assert set(module.state_dict()) == names
        averaged = copy.deepcopy(module)  # what EMAWeightAveraging keeps
        assert set(averaged.state_dict()) == names
    assert counts == {"fit": 5, "export": 0}


@pytest.mark.slow
def test_the_shipped_recipe_trains_resumes_and_exports(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the recipe writes to runs/ in the current folder
    sizes = ["--model.num_layers=1", "--model.num_single_layers=1", "--model.num_attention_heads=1"]
    sizes += ['--model.prompts=["red cat", "blue dog", "green cup"]', "--model.sample_size=16"]
    sizes += ["--model.compile_blocks=false"]
    data = [f"--data.archive={archive}", "--data.sample_size=16", "--data.batch_size=8"]
    config = ["--config", str(CONFIGS / "emoji_flux.yaml"), "--trainer.log_every_n_steps=1"]
    for steps in (2, 3):  # the second command goes on from the first one's checkpoint
        main(["fit", *config, *sizes, *data, f"--trainer.max_steps={steps}"])
    checkpoint = tmp_path / "runs" / "teacher" / "emoji_flux" / "last.ckpt"
    out = tmp_path / "out"
    export_teacher(str(checkpoint), str(out))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    pipe = load_pipeline(str(out))
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.equal(weight, state[f"transformer.{name}"].bfloat16().float()), name
    assert list(pipe.text_encoder.known) == ["", "red cat", "blue dog", "green cup"]
    facts = json.loads((out / "training.json").read_text())
    assert (facts["steps"], facts["samples_seen"]) == (3, 3 * 8)
    assert "Not measured yet" in (out / "README.md").read_text()
    assert np.array(Image.open(out / "samples.png")).shape == (32, 16 * 8 * 2, 3)
    judge_text_teacher(str(out), str(archive), num_inference_steps=2)
    judged = json.loads((out / "judge.json").read_text())
    assert [row["count"] for row in judged["splits"].values()] == [3, 3]
    assert "| shares a word | chance |" in (out / "README.md").read_text()


def test_batches_take_turns_between_the_grids(monkeypatch):
    module, seen = GridTeacherModule(None, (1, 2), 1, 1, 1, sample_size=8), []
    monkeypatch.setattr(module, "_loss", lambda x_0, *rest: seen.append(x_0) or x_0.sum())
    monkeypatch.setattr(module, "log", lambda *told, **options: None)
    images = torch.randn(2, 3, 8, 8)
    for step in range(3):
        monkeypatch.setattr(GridTeacherModule, "global_step", step)
        module.training_step([images], 0)
    assert [x_0.shape[-1] for x_0 in seen] == [8, 4, 8] and torch.equal(seen[0], images)
    torch.testing.assert_close(seen[1][0, 1, 3, 2], images[0, 1, 6:8, 4:6].mean())
    with pytest.raises(ValueError, match="whole tokens of 4 px in pictures of 8 px"):
        GridTeacherModule(None, (1, 4), 1, 1, 1, sample_size=8)


def test_retrieval_counts_shared_words_and_the_very_picture():
    names = (("red cat", "cat"), ("red dog", "dog"), ("blue cup", "cup"), ("tea cup", "tea"))
    pictures = [Picture(each, "", torch.zeros(3, 4, 4)) for each in names]
    known = torch.eye(4)
    found = torch.stack([known[1], known[2]])  # nearest: the dog, asked for the cat; the cup itself
    result = retrieval(found, known, [0, 2], pictures)
    assert result["shares_a_word"] == 1.0  # "red"; "cup"
    assert result["exact"] == 0.5 and result["exact_chance"] == 0.25
    assert result["chance"] == 0.5  # each shares a word with itself and one more of four
    assert sharing([0], pictures).tolist() == [[True, True, False, False]]
    assert content_words("flag of the sea: part 2") == {"flag", "sea", "part", "2"}
